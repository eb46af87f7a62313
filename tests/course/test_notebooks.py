"""The exercise notebooks: an unsolved one runs to its end and says so, a solved one passes every check."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

from optinfer.course import exercises, grade

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import notebook_cache  # noqa: E402

NAMES = [chapter.notebook for chapter in exercises.CHAPTERS]


def check_texts(notebook):
    """What each check cell showed, by the exercise's id."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and (match := re.match(r'check\("([\w.]+)"', cell.source)):
            results = [o for o in cell.outputs if o.output_type == "execute_result"]  # not the bar of the loading model
            found[match[1]] = "\n".join(o.data["text/plain"] for o in results)
    return found


def all_text(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(str(o.get("text", "")) + str(o.get("data", "")) + str(o.get("traceback", "")) for o in outputs)


@pytest.mark.notebook
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_an_unsolved_notebook_runs_to_the_end_without_a_traceback(name):
    notebook = notebook_cache.executed(ROOT / f"notebooks/exercises/{name}.ipynb")
    text = all_text(notebook)
    assert "Traceback" not in text and "NotImplementedError" not in text
    assert not [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    shown = check_texts(notebook)
    assert list(shown) == notebook.metadata.optinfer.exercises
    assert all("Not started" in text and "hint(" in text for text in shown.values())


@pytest.mark.notebook
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_every_check_of_a_solved_notebook_passes(name):
    shown = check_texts(notebook_cache.executed(ROOT / f"notebooks/solutions/{name}.ipynb"))
    assert all(text.startswith("✓") for text in shown.values()), shown


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("folder", "fraction"), [("solutions", 1.0), ("exercises", 0.0)])
def test_scores(name, folder, fraction):
    found = grade.grade(ROOT / f"notebooks/{folder}/{name}.ipynb")
    assert (found.fraction, found.problems) == (fraction, [])
    assert all(score.attempted == bool(fraction) for score in found.scores)


def test_all_exercises_are_in_the_notebooks():
    for folder in ("exercises", "solutions"):
        ids = []
        for name in NAMES:
            ids += nbformat.read(ROOT / f"notebooks/{folder}/{name}.ipynb", as_version=4).metadata.optinfer.exercises
        assert ids == [exercise.id for exercise in exercises.every()]
