"""Compiling: once, for this processor, and not at all where there is no compiler."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from optinfer import cpu
from optinfer.cpu import library
from optinfer.processor import this_processor
from optinfer.quantization import quantize_4bit, quantize_linear

needs_compiler = pytest.mark.skipif(cpu.kernels() is None, reason="no C++ compiler here")


@pytest.fixture
def forgotten():
    """Each test looks for a compiler anew."""
    library.kernels.cache_clear()
    yield
    library.kernels.cache_clear()


def test_without_a_compiler_models_run_in_torch(monkeypatch, forgotten):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpu.kernels() is None
    layer, x = torch.nn.Linear(8, 3).bfloat16(), torch.randn(2, 8).bfloat16()
    expected = layer(x)
    assert torch.equal(cpu.use_cpu_linear(layer)(x), expected)
    with pytest.raises(RuntimeError, match="no C"):
        cpu.linear(x, cpu.CpuWeight.plain(layer.weight))


def test_a_compiler_that_fails(monkeypatch, tmp_path, forgotten):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert cpu.kernels() is None


@needs_compiler
def test_compiled_once(monkeypatch, tmp_path):
    """A second process finds the file; what is interrupted leaves none."""
    environment = {**os.environ, "OPTINFER_CACHE": str(tmp_path)}
    code = "from optinfer import cpu; assert cpu.kernels() is not None"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=600)
        files = list((tmp_path / "kernels").iterdir())
        assert [file.suffix for file in files] == [".so"]
        made = files[0].stat().st_mtime_ns
    assert files[0].stat().st_mtime_ns == made


def instruction_sets():
    """Those that this processor can run, each as the flag that makes the compiler use no other."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"plain": ()}
    flags = set(this_processor().instructions)
    sets = {"sse2": ("-march=x86-64",)}
    if {"avx2", "fma", "f16c"} <= flags:
        sets["avx2"] = ("-march=x86-64-v3",)
    if "avx512f" in flags:
        sets["avx512"] = ("-march=x86-64-v4",)
    if "avx512_vnni" in flags:
        sets["avx512_vnni"] = ("-march=x86-64-v4", "-mavx512vnni")
    return sets


def weights_of_all_kinds():
    """(what it stands for, the weight), with columns that fill no register and groups of any size."""
    for rows, columns in ((19, 192), (5, 77)):
        w = torch.randn(rows, columns)
        yield from ((d, cpu.CpuWeight.plain(d)) for d in (w, w.bfloat16(), w.half()))
        for bits, group, symmetric in (
            (8, "channel", True),
            (8, 64, False),
            (4, 32, False),
            (4, 64, True),
            (4, 128, True),
        ):
            q = quantize_linear(w, bits, group, symmetric)
            yield q.dequantize(torch.float32), q.cpu_weight()
    for group_size in (32, 64):
        q = quantize_4bit(torch.randn(19, 192), "nf4", group_size, double_quant=True)
        yield q.dequantize(torch.float32), q.cpu_weight()


@pytest.mark.thorough
@needs_compiler
@pytest.mark.parametrize("name", instruction_sets())
def test_every_instruction_set_computes_the_same(name, tmp_path, monkeypatch, forgotten):
    """Each that this processor has, so that the loops of older ones are tested on newer ones; against float64."""
    flags = [flag for flag in library._FLAGS if flag not in ("-march=native", "-O3")]
    monkeypatch.setattr(library, "_FLAGS", (*flags, "-O1", *instruction_sets()[name]))
    monkeypatch.setenv("OPTINFER_CACHE", str(tmp_path))
    assert cpu.kernels() is not None
    for restored, weight in weights_of_all_kinds():
        for tokens in (1, 2, 3, 5, 20):
            x = torch.randn(tokens, restored.shape[1])
            expected = x.double() @ restored.double().t()
            out = cpu.linear(x, weight).double()
            scale = x.double().abs() @ restored.double().abs().t()
            assert bool(((out - expected).abs() <= 3e-4 * scale).all()), (tokens, weight.struct.kind)
    q = torch.randn(3, 4, 40)
    pages = cpu.Pages.of(torch.randn(2, 16, 2, 40), torch.randn(2, 16, 2, 40))
    sequences = cpu.Sequences.of(torch.tensor([0, 3]), torch.tensor([21]), torch.tensor([[1, 0]]))
    out = cpu.kernels().attend(pages, sequences, cpu.Scoring.of(0.2), q)
    keys, values = (t.double()[[1, 0]].reshape(32, 2, 40).repeat_interleave(2, 1) for t in pages.tensors[:2])
    for i in range(3):
        seen = 19 + i
        weights = (torch.einsum("hd,thd->ht", q[i].double(), keys[:seen]) * 0.2).softmax(1)
        torch.testing.assert_close(
            out[i].double(), torch.einsum("ht,thd->hd", weights, values[:seen]), atol=1e-5, rtol=1e-5
        )


@needs_compiler
@pytest.mark.parametrize("columns", [1, 5, 16, 63, 64, 65, 200, 1000])
def test_the_likeliest_column(columns):
    """The first of equals wherever it stands, and -1 for rows whose largest number is none."""
    x = torch.randint(-50, 50, (40, columns)).float()
    expected = [row.index(max(row)) for row in x.tolist()]
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[row, torch.randint(columns, ()) if bad != -torch.inf else slice(None)] = bad
        expected[row] = -1
    x[3, : columns - 1] = -torch.inf
    expected[3] = columns - 1
    assert cpu.kernels().likeliest(x).tolist() == expected
