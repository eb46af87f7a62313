"""The memory check names program, tensor and line, and rejects kernels that happen to give the right answer."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from optinfer.course.checks import evaluate
from optinfer.course.exercise import Wrong
from optinfer.course.exercises.attention import TRITON_FLASH, TRITON_SOFTMAX
from optinfer_kernels.interpreter import launch
from optinfer_kernels.memory_check import memory_check


@triton.jit
def double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, STEP: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=(at < n) | READ)
    tl.store(out_ptr + at, 2 * x, mask=(at < n) | WRITE)


def run(n=40, block=16, step=16, read=False, write=False, seed=0):
    x, out = torch.arange(float(n)), torch.full((n,), -1.0)
    with memory_check(seed) as report:
        launch(double_kernel, (3,), x, out, n, BLOCK=block, READ=read, WRITE=write, STEP=step)
    return report, torch.equal(out, 2 * x)


def test_a_correct_kernel_passes_in_any_order():
    for seed in range(10):
        report, right = run(seed=seed)
        assert right and not report and str(report) == "no findings"


@pytest.mark.parametrize("what, text", [
    ({"read": True}, "program (2, 0, 0) reads 8 numbers beyond x_ptr"),
    ({"write": True}, "program (2, 0, 0) writes 8 numbers beyond out_ptr"),
])  # fmt: skip
def test_what_lies_beyond(what, text):
    report, right = run(**what)
    assert right and text in str(report)
    finding = report.findings[0]
    assert finding.code.startswith("x = tl.load" if "read" in what else "tl.store")
    assert f", line {finding.line}: " in str(report)


def test_programs_that_write_the_same_numbers():
    report, right = run(step=15)
    assert not right or report
    assert "numbers of out_ptr that program" in str(report)


@triton.jit
def chain_kernel(x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x_ptr + at - BLOCK, mask=at >= BLOCK, other=0.0)
    tl.store(x_ptr + at, before + 1)


def test_programs_that_read_what_another_wrote():
    """Right only in one order, which the interpreter without the check happens to take."""
    x = torch.zeros(64)
    launch(chain_kernel, (4,), x, BLOCK=16)
    assert x[-1] == 4
    with memory_check() as report:
        launch(chain_kernel, (4,), torch.zeros(64), BLOCK=16)
    assert "reads 16 numbers of x_ptr that program" in str(report)


def test_atomics_may_meet_and_nothing_stays_patched():
    from triton.runtime import interpreter

    before = dict(vars(interpreter.InterpreterBuilder))
    x = torch.zeros(1)

    @triton.jit
    def count(x_ptr):
        tl.atomic_add(x_ptr, 1.0)

    with memory_check() as report:
        launch(count, (5,), x)
    assert x.item() == 5 and not report
    assert dict(vars(interpreter.InterpreterBuilder)) == before


# ---- the exercises ----------------------------------------------------------------------------------------------


def variant(exercise, change):
    """The solution of an exercise with its source changed."""
    edits = change if isinstance(change[0], tuple) else (change,)
    return exercise.wrong_answer(Wrong("changed", "", *edits))


OTHERS_ROWS = ("out_ptr + rows[:, None] * DIM", "out_ptr + (rows[:, None] // 2) * DIM")
NO_LOAD_MASKS = (
    ("q = tl.load(q_ptr + rows[:, None] * DIM + dims[None, :], mask=rows[:, None] < length, other=0.0)",
     "q = tl.load(q_ptr + rows[:, None] * DIM + dims[None, :])"),
    *((f"{x} = tl.load({x}_ptr + columns[:, None] * DIM + dims[None, :], mask=columns[:, None] < length, other=0.0)",
       f"{x} = tl.load({x}_ptr + columns[:, None] * DIM + dims[None, :])") for x in "kv"),
)  # fmt: skip
WRONG = [
    (TRITON_FLASH, NO_LOAD_MASKS),
    (TRITON_FLASH, ("mask=rows[:, None] < length, other=0.0", "mask=rows[:, None] < 1000000, other=0.0")),
    (TRITON_FLASH, OTHERS_ROWS),
    (TRITON_SOFTMAX, ("mask=offsets < columns, other", "mask=offsets < BLOCK, other")),
    (TRITON_SOFTMAX, ("axis=0), mask=offsets < columns)", "axis=0), mask=offsets < BLOCK)")),
]
RIGHT = [(TRITON_FLASH, ("-1e30", "-2e30")), (TRITON_SOFTMAX, ("weights = tl", "weights =  tl"))]


def verdicts(exercise, change, seeds):
    return [evaluate(exercise, variant(exercise, change), seed).passed for seed in range(seeds)]


@pytest.mark.parametrize("exercise, change", WRONG)
def test_wrong_kernels_are_rejected(exercise, change):
    assert verdicts(exercise, change, 1) == [False]


@pytest.mark.parametrize("exercise, change", RIGHT)
def test_the_solution_is_accepted(exercise, change):
    assert verdicts(exercise, change, 1) == [True]


@pytest.mark.slow
@pytest.mark.parametrize("exercise, change", [*WRONG, *RIGHT])
def test_always(exercise, change):
    assert verdicts(exercise, change, 20) == [(exercise, change) in RIGHT] * 20
