"""Every exercise: its solution passes, its wrong answers are recognized, and no shortcut passes."""

import copy
import importlib
import inspect

import pytest
import torch

import optinfer
from optinfer.course import checks, exercises
from optinfer.course.exercise import Draw, plain

EVERY = exercises.every()
FAST = [e for e in EVERY if not e.model]
MODEL = [e for e in EVERY if e.model]
WRONG = [(e, w) for e in EVERY for w in e.wrong]


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


@pytest.mark.thorough
@pytest.mark.parametrize("exercise", MODEL, ids=_ids)
def test_the_solution_makes_the_real_model_talk(exercise):
    result = checks.evaluate(exercise, exercise.solution)
    assert result.passed, result.message
    assert "the model says" in result.message


@pytest.mark.parametrize(("exercise", "wrong"), WRONG, ids=lambda v: getattr(v, "id", None) or v.name)
def test_a_wrong_answer_is_rejected_by_name(exercise, wrong):
    """On the small inputs already, without the real model; the message shows an input, both results, and the misconception."""
    result = checks.evaluate(exercise, exercise.wrong_answer(wrong))
    assert not result.passed
    assert result.score == 0
    assert result.misconception == wrong.name, result.message
    assert f": {wrong.name}. {wrong.meaning}" in result.message
    assert ("This usually means: " in result.message) or "may or may not be yours" in result.message
    for part in (f"{exercise.noun.capitalize()}: ", "Expected: ", "Difference: ", "Stuck? "):
        assert part in result.message
    assert "Traceback" not in result.message
    assert len(result.message) < 3000


@pytest.mark.parametrize("exercise", EVERY, ids=_ids)
def test_misconceptions_are_told_apart_and_explained(exercise):
    names = [wrong.name for wrong in exercise.wrong]
    assert len(set(names)) == len(names) >= 3
    for wrong in exercise.wrong:
        assert wrong.meaning.endswith((".", "`.")) and len(wrong.meaning) > 15, wrong
        assert wrong.name[0] != wrong.name[0].upper() or not wrong.name[0].isalpha() or wrong.name[:2] in ("Na",), wrong


@pytest.mark.parametrize("exercise", EVERY, ids=_ids)
def test_a_wrong_answer_is_rejected_whatever_the_seed(exercise):
    for wrong in exercise.wrong:
        assert not checks.evaluate(exercise, exercise.wrong_answer(wrong), seed=77).passed, wrong.name


# ------------------------------------------------------------------------------------------------------ shortcuts
def small_inputs(exercise):
    return [c for c in exercise.cases(Draw(0)) if not c.slow]


@pytest.mark.parametrize("exercise", EVERY, ids=_ids)
def test_an_empty_body_does_not_pass(exercise):
    for body in ("pass", "return 0", "return True", "return []"):
        empty = exercise.stub.replace("# YOUR CODE HERE", "").replace("raise NotImplementedError()", body)
        try:
            answer = exercise.compiled(empty)
        except SyntaxError:
            continue
        assert not checks.evaluate(exercise, answer).passed, body


def what_the_solution_returned(exercise):
    """What the solution's function returned at its first call on each of the small inputs."""
    returned = []

    def recorder(*args, **kwargs):
        value = exercise.solution(*args, **kwargs)
        calls.append(value.detach() if isinstance(value, torch.Tensor) else copy.deepcopy(value))
        return value

    for c in small_inputs(exercise):
        calls = []
        exercise.run(recorder, *c.args) if exercise.run else recorder(*c.args)
        returned += calls[:1]
    return returned


def is_function(exercise):
    return not isinstance(exercise.answer, type) and plain(exercise.answer) is exercise.answer


@pytest.mark.parametrize("exercise", [e for e in EVERY if is_function(e)], ids=_ids)
def test_inputs_and_constants_are_no_answers(exercise):
    for k in range(4):
        assert not checks.evaluate(exercise, lambda *a, k=k: a[k] if k < len(a) else None).passed, f"input {k}"
    assert not checks.evaluate(exercise, lambda *a: a).passed
    if not inspect.signature(exercise.answer).parameters:
        return  # what has no arguments returns a constant
    for constant in what_the_solution_returned(exercise):
        assert not checks.evaluate(exercise, lambda *a, c=constant: copy.deepcopy(c)).passed, constant


