"""Every exercise: its solution passes, its wrong answers are recognized, and no shortcut passes."""

import time

import pytest
import torch

from optinfer.course import checks, exercises
from optinfer.course.exercise import Draw

EVERY = exercises.every()
FAST = [e for e in EVERY if not e.model]
WRONG = [(e, w) for e in FAST for w in e.wrong]


@pytest.fixture(autouse=True)
def _own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTINFER_PROGRESS", str(tmp_path))


def _ids(exercise):
    return exercise.id


@pytest.mark.parametrize("exercise", FAST, ids=_ids)
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_solution_passes(exercise, seed):
    result = checks.evaluate(exercise, exercise.solution, seed)
    assert result.passed, result.message
    assert result.score == exercise.points


@pytest.mark.parametrize(("exercise", "wrong"), WRONG, ids=lambda v: getattr(v, "id", None) or v.name)
def test_a_wrong_answer_is_rejected_by_name(exercise, wrong):
    result = checks.evaluate(exercise, exercise.wrong_answer(wrong))
    assert not result.passed
    assert result.score == 0
    assert result.misconception == wrong.name, result.message
    assert wrong.name in result.message and wrong.meaning.split("\n")[0] in result.message
    assert "Traceback" not in result.message


@pytest.mark.parametrize("exercise", FAST, ids=_ids)
def test_a_wrong_answer_is_rejected_whatever_the_seed(exercise):
    for wrong in exercise.wrong:
        assert not checks.evaluate(exercise, exercise.wrong_answer(wrong), seed=77).passed, wrong.name


@pytest.mark.parametrize("exercise", FAST, ids=_ids)
def test_shortcuts_are_rejected(exercise):
    first = next(iter(exercise.cases(Draw(0))))
    constant = exercise.expected(*first.args)
    for answer in (
        lambda *a, **k: a[0] if a else None,
        lambda *a, **k: a,
        lambda *a, **k: constant,
        lambda *a, **k: None,
    ):
        assert not checks.evaluate(exercise, answer).passed
    assert not checks.evaluate(exercise, 3).passed


@pytest.mark.parametrize("exercise", FAST, ids=_ids)
def test_calling_the_courses_own_answer_is_a_shortcut(exercise):
    if exercise.run is None:
        result = checks.evaluate(exercise, lambda *args: exercise.answer(*args))
        assert not result.passed and "must not be called" in result.message
        if exercise.reference is not None:
            assert not checks.evaluate(exercise, lambda *args: exercise.reference(*args)).passed


@pytest.mark.parametrize("exercise", FAST, ids=_ids)
def test_the_stub_is_not_started(exercise):
    result = checks.evaluate(exercise, exercise.compiled(exercise.stub))
    assert not result.passed and not result.attempted
    assert "Not started" in result.message


@pytest.mark.parametrize("exercise", EVERY, ids=_ids)
def test_front_matter(exercise):
    assert exercise.id.split(".")[0] in {c.prefix for c in exercises.CHAPTERS}
    assert 1 <= exercise.difficulty <= 5 and 3 <= exercise.minutes <= 90
    assert len(exercise.hints) == 3 and all(exercise.hints)
    assert len(exercise.wrong) >= 3
    assert len({w.name for w in exercise.wrong}) == len(exercise.wrong)
    assert exercise.spec.strip() and exercise.title
    for needed in exercise.prerequisites:
        assert EVERY.index(exercises.get(needed)) < EVERY.index(exercise)
    assert "NotImplementedError" in exercise.stub
    assert exercise.marked.count("BEGIN SOLUTION") == exercise.stub.count("NotImplementedError")
    for wrong in exercise.wrong:
        assert wrong.source(exercise.source) != exercise.source


@pytest.mark.parametrize("exercise", FAST, ids=_ids)
def test_cases_are_drawn_alike_twice_and_vary(exercise):
    once, twice = (list(exercise.cases(Draw(3))) for _ in range(2))
    assert [c.label for c in once] == [c.label for c in twice]
    assert len(once) >= 3
    assert len({c.label for c in once}) == len(once)


def test_there_are_enough():
    assert len(EVERY) >= 40
    assert sum(len(e.wrong) for e in EVERY) >= 120
    for chapter in exercises.CHAPTERS[1:]:
        assert len(exercises.of_chapter(chapter.prefix)) >= 6, chapter.prefix
    assert len({e.id for e in EVERY}) == len(EVERY)


def test_checks_answer_fast():
    slow = {}
    for exercise in FAST:
        start = time.perf_counter()
        checks.evaluate(exercise, exercise.solution)
        slow[exercise.id] = time.perf_counter() - start
    print({k: round(v, 2) for k, v in sorted(slow.items(), key=lambda item: -item[1])[:5]})


torch.set_num_threads(1)
