"""Wrong answers that readers give, not edits of our solutions: each is rejected, and no message leads astray."""

import os
import subprocess
import sys

import pytest

from optinfer.course import checks, exercises
from tests.course import readers

READERS = readers.every()


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: f"{reader.id}-{reader.belief}")
def test_a_readers_wrong_answer(reader):
    result = checks.evaluate(exercises.get(reader.id), reader.answer)
    assert not result.passed
    assert result.misconception == reader.misconception, result.message
    for words in reader.never:
        assert words not in result.message, result.message


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: f"{reader.id}-{reader.belief}")
def test_a_readers_wrong_answer_is_rejected_whatever_the_seed(reader):
    assert not checks.evaluate(exercises.get(reader.id), reader.answer, seed=77).passed


@pytest.mark.parametrize("exercise", exercises.every(), ids=lambda exercise: exercise.id)
def test_three_readers_tried_each_exercise(exercise):
    assert len([reader for reader in READERS if reader.id == exercise.id]) >= 3


def test_one_factor_is_named_only_where_all_inputs_have_it():
    exercise = exercises.get("basics.roofline")
    assert "is 2 times the expected one" in checks.evaluate(exercise, lambda i, p, b: 2 * min(p, i * b)).message
    assert "times the expected one" not in checks.evaluate(exercise, lambda i, p, b: (p + i * b) / 2).message


def test_a_plain_script_shows_what_was_found(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "from optinfer import check\n"
        "def kv_bytes_per_token(layers, hidden_size, heads, kv_heads, itemsize):\n"
        "    return layers * kv_heads * hidden_size // heads * itemsize\n"
        "check('kv_cache.bytes_per_token', kv_bytes_per_token)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert "This usually means: keys without values" in done.stdout, done.stderr


def test_a_plain_script_shows_hints_and_solutions_once(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(
        "from optinfer import hint, solution\n"
        "hint('basics.roofline')\n"
        "hint('basics.roofline', 3)\n"
        "hint('basics.roofing')\n"
        "solution('basics.roofline')\n"
    )
    environment = {**os.environ, "OPTINFER_PROGRESS": str(tmp_path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    for said in ("a nudge (1 of 3)", "almost the code (3 of 3)", "No such exercise", "def attainable"):
        assert done.stdout.count(said) == 1, done.stdout + done.stderr
