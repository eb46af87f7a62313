"""The exercise notebooks as an nbgrader assignment, with a real nbgrader in an environment of its own.

pytest -m versions tests/course/test_nbgrader.py

OPTINFER_NBGRADER names an nbgrader program that is already there, to save the installation.
"""

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

from optinfer.course import exercises

ROOT = Path(__file__).parents[2]
SOLUTIONS = sorted((ROOT / "notebooks/solutions").glob("*.ipynb"))


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
    # 30 seconds for a cell, nbgrader's default, are few where the real model is loaded on a busy machine.
    options = [f"--CourseDirectory.root={course}", "--ExecutePreprocessor.timeout=300"]
    done = subprocess.run(
        [program, *arguments, *options], cwd=course, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def graded(notebook):
    """Its cells that nbgrader knows, by their id."""
    return {c.metadata.nbgrader.grade_id: c for c in notebook.cells if "nbgrader" in c.metadata}


@pytest.mark.versions
@pytest.mark.timeout(3600)
def test_nbgrader_gives_full_and_zero_scores(nbgrader, tmp_path):
    """All solution notebooks as one assignment: release it, hand it in solved and unsolved, grade both."""
    course = tmp_path / "course"
    (course / "source/ps1").mkdir(parents=True)
    for path in SOLUTIONS:
        shutil.copy(path, course / "source/ps1")
    run(nbgrader, course, "generate_assignment", "ps1")

    points = manual = 0
    for path in SOLUTIONS:
        released = nbformat.read(course / "release/ps1" / path.name, as_version=4)
        ours = graded(nbformat.read(ROOT / "notebooks/exercises" / path.name, as_version=4))
        solved = graded(nbformat.read(path, as_version=4))
        for id, cell in graded(released).items():
            if cell.cell_type == "code":
                assert cell.source == ours[id].source, "what nbgrader makes of the solutions is our exercise notebook"
        worth = {id: c.metadata.nbgrader.points for id, c in ours.items() if c.metadata.nbgrader.grade}
        points += sum(n for id, n in worth.items() if ours[id].cell_type == "code")
        manual += sum(n for id, n in worth.items() if ours[id].cell_type == "markdown")
        hand_in(released, course / "submitted/unsolved/ps1" / path.name)
        for id, cell in graded(released).items():
            if cell.cell_type == "code" and cell.metadata.nbgrader.solution:
                cell.source = solved[id].source
        hand_in(released, course / "submitted/solved/ps1" / path.name)

    run(nbgrader, course, "autograde", "ps1")
    run(nbgrader, course, "export", "--to=grades.csv")
    with open(course / "grades.csv", newline="") as file:
        scores = {row["student_id"]: (float(row["score"]), float(row["max_score"])) for row in csv.DictReader(file)}
    assert points == sum(exercise.points for exercise in exercises.every())
    assert scores == {"solved": (points, points + manual), "unsolved": (0, points + manual)}


def hand_in(notebook, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
