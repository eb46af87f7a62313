"""The ways of a T4 (sm_75: fp16, small tiles, torch's own attention), walked without one by OPTINFER_CAPABILITY."""

import os
from pathlib import Path

import pytest
import torch

import optinfer
from optinfer import attention, hardware
from optinfer.execute import execute
from optinfer.kv_cache import paged_attention

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CPU = torch.device("cpu")


@pytest.fixture
def t4(monkeypatch):
    monkeypatch.setenv("OPTINFER_CAPABILITY", "7.5")


def test_weights_and_lessons_are_in_fp16(t4):
    assert hardware.default_dtype(CPU) == torch.float16
    assert optinfer.setup("00_start_here").dtype == torch.float16
    model, tokenizer = optinfer.load_model(device="cpu")
    assert model.dtype == torch.float16
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        half = model(**inputs).logits.float()
        exact = optinfer.load_model(dtype=torch.float32, device="cpu")[0](**inputs).logits
    assert (half - exact).abs().max() < 0.2 and half.argmax(-1).equal(exact.argmax(-1))


def test_without_the_switch_nothing_changes(monkeypatch):
    monkeypatch.delenv("OPTINFER_CAPABILITY", raising=False)
    assert hardware.capability(CPU) is None and hardware.default_dtype(CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("given", ["75", "7", "T4", "7.5.1", "-7.5"])
def test_a_capability_that_is_none_is_named(monkeypatch, given):
    monkeypatch.setenv("OPTINFER_CAPABILITY", given)
    with pytest.raises(ValueError, match="OPTINFER_CAPABILITY must be .* such as 7.5"):
        hardware.default_dtype(CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4, 2, 77, 130, 64), (2, 2, 2, 33, 33, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_small_tiles_compute_the_same(t4, dtype, shape, causal):
    kernel = pytest.importorskip("optinfer_kernels.flash_attention")
    batch, heads, kv_heads, q_len, kv_len, dim = shape
    q = torch.randn(batch, heads, q_len, dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, kv_len, dim).to(dtype) for _ in range(2))
    turing = kernel.tile_for(75, dtype, dim)
    assert kernel.choose_tile(q, False) == turing
    if dtype == torch.float16:
        assert turing != kernel.tile_for(80, dtype, dim)
    exact = attention.attention_reference(q.double(), k.double(), v.double(), causal)
    plain = (attention.attention_reference(q, k, v, causal).double() - exact).abs().max()
    ours = (attention.flash_attention(q, k, v, causal, backend="triton").double() - exact).abs().max()
    assert ours <= 2 * plain + 1e-3


def test_what_a_t4_cannot_do_is_refused(t4):
    pytest.importorskip("triton")
    x = torch.randn(1, 1, 8, 64)
    with pytest.raises(attention.UnsupportedBackend, match="no bfloat16 before compute capability 8.0"):
        attention.flash_attention(x.bfloat16(), x.bfloat16(), x.bfloat16(), backend="triton")
    with pytest.raises(attention.UnsupportedBackend, match="compute capability 9.0"):
        attention.flash_attention(x.half(), x.half(), x.half(), backend="triton_tma")


def test_paged_attention(t4):
    pytest.importorskip("triton")
    keys, values = torch.randn(2, 12, 16, 2, 64).half()
    queries, tables = torch.randn(2, 4, 64).half(), torch.randperm(12).view(2, 6).int()
    context = torch.tensor([90, 17], dtype=torch.int32)
    ours, exact = (paged_attention(queries, keys, values, tables, context, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, exact, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("0*.ipynb")), ids=lambda p: p.stem)
def test_lessons(t4, path):
    done = execute(path)
    assert os.environ["OPTINFER_CAPABILITY"] == "7.5" and "float16" in done.cells[1].outputs[0]["text"]
