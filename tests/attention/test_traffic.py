"""Predicted bytes against counted ones: our own counter, and every tensor that transformers' eager attention touches."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optinfer.attention import HbmCounter, attention_reference, hbm_bytes, online_softmax_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PROFILE = settings(max_examples=40, deadline=None)


@st.composite
def problems(draw):
    kv_heads = draw(st.integers(1, 3))
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "q_len": draw(st.integers(1, 60)),
        "kv_len": draw(st.integers(1, 60)),
        "head_dim": draw(st.sampled_from((8, 16, 24))),
    }, kv_heads


def tensors(sizes, kv_heads, dtype):
    q = torch.randn(sizes["batch"], sizes["heads"], sizes["q_len"], sizes["head_dim"]).to(dtype)
    k, v = (torch.randn(sizes["batch"], kv_heads, sizes["kv_len"], sizes["head_dim"]).to(dtype) for _ in range(2))
    return q, k, v


@PROFILE
@given(problems(), st.booleans(), st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES))
def test_flash_bytes_equal_the_counter(problem, causal, block_m, block_n, dtype):
    sizes, kv_heads = problem
    counter = HbmCounter()
    online_softmax_attention(*tensors(sizes, kv_heads, dtype), causal, None, block_m, block_n, counter)
    options = {"kv_heads": kv_heads, "causal": causal, "block_m": block_m, "block_n": block_n}
    assert counter.total == hbm_bytes("flash", **sizes, itemsize=dtype.itemsize, **options)


@PROFILE
@given(problems(), st.booleans(), st.sampled_from(DTYPES))
def test_naive_bytes_equal_the_counter(problem, causal, dtype):
    sizes, kv_heads = problem
    counter = HbmCounter()
    attention_reference(*tensors(sizes, kv_heads, dtype), causal, counter=counter)
    assert counter.total == hbm_bytes("naive", **sizes, itemsize=dtype.itemsize, kv_heads=kv_heads, causal=causal)


class Traffic(TorchDispatchMode):
    """Adds up every tensor that every operation reads and writes; views move nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0
        self.log = []

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        before = {t.untyped_storage().data_ptr() for t in inputs}
        if any(t.untyped_storage().data_ptr() not in before for t in outputs):
            distinct = [*inputs, *outputs]
            moved = sum(t.untyped_storage().nbytes() if t.dim() and 0 in t.stride() else t.nbytes for t in distinct)
            self.total += moved
            self.log.append((str(func), moved))
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kv_heads", (4, 2))
def test_eager_bytes_equal_what_transformers_does(dtype, causal, kv_heads):
    from transformers.models.llama.modeling_llama import eager_attention_forward

    sizes = {"batch": 2, "heads": 4, "q_len": 24, "kv_len": 32, "head_dim": 16}
    q, k, v = tensors(sizes, kv_heads, dtype)
    mask = torch.zeros(2, 1, 24, 32, dtype=dtype) if causal else None
    module = types.SimpleNamespace(num_key_value_groups=4 // kv_heads, training=False)
    with Traffic() as seen:
        eager_attention_forward(module, q, k, v, mask, scaling=0.25)
    # A GPU's softmax reads 16 bit and writes fp32 in one kernel; on a CPU the cast is an operation of its own.
    cast_on_cpu = 8 * 2 * 4 * 24 * 32 if dtype != torch.float32 else 0
    expected = hbm_bytes("eager", **sizes, itemsize=dtype.itemsize, kv_heads=kv_heads, causal=causal) + cast_on_cpu
    assert seen.total == expected, seen.log


def test_flash_lies_between_once_and_naive_for_long_sequences():
    sizes = {"batch": 1, "heads": 8, "q_len": 4096, "kv_len": 4096, "head_dim": 64, "itemsize": 2}
    flash = hbm_bytes("flash", **sizes, block_m=128)
    assert hbm_bytes("once", **sizes) < flash < hbm_bytes("naive", **sizes) < hbm_bytes("eager", **sizes)


def test_bad_sizes_are_named():
    sizes = {"batch": 1, "heads": 4, "q_len": 8, "kv_len": 8, "head_dim": 8, "itemsize": 2}
    with pytest.raises(ValueError, match="kind must be one of naive, eager, flash, once; not 'fast'"):
        hbm_bytes("fast", **sizes)
    with pytest.raises(ValueError, match="q_len must be a positive integer, got 0"):
        hbm_bytes("flash", **(sizes | {"q_len": 0}))
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 4 and 3"):
        hbm_bytes("flash", **sizes, kv_heads=3)


def test_peak_memory_counts_the_matrix_and_grows_linearly_without_it():
    from optinfer.bench.attention import peak_extra_bytes

    peaks = {}
    for n in (512, 1024):
        q, k, v = (torch.randn(1, 1, n, 16) for _ in range(3))
        peaks[n] = (
            peak_extra_bytes(lambda q=q, k=k, v=v: attention_reference(q, k, v)),
            peak_extra_bytes(lambda q=q, k=k, v=v: online_softmax_attention(q, k, v)),
        )
    assert peaks[512][0] >= 2 * 512 * 512 * 4
    assert 3.9 < peaks[1024][0] / peaks[512][0] < 4.1
    assert peaks[1024][1] / peaks[512][1] < 2.1
