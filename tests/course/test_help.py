"""Checks, hints, solutions and progress, as a reader meets them."""

import json
import subprocess
import sys

import pytest
import torch

import optinfer
from optinfer.course import checks, exercises, records


@pytest.fixture(autouse=True)
def _own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTINFER_PROGRESS", str(tmp_path / "deep" / "folder"))


def test_a_check_never_raises():
    def explodes(*args):
        raise MemoryError("boom")

    def leaves(*args):
        raise SystemExit

    for answer in (None, 3, "text", explodes, leaves, lambda: 0, lambda x: x.no_such, int, torch.nn.Linear):
        result = optinfer.check("quantization.absmax", answer)
        assert not result and "quantization.absmax" in repr(result)
        assert result._repr_html_().startswith("<div")
    assert "quantization.absmax" in repr(optinfer.check("quantization.absmaks", None))


def test_an_endless_answer_is_stopped(monkeypatch):
    exercise = exercises.get("quantization.absmax")
    object.__setattr__(exercise, "limit", 0.3)
    try:
        result = checks.evaluate(exercise, lambda x: [None for _ in iter(int, 1)])
    finally:
        object.__setattr__(exercise, "limit", 10.0)
    assert not result and "still running" in result.message


def test_forbidden_functions_are_found_however_they_are_called():
    import torch.nn.functional as F

    for cheat in (lambda s: s.softmax(-1), lambda s: torch.softmax(s, -1), lambda s: F.softmax(s, dim=-1)):
        result = checks.evaluate(exercises.get("attention.stable_softmax"), cheat)
        assert not result and "must not be called" in result.message


def test_the_packages_own_functions_are_no_answer():
    from optinfer.speculative import expected_tokens

    result = checks.evaluate(exercises.get("speculative.expected_tokens"), lambda a, g: expected_tokens(a, g))
    assert not result and "must not be called" in result.message
    result = checks.evaluate(exercises.get("speculative.expected_tokens"), expected_tokens)
    assert not result


def test_misconceptions_are_recognized_in_other_peoples_code():
    def loop(x):  # truncation, written in another way
        scale = max(abs(float(v)) for v in x.float().flatten()) / 127
        codes = [int(float(v) / scale) if scale else 0 for v in x.float().flatten()]
        return torch.tensor(codes, dtype=torch.int8).reshape(x.shape), torch.tensor(scale)

    assert (
        checks.evaluate(exercises.get("quantization.absmax"), loop).misconception == "cutting off instead of rounding"
    )

    def low_first(codes):
        codes = codes.tolist() + [0] * (len(codes) % 2)
        return torch.tensor([a + 16 * b for a, b in zip(codes[::2], codes[1::2])], dtype=torch.uint8)

    assert (
        checks.evaluate(exercises.get("quantization.pack_nibbles"), low_first).misconception
        == "the first code in the low half"
    )

    def top_left(q_len, kv_len):
        return torch.ones(q_len, kv_len).tril().bool()

    assert checks.evaluate(exercises.get("attention.causal_mask"), top_left).misconception == "aligned at the top left"


