"""The figure of a kernel's lines: it holds what the emulator counted, and its JavaScript draws that."""

import inspect
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from optinfer.widgets.kernel_profile import MEASURES, KernelProfile
from optinfer_kernels import flash_attention as attention_kernel
from optinfer_kernels import quantized_matmul_fast
from optinfer_kernels.emulator import Run, emulate
from tests.javascript import NODE, needs_node

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing compiles with TRITON_INTERPRET"),
]


@pytest.fixture(scope="module")
def run() -> Run:
    q, k, v = (torch.randn(1, 1, 40, 64, device="cpu").half() for _ in range(3))
    with emulate(90, check=False) as gpu:
        attention_kernel.flash_attention(q, k, v, causal=True)
    return gpu.runs[-1]


@pytest.fixture(scope="module")
def widget(run: Run) -> KernelProfile:
    return KernelProfile.of(run, attention_kernel.__file__)


def test_every_line_has_its_code_and_counts(run: Run, widget: KernelProfile) -> None:
    code = Path(attention_kernel.__file__).read_text(encoding="utf-8").splitlines()
    assert all(line["code"] == code[line["number"] - 1] for line in widget.lines)
    totals = run.totals()
    for measure in MEASURES:
        assert 0.95 * getattr(totals, measure) <= widget.total(measure) <= getattr(totals, measure), measure
    assert sum(line["sectors"][0] for line in widget.lines) == totals.sectors  # no load stands elsewhere
    assert all(sum(n for _, n in line["classes"]) == line["instructions"][0] for line in widget.lines)


def test_whole_functions_are_shown(widget: KernelProfile) -> None:
    lines, first = inspect.getsourcelines(attention_kernel.flash_attention_kernel.fn)
    numbers = {line["number"] for line in widget.lines}
    assert set(range(first + 1, first + len(lines))) <= numbers  # without the decorator
    assert "sm_90" in widget.summary() and f"{widget.total('sectors'):,} sectors" in widget.summary()


def test_another_file_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="no instruction comes from"):
        KernelProfile.of(run, quantized_matmul_fast.__file__)


@needs_node
def test_bars_add_up(widget: KernelProfile, tmp_path: Path) -> None:
    """In node: what is needed and what comes on top make the count; a line's story names its numbers."""
    (tmp_path / "module.mjs").write_text(str(widget._esm), encoding="utf-8")
    script = f"""
        import module from "./module.mjs";
        const lines = {json.dumps(widget.lines)};
        console.log(JSON.stringify(lines.map((line) => [module.parts(line.sectors, 1), module.story(line)])));
    """
    (tmp_path / "script.mjs").write_text(script, encoding="utf-8")
    assert NODE is not None
    out = subprocess.run([NODE, "script.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for line, (parts, story) in zip(widget.lines, json.loads(out), strict=True):
        count, least = line["sectors"]
        assert parts["useful"] + parts["excess"] == count and parts["useful"] == min(count, least)
        assert story.startswith(f"Line {line['number']}")
        assert (f"{count:,} sectors, at best {least:,}" in story) == (count > 0)
