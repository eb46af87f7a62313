"""Grading survives what notebooks do: crash, hang, kill the kernel, lie, or be no notebook at all."""

import argparse
import json
from xml.etree import ElementTree

import nbformat
import pytest

from optinfer.commands import grade as command
from optinfer.course import exercises, grade

RIGHT = (
    "import torch\nfrom torch import Tensor\nfrom optinfer import check\n"
    + exercises.get("quantization.pack_nibbles").source
)
CHECK = 'check("quantization.pack_nibbles", pack_nibbles)'


def notebook(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), path)
    return path


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))


def test_a_solved_and_an_unsolved_exercise_make_a_partial_score(tmp_path, capsys):
    path = notebook(
        tmp_path / "my own name (2).ipynb",
        RIGHT,
        CHECK,
        "def weight_bytes(*a): return 1",
        'check("basics.weight_bytes", weight_bytes)',
    )
    before = path.read_bytes()
    assert run(path, "--json", "--min", "0.5", "--junit", tmp_path / "out.xml") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["score"], found["points"], found["fraction"]) == (1, 2, 0.5)
    assert [s["passed"] for s in found["scores"]] == [True, False]
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert path.read_bytes() == before


@pytest.mark.thorough
def test_what_hangs_costs_only_its_own_points(tmp_path):
    right = exercises.get("basics.weight_bytes").source
    path = notebook(tmp_path / "a.ipynb", "import time; time.sleep(3600)", right, 'check("basics.weight_bytes", 0)')
    found = grade.grade(path, cell_timeout=5)
    assert [(s.id, s.passed) for s in found.scores] == [("basics.weight_bytes", True)]
    assert "cell 1 was interrupted after 5 seconds" in found.problems


def test_what_crashes_or_lies_costs_only_its_own_points(tmp_path):
    path = notebook(
        tmp_path / "a.ipynb",
        "1 / 0",
        RIGHT,
        CHECK,
        "import optinfer\noptinfer.check = check = lambda *a: True\ndef allocate(*a): return None",
        'check("kv_cache.allocate", allocate)',
        "import sys; sys.exit()",
        '# check("basics.roofline", attainable)',
    )
    found = grade.grade(path)
    assert [(s.id, s.passed) for s in found.scores] == [
        ("quantization.pack_nibbles", True),
        ("kv_cache.allocate", False),
    ]
    assert any("ZeroDivisionError" in p for p in found.problems)


@pytest.mark.thorough
@pytest.mark.parametrize("deadly", ["import os; os._exit(1)", "hog = [bytearray(b'x' * 10**8) for _ in range(60)]"])
def test_a_cell_that_kills_the_kernel_is_left_out_of_a_second_run(tmp_path, deadly):
    found = grade.grade(notebook(tmp_path / "a.ipynb", RIGHT, deadly, CHECK), memory=3.0)
    assert found.score == 1
    assert any(("killed the kernel" in p) or ("used more than 3 GB" in p) for p in found.problems), found.problems


@pytest.mark.parametrize(
    "content", ["", "not json", '{"cells": []}', '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}']
)
def test_what_is_no_exercise_notebook_fails_with_a_reason(tmp_path, content, capsys):
    path = tmp_path / "x.ipynb"
    path.write_text(content)
    assert run(path, tmp_path / "missing.ipynb", "--min", "0") == 1
    assert "missing.ipynb" in capsys.readouterr().out


def test_an_exercise_whose_cells_were_deleted_still_counts(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "x = 1")
    made = nbformat.read(path, as_version=4)
    made.metadata["optinfer"] = {"exercises": ["basics.roofline", "no.such"]}
    assert grade.exercises_of(made) == ["basics.roofline", "no.such"]


def test_limits_must_make_sense(tmp_path):
    with pytest.raises(ValueError, match="--min"):
        run(tmp_path / "a.ipynb", "--min", "2")
    with pytest.raises(ValueError, match="--memory"):
        run(tmp_path / "a.ipynb", "--memory", "0")


WRONG = "def allocate(free, n, size): return [], free"


def test_a_wrong_answer_is_reported_with_its_message(tmp_path, capsys):
    path = notebook(tmp_path / "a.ipynb", WRONG, 'check("kv_cache.allocate", allocate)')
    assert run(path) == 1
    text = capsys.readouterr().out
    assert "wrong" in text and str(path) in text and "Input: 20 tokens in blocks of 16" in text


def test_tampering_with_the_course_changes_nothing(tmp_path):
    path = notebook(
        tmp_path / "a.ipynb",
        "import optinfer.course.checks as checks, optinfer.course.exercises as exercises\n"
        "class Fine: passed, attempted, score, message = True, True, 9, ''\n"
        "checks.evaluate = lambda *a: Fine()\nexercises.get('kv_cache.allocate').__dict__['cases'] = lambda draw: []",
        WRONG,
        'check("kv_cache.allocate", allocate)',
    )
    (score,) = grade.grade(path).scores
    assert score.attempted and not score.passed and score.points == 2


@pytest.mark.thorough
def test_an_answer_that_kills_the_kernel_costs_only_its_own_points(tmp_path):
    deadly = "def pack_nibbles(codes):\n    import os\n    os._exit(1)"
    path = notebook(
        tmp_path / "a.ipynb",
        deadly,
        "def weight_bytes(parameters, bits, group=0, scale=16):\n"
        "    return parameters * (bits + (scale / group if group else 0)) / 8",
    )
    found = grade.grade(path, assignment=notebook(tmp_path / "given.ipynb", CHECK, 'check("basics.weight_bytes", f)'))
    assert [(s.id, s.passed) for s in found.scores] == [
        ("quantization.pack_nibbles", False),
        ("basics.weight_bytes", True),
    ]
    assert any("the check of quantization.pack_nibbles killed the kernel" in p for p in found.problems)


@pytest.mark.thorough
def test_the_assignment_counts_what_was_deleted(tmp_path):
    given = notebook(tmp_path / "given.ipynb", CHECK, 'check("kv_cache.allocate", allocate)')
    handed_in = notebook(tmp_path / "mine.ipynb", RIGHT, CHECK)
    assert grade.grade(handed_in).fraction == 1
    found = grade.grade(handed_in, assignment=given)
    assert (found.score, found.points) == (1, 3)
    (tmp_path / "broken.ipynb").write_text("{")
    assert grade.grade(tmp_path / "broken.ipynb", assignment=given).points == 3
    with pytest.raises(ValueError, match="assignment"):
        grade.grade(handed_in, assignment=tmp_path / "broken.ipynb")
