"""Inputs, references and the error bound that the attention tests share."""

import importlib

import pytest
import torch

from optinfer.attention import attention_reference
from optinfer_kernels.flash_attention import Tile

pytest.importorskip("triton")

KERNELS = ("flash_attention", "flash_attention_tma", "flash_attention_ws")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # compiled on a GPU, interpreted on a CPU: same tests
SMALL = Tile(32, 16, 4, 1) if DEVICE == "cpu" else None  # several tiles per row even for short sequences


def kernel(name):
    return importlib.import_module(f"optinfer_kernels.{name}").flash_attention


def run(name, q, k, v, causal=False, scale=None, tile=SMALL, **options):
    return kernel(name)(q, k, v, causal, scale, tile=tile, **options)


def inputs(batch, heads, kv_heads, q_len, kv_len, head_dim, dtype=torch.float16, seed=0, spread=1.0):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    shapes = [(batch, heads, q_len, head_dim)] + 2 * [(batch, kv_heads, kv_len, head_dim)]
    return tuple((torch.randn(s, generator=g) * spread).to(dtype).to(DEVICE) for s in shapes)


def exact(q, k, v, *args, **options):
    """The answer in float64."""
    return attention_reference(q.double(), k.double(), v.double(), *args, **options)


def allowed_error(q, k, v, *args, **options):
    """Twice the error of plain torch in the same dtype, plus the flash-attention suite's atol.

    The rule of flash-attention's own tests (tests/test_flash_attn.py): rtol 2, or 3 with a soft-cap, and
    atol = 2 * max|reference + 0.3 - 0.3 - reference| in the working dtype.
    """
    reference = exact(q, k, v, *args, **options)
    plain = attention_reference(q, k, v, *args, **options)
    rounded = reference.to(q.dtype)
    atol = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item() if rounded.numel() else 0.0
    factor = 3 if options.get("softcap") else 2
    error = (plain.double() - reference).abs().max().item() if rounded.numel() else 0.0
    return factor * error + atol


def assert_exact(out, q, k, v, *args, **options):
    assert out.dtype == q.dtype and out.shape == q.shape
    assert out.isfinite().all()
    if out.numel():
        error = (out.double() - exact(q, k, v, *args, **options)).abs().max().item()
        assert error <= allowed_error(q, k, v, *args, **options)