@pytest.mark.parametrize("exercise", EVERY, ids=_ids)
def test_what_is_no_function_is_refused(exercise):
    assert not checks.evaluate(exercise, 3).passed
    assert not checks.evaluate(exercise, None).passed


def through(function):
    """Another function that calls it; for a class, another class made from it; a kernel as it is."""
    if isinstance(function, type):
        return type(function.__name__, (function,), {})
    return function if plain(function) is not function else lambda *args: function(*args)


@pytest.mark.parametrize("exercise", EVERY, ids=_ids)
def test_calling_the_courses_own_answer_is_a_shortcut(exercise):
    for answer in (exercise.answer, through(exercise.answer)):
        result = checks.evaluate(exercise, answer)
        assert not result.passed and "must not be called" in result.message
    if exercise.reference is not None and exercise.run is None:
        assert not checks.evaluate(exercise, lambda *args: exercise.reference(*args)).passed


PACKAGE = {
    "quantization.absmax": lambda x: optinfer.quantization.quantize_int8(x.float().view(1, -1)),
    "quantization.pack_nibbles": lambda codes: optinfer.quantization.formats.tensor.pack_bits(codes, 4),
    "quantization.unpack_nibbles": lambda packed, n: optinfer.quantization.formats.tensor.unpack_bits(packed, 4, n),
    "quantization.groups": lambda w, g: optinfer.quantization.quantize_linear(w, 4, g, True),
    "quantization.nf4_levels": lambda offset=0.9677083: optinfer.quantization.nf4_from_quantiles(offset),
    "quantization.nf4_quantize": lambda w, b, levels: optinfer.quantization.quantize_4bit(w.view(1, -1), "nf4", b),
    "quantization.llm_int8": lambda x, w, t=6.0: optinfer.quantization.int8_matmul(
        x, optinfer.quantization.quantize_int8(w), t
    ),
    "quantization.in_the_model": lambda w, b, levels: optinfer.quantization.quantize_4bit(w, "nf4", b),
    "calibrated.gptq": lambda w, h: optinfer.quantization.gptq_quantize(w.float(), h.float(), 4, w.shape[1]),
    "calibrated.straight_through": lambda x, scale: optinfer.quantization.fake_quantize(x, 4, 32),
    "attention.grouped_heads": lambda q, k, v: optinfer.attention.flash_attention(q[None], k[None], v[None])[0],
    "attention.tiled": lambda q, k, v, block: optinfer.attention.flash_attention(
        q[None, None], k[None, None], v[None, None], causal=True
    ).flatten(0, 2),
    "attention.in_the_model": lambda q, k, v, scale: optinfer.attention.flash_attention(
        q, k, v, causal=True, scale=scale
    ),
    "speculative.expected_tokens": lambda alpha, gamma: optinfer.speculative.expected_tokens(alpha, gamma),
    "speculative.rejection_sample": lambda draft, q, p, u, last: optinfer.speculative.rejection_sample(draft, q, p),
    "speculative.prompt_lookup": lambda tokens, n, k: optinfer.speculative.PromptLookupDraft(n),
    "kv_cache.allocate": lambda free, n, size: optinfer.kv_cache.BlockManager(len(free), size),
}


@pytest.mark.parametrize("id", PACKAGE)
def test_calling_the_package_is_a_shortcut(id):
    importlib.import_module("optinfer.quantization.formats.tensor")
    result = checks.evaluate(exercises.get(id), PACKAGE[id])
    assert not result.passed and "must not be called" in result.message, result.message


@pytest.mark.parametrize("exercise", EVERY, ids=_ids)
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


@pytest.mark.parametrize("exercise", EVERY, ids=_ids)
def test_cases_are_drawn_alike_twice_and_vary(exercise):
    once, twice = (list(exercise.cases(Draw(3))) for _ in range(2))
    slow = [c.slow for c in once]
    assert slow == sorted(slow), "the real model comes last"
    assert any(slow) == exercise.model
    assert [c.label for c in once] == [c.label for c in twice]
    assert len(once) >= 3
    assert len({c.label for c in once}) == len(once)


def test_there_are_enough():
    assert len(EVERY) >= 40
    assert sum(len(e.wrong) for e in EVERY) >= 120
    for chapter in exercises.CHAPTERS[1:]:
        assert len(exercises.of_chapter(chapter.prefix)) >= 6, chapter.prefix
    assert len({e.id for e in EVERY}) == len(EVERY)


torch.set_num_threads(1)