def test_without_triton_its_exercises_say_what_is_missing():
    script = """
import sys
sys.modules["triton"] = None
from optinfer.course import checks, exercises
for id in ("attention.triton_softmax", "attention.flash_inputs"):
    exercise = exercises.get(id)
    print(checks.evaluate(exercise, exercise.solution))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("TritonMissing: this needs Triton, which is not installed here") == 2, (
        done.stdout + done.stderr
    )
    assert done.stdout.count("Something that this exercise needs is not installed here.") == 2
    assert "must not be called" not in done.stdout


def test_changing_the_input_is_noticed():
    def in_place(p, q):
        torch.minimum(p, q, out=p)
        return p.sum(-1)

    result = checks.evaluate(exercises.get("speculative.acceptance"), in_place)
    assert not result and "was changed on the way" in result.message


def test_hints_climb_and_progress_survives(capsys):
    first, second = optinfer.hint("basics.roofline"), optinfer.hint("basics.roofline")
    assert "nudge" in repr(first) and "idea" in repr(second)
    assert "almost" in repr(optinfer.hint("basics.roofline")) and "almost" in repr(optinfer.hint("basics.roofline"))
    assert "1 to 3" in repr(optinfer.hint("basics.roofline", 9))
    assert "def attainable" in repr(optinfer.solution("basics.roofline"))
    exercise = exercises.get("basics.roofline")
    optinfer.check(exercise.id, lambda *a: 0)
    assert optinfer.check(exercise.id, exercise.solution)
    entry = json.loads(records.path().read_text())[exercise.id]
    assert entry["tries"] == 2 and entry["solved"] and entry["hints"] == 3
    assert "1/" in repr(optinfer.progress())


def test_a_damaged_progress_file_is_no_obstacle():
    records.path().parent.mkdir(parents=True)
    for damage in ("", "[1, 2]", '{"basics.roofline": 3}', "{"):
        records.path().write_text(damage)
        assert "points" in repr(optinfer.progress())
        optinfer.hint("basics.roofline")


def test_under_nbgrader_a_failed_check_raises(monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    with pytest.raises(AssertionError, match=r"quantization\.absmax"):
        optinfer.check("quantization.absmax", lambda x: x)


def test_form_is_reported_before_value():
    from optinfer.course.compare import difference

    expected = (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]))
    got = (torch.tensor([1, 3]), torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert difference(expected, got, 0, 0).kind == "dtype"
    assert difference(expected, got, 0, 0, dtypes=False).kind == "value"
    assert difference({"free": [1]}, {"free": [1, 2]}, 0, 0).text.startswith("`free` has 2 items")


def test_a_right_result_by_way_of_a_changed_input_is_no_misconception():
    def in_place(running, needed, free_blocks):
        gone = []
        while free_blocks < needed and len(running) > 1:
            name, held = running.pop()
            gone.append(name)
            free_blocks += held
        return gone

    result = checks.evaluate(exercises.get("serving.preempt"), in_place)
    assert not result and result.misconception is None and "work on a copy" in result.message


def test_one_of_several_mistakes_is_recognized():
    """Where it explains at least half of the inputs that fail; below that it may be another mistake altogether."""

    def quantize(x, low, high, shift, scale_of_nothing=0.0):
        scale = (high - low) / 255
        if scale == 0:
            return torch.zeros_like(x, dtype=torch.uint8), scale + scale_of_nothing, torch.tensor(0)
        zero = (-low / scale).round()
        codes = ((x / scale).round() + zero).clamp(0, 255)
        return codes.to(torch.uint8) + shift, scale, zero.long()

    def range_and_nothing(x):  # the range is not widened to hold 0; and nothing but zeros has another scale
        x = x.float()
        return quantize(x, x.min(), x.max(), 0, scale_of_nothing=1.0)

    def range_and_all(x):
        x = x.float()
        return quantize(x, x.min(), x.max(), 1)

    exercise = exercises.get("quantization.zero_point")
    result = checks.evaluate(exercise, range_and_nothing)
    assert result.misconception == "a range that does not hold zero"
    assert "common mistake" in result.message and "far from zero" in result.message
    assert checks.evaluate(exercise, range_and_all).misconception is None


def test_an_error_names_the_readers_line():
    result = checks.evaluate(exercises.get("speculative.expected_tokens"), lambda alpha, gamma: 1 / (gamma - gamma))
    assert "ZeroDivisionError" in result.message and "1 / (gamma - gamma)" in result.message


def test_the_real_model_waits_for_the_small_inputs(monkeypatch):
    from optinfer.course.exercises import real_model

    monkeypatch.setattr(real_model, "default_model", lambda *a: pytest.fail("the model was loaded"))
    exercise = exercises.get("attention.in_the_model")
    result = checks.evaluate(exercise, lambda q, k, v, scale: torch.zeros_like(q))
    assert not result and "comes after the small inputs" in result.message


def test_forbidden_functions_are_named_in_the_task():
    for exercise in exercises.every():
        for name in exercise.forbidden:
            assert f"`{name}`" in exercise.task.removeprefix(exercise.spec)
