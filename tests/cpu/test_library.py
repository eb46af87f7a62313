"""Compiling: once, for this processor, and not at all where there is no compiler."""

import os
import subprocess
import sys

import pytest
import torch

from optinfer import cpu
from optinfer.cpu import library

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


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-mavx",), ("-mavx2", "-mfma")], ids=["sse2", "avx", "avx2"])
def test_other_processors(flags, tmp_path, monkeypatch, forgotten):
    """The plain loops beside the instructions compute the same: compiled for older processors, run here."""
    native = tuple(flag for flag in library._FLAGS if flag != "-march=native")
    monkeypatch.setattr(library, "_FLAGS", (*native, *flags))
    monkeypatch.setenv("OPTINFER_CACHE", str(tmp_path))
    from optinfer.quantization import quantize_4bit, quantize_linear
    from optinfer.quantization.cpu import as_cpu_weight

    w = torch.randn(19, 192)
    weights = [(d, cpu.CpuWeight.plain(d)) for d in (w, w.bfloat16(), w.half())]
    for q in (quantize_linear(w, 8), quantize_linear(w, 4, 64, False), quantize_4bit(w, "nf4", 64, True)):
        weights.append((q.dequantize(torch.float32), as_cpu_weight(q)))
    for tokens in (1, 5, 20):
        x = torch.randn(tokens, 192)
        for restored, weight in weights:
            torch.testing.assert_close(cpu.linear(x, weight), x @ restored.float().t(), atol=5e-3, rtol=1e-3)
