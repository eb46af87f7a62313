"""Exercises in which the reader writes a kernel's test inputs: each bug is one, and what is said of those left over helps."""

import bisect
import itertools
import random

import pytest

from optinfer.course import checks, exercises
from optinfer.course.exercise import Draw, Refused, source_of
from optinfer.course.exercises import testing
from optinfer.course.exercises.planted_bugs import NO_CHANGE, STEPS
from tests.course import readers

pytest.importorskip("triton")

# What a right kernel promises beyond the values allowed.
ALLOWED = {"attention.flash_inputs": lambda one: one["kv_len"] >= one["q_len"] or not one["causal"]}
WEAK = [reader for reader in readers.every() if exercises.get(reader.id) in testing.EXERCISES]


def planted(exercise):
    """The kernel and bugs that an exercise judges by."""
    return exercise.run.__self__


def caught(exercise, inputs):
    """The names of the kernels that these inputs catch."""
    cases = exercise.cases(Draw(0))
    return {c.label for c in cases if planted(exercise).run(lambda: inputs, *c.args) != "not caught"}


def bugs(exercise):
    return {bug.name for bug in planted(exercise).bugs}


def drawn(exercise, draw):
    """Inputs drawn from all that is allowed."""
    one = {name: draw.choice(list(values)) for name, values in planted(exercise).fields.items()}
    fine = planted(exercise).steps(one) <= STEPS and ALLOWED.get(exercise.id, lambda one: True)(one)
    return one if fine else drawn(exercise, draw)


def fitting(exercise, inputs):
    """As many of the inputs, from the first on, as one answer may hold."""
    steps = list(itertools.accumulate(map(planted(exercise).steps, inputs)))
    return inputs[: bisect.bisect(steps, STEPS)]


@pytest.mark.parametrize("exercise", testing.EXERCISES, ids=lambda e: e.id)
def test_each_bug_is_one_and_each_input_of_the_solution_is_needed(exercise):
    inputs = exercise.solution()
    assert len(bugs(exercise)) >= 10
    source = source_of(planted(exercise).kernel)
    assert all(source.count(old) == 1 for bug in planted(exercise).bugs for old, _ in bug.edits)
    assert caught(exercise, inputs) == bugs(exercise)
    for i in range(len(inputs)):
        assert caught(exercise, inputs[:i] + inputs[i + 1 :]) < bugs(exercise)


@pytest.mark.parametrize("exercise", testing.EXERCISES, ids=lambda e: e.id)
def test_the_right_kernel_survives_what_is_drawn(exercise):
    draw = random.Random(5)
    for _ in range(20):
        inputs = fitting(exercise, [drawn(exercise, draw) for _ in range(draw.randrange(1, 4))])
        assert planted(exercise).run(lambda inputs=inputs: inputs, NO_CHANGE) == "not caught", inputs


@pytest.mark.parametrize("reader", WEAK, ids=lambda reader: f"{reader.id}-{reader.belief}")
def test_what_weak_inputs_leave_over_is_named_with_a_question(reader):
    exercise = exercises.get(reader.id)
    result = checks.evaluate(exercise, reader.answer)
    left = bugs(exercise) - caught(exercise, reader.answer())
    assert not result.passed and left
    count = len(bugs(exercise)) + 1
    for bug in planted(exercise).bugs:
        assert (bug.name in result.message) == (bug.name in left), result.message
        assert (bug.meaning in result.message) >= (bug.name in left), result.message
    assert f"of {count} kernels judged rightly" in result.message
    assert len(result.message) < 3000


def test_an_input_on_which_the_right_kernel_fails_is_no_test():
    exercise = exercises.get("attention.flash_inputs")
    blind = {**exercise.solution()[0], "q_len": 3, "kv_len": 2}
    for inputs in ([blind], [*exercise.solution(), blind]):
        result = checks.evaluate(exercise, lambda inputs=inputs: inputs)
        assert not result.passed and "Has every query a key to see?" in result.message
        assert f"caught by input {len(inputs)}" in result.message
    assert caught(exercise, [blind]) == {"the right kernel"}


def test_what_is_no_input_is_refused_by_name():
    exercise = exercises.get("attention.flash_inputs")
    good = exercise.solution()[0]
    for bad, words in (
        (None, "Return a list of 1 to 6 inputs, not None."),
        ([], "Return a list of 1 to 6 inputs, not []."),
        ([good] * 7, "Return a list of 1 to 6 inputs, not ["),
        ([good, 3], "Input 2 must be a dict with the keys q_len, kv_len, kv_heads, group, causal, scores, not 3."),
        ([{"q_len": 3}], "Input 1 must be a dict with the keys"),
        ([good, {**good, "q_len": 0}], "q_len of input 2 must be a whole number from 1 to 48, not 0."),
        ([{**good, "kv_len": 4096}], "kv_len of input 1 must be a whole number from 1 to 48, not 4096."),
        ([{**good, "kv_len": 8.0}], "kv_len of input 1 must be a whole number from 1 to 48, not 8."),
        ([{**good, "causal": 1}], "causal of input 1 must be False or True, not 1."),
        ([{**good, "group": True}], "group of input 1 must be a whole number from 1 to 3, not True."),
        (
            [{**good, "q_len": 17}, {**good, "q_len": 48}],
            "Your inputs take 16 + 24 steps of the loop; at most 32 are allowed.",
        ),
    ):
        result = checks.evaluate(exercise, lambda bad=bad: bad)
        assert not result.passed and result.attempted and words in result.message, result.message
        with pytest.raises(Refused):
            planted(exercise).inputs(bad)
