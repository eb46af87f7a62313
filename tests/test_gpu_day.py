"""The day's command: what is right is not done again, what hangs costs one step, and what failed is named with its command."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from optinfer.bench import gpu_checks, gpu_day
from optinfer.bench.gpu_day import Day, Step

RIGHT = Step("right", 60, ("platform",))
FAILS = Step("fails", 60, ("no_such_module",))
HANGS = Step("hangs", 1.0, ("timeit", "-n1", "-r1", "import time; time.sleep(60)"))
MISSING = Step("missing", 60, ("platform",), "no-such-program --flag")


def test_each_step_is_written_and_only_what_is_not_right_is_done_again(tmp_path):
    day = Day(tmp_path, minutes=5)
    assert not day.run([RIGHT, FAILS, HANGS, MISSING])
    found = json.loads((tmp_path / "day.json").read_text())
    outcomes = {name: entry["outcome"] for name, entry in found.items()}
    assert outcomes == {
        "right": "right", "fails": "failed with code 1", "hangs": "cut after 1 s", "missing": "not here"
    }  # fmt: skip
    summary = (tmp_path / "summary.md").read_text()
    assert f"{sys.executable} -m no_such_module" in summary and "No module named no_such_module" in summary
    again = Day(tmp_path, minutes=5)
    assert again.done == found
    again.done["right"]["seconds"] = -1.0  # would be overwritten if it ran
    again.run([RIGHT, FAILS])
    assert again.done["right"]["seconds"] == -1.0 and again.done["fails"]["outcome"].startswith("failed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day.json", "summary.md"]


def test_the_minutes_are_kept(tmp_path):
    now = [0.0]
    day = Day(tmp_path, minutes=1, clock=lambda: now[0])
    now[0] = 50.0
    assert day.run([RIGHT])
    assert day.done["right"]["outcome"] == "no time"
    with pytest.raises(ValueError, match="minutes must be positive"):
        Day(tmp_path, minutes=0)


def test_every_step_can_be_called_and_leaves_few_files(tmp_path):
    steps = gpu_day.steps(tmp_path)
    assert [s.name for s in steps[:3]] == ["doctor", "kernels", "engine"]  # right before fast
    for step in steps:
        if "--step" in step.arguments:
            assert step.arguments[step.arguments.index("--step") + 1] in gpu_day.WORK
    assert len(gpu_day.SUITES) + 2 <= 8


def test_the_engine_check_passes_and_can_fail(monkeypatch):
    rows = gpu_checks.engine(torch.device("cpu"))
    assert all(row["same texts"] == row["of"] for row in rows)

    def zeros(self, ids, **options):
        return torch.cat([ids, torch.zeros(1, 16, dtype=ids.dtype)], dim=1)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", zeros)
    with pytest.raises(AssertionError, match="4 of 4 texts differ"):
        gpu_checks.engine(torch.device("cpu"))


def test_the_kernel_check_can_fail(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_checks, "_attention", lambda device, dtype: [])
    monkeypatch.setattr(gpu_checks, "_paged", lambda device, dtype: [])
    assert gpu_checks.kernels(torch.device("cpu"))
    row = {"kernel": "k", "case": "c", "error": float("nan"), "bound": 1.0}
    monkeypatch.setattr(gpu_checks, "_products", lambda device, dtype: [row])
    with pytest.raises(AssertionError, match="beyond rounding: k c"):
        gpu_checks.kernels(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("card", ["h100", "t4"])
def test_rehearsed_on_a_pretended_card(card, tmp_path, monkeypatch):
    """The first steps, as on the day: each in a process that pretends."""
    monkeypatch.setenv("PRETEND_GPU", card)
    monkeypatch.setenv("OPTINFER_DAY_PYTHON", f"{sys.executable} -m tests.pretend_gpu")
    monkeypatch.chdir(Path(__file__).parents[1])
    wanted = [
        step for step in gpu_day.steps(tmp_path) if step.name in ("doctor", "kernels", "engine", "paged_attention")
    ]
    wanted = [Step(step.name, 600, step.arguments) for step in wanted]
    day = Day(tmp_path, minutes=30, quick=True)
    assert day.run(wanted), day.summary()
    assert {entry["outcome"] for entry in day.done.values()} == {"right"}
