"""The exercise notebooks as nbgrader assignments, with a real nbgrader in its own environment."""

import csv
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NAME = "01_quantization"


@pytest.fixture(scope="module")
def nbgrader(tmp_path_factory):
    """The path of an nbgrader, and the environment in which its notebooks run in this Python."""
    folder = tmp_path_factory.mktemp("nbgrader")
    program = os.environ.get("OPTINFER_NBGRADER")
    if not program:
        venv.create(folder / "venv", with_pip=True)
        subprocess.run([folder / "venv/bin/pip", "install", "-q", "nbgrader>=0.9"], check=True, timeout=900)
        program = str(folder / "venv/bin/nbgrader")
    kernel = folder / "jupyter/kernels/python3"
    kernel.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    (kernel / "kernel.json").write_text(json.dumps(spec))
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(program).parent), os.environ["PATH"]]),  # it calls alembic
        "JUPYTER_PATH": str(folder / "jupyter"),
        "OPTINFER_PROGRESS": str(folder / "progress.json"),
        "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    return program, environment


def run(nbgrader, course, *arguments):
    program, environment = nbgrader
    command = [program, *arguments, f"--CourseDirectory.root={course}"]
    done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.versions
def test_nbgrader_gives_full_and_zero_scores(nbgrader, tmp_path):
    course = tmp_path / "course"
    (course / "source/ps1").mkdir(parents=True)
    shutil.copy(ROOT / f"notebooks/solutions/{NAME}.ipynb", course / "source/ps1")
    run(nbgrader, course, "generate_assignment", "ps1")

    released = nbformat.read(course / f"release/ps1/{NAME}.ipynb", as_version=4)
    ours = nbformat.read(ROOT / f"notebooks/exercises/{NAME}.ipynb", as_version=4)
    sources = {c.metadata.nbgrader.grade_id: c.source for c in ours.cells if "nbgrader" in c.metadata}
    for cell in released.cells:
        if "nbgrader" in cell.metadata and cell.cell_type == "code":
            assert cell.source == sources[cell.metadata.nbgrader.grade_id]

    solved = {
        c.metadata.nbgrader.grade_id: c.source
        for c in nbformat.read(ROOT / f"notebooks/solutions/{NAME}.ipynb", as_version=4).cells
        if "nbgrader" in c.metadata and c.metadata.nbgrader.solution and c.cell_type == "code"
    }
    for student in ("solved", "unsolved"):
        submission = course / f"submitted/{student}/ps1/{NAME}.ipynb"
        submission.parent.mkdir(parents=True)
        notebook = nbformat.read(course / f"release/ps1/{NAME}.ipynb", as_version=4)
        if student == "solved":
            for cell in notebook.cells:
                if "nbgrader" in cell.metadata and cell.metadata.nbgrader.grade_id in solved:
                    cell.source = solved[cell.metadata.nbgrader.grade_id]
        nbformat.write(notebook, submission)
    run(nbgrader, course, "autograde", "ps1")
    run(nbgrader, course, "export", "--to=grades.csv")

    with open(course / "grades.csv", newline="") as file:
        scores = {row["student_id"]: (float(row["score"]), float(row["max_score"])) for row in csv.DictReader(file)}
    points = sum(
        c.metadata.nbgrader.points
        for c in ours.cells
        if c.cell_type == "code" and c.metadata.get("nbgrader", {}).get("grade")
    )
    manual = sum(
        c.metadata.nbgrader.points for c in ours.cells if c.cell_type == "markdown" and "nbgrader" in c.metadata
    )
    assert scores["solved"] == (points, points + manual)
    assert scores["unsolved"] == (0, points + manual)
