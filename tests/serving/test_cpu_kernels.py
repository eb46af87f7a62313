"""The compiled CPU kernels compute what torch's formulas compute, and the engine does without them."""

import pytest
import torch
from torch.nn.functional import rms_norm

from optinfer.serving import Engine, SamplingParams, cpu_kernels
from optinfer.serving.paged_batch import Chunk, KVPool, PagedBatch

KERNELS = {dtype: cpu_kernels.of(torch.empty(0, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)}
pytestmark = pytest.mark.skipif(None in KERNELS.values(), reason="no C++ compiler here")
DTYPES = pytest.mark.parametrize("dtype", KERNELS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(ours, exact):
    """One rounding to the result's dtype away from the fp64 result, and a little for fp32 sums."""
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact, atol=2e-6, rtol=max(eps, 4e-6))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 576), (3, 5, 64), (200, 33)])
def test_rms_norm(dtype, shape):
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]).to(dtype)
    ours = KERNELS[dtype].rms_norm(x, weight, 1e-5)
    close(ours, rms_norm(x.double(), weight.shape, weight.double(), 1e-5))


@DTYPES
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_rotate_touches_only_its_heads(dtype, rows):
    wide = torch.randn(rows, 5, 16).to(dtype)
    before, x = wide.clone(), wide[:, :3]
    angle = torch.randn(rows, 8).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    KERNELS[dtype].rotate_(x, cos, sin)
    first, second = before[:, :3].double().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    close(x, before[:, :3].double() * cos.double()[:, None] + turned * sin.double()[:, None])
    assert torch.equal(wide[:, 3:], before[:, 3:])


@DTYPES
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("window, softcap", [(None, None), (5, None), (None, 2.0), (20, 3.0)])
def test_attention(dtype, head_dim, window, softcap):
    kv_heads, group, block_size = 2, 3, 4
    keys, values = torch.randn(2, 30, kv_heads, block_size, head_dim).to(dtype)
    tables = torch.randperm(30)[:24].view(3, 8)
    sequence, position = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 16, 17, 30, 31])
    q = torch.randn(5, kv_heads * group + 2, head_dim).to(dtype)[:, : kv_heads * group]  # rows lie apart
    out = torch.full((5, kv_heads * group, head_dim), torch.nan, dtype=dtype)
    KERNELS[dtype].attend(out, q, keys, values, tables, sequence, position, 0.3, window, softcap)
    for row in range(5):
        first = 0 if window is None else max(0, position[row] + 1 - window)
        k, v = (
            pages[tables[sequence[row]]].transpose(0, 1).flatten(1, 2)[:, first : position[row] + 1].double()
            for pages in (keys, values)
        )
        scores = torch.einsum("hgd,htd->hgt", q[row].double().view(kv_heads, group, head_dim), k) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        exact = torch.einsum("hgt,htd->hgd", scores.softmax(-1), v).flatten(0, 1)
        torch.testing.assert_close(out[row].double(), exact, atol=1e-6, rtol=max(torch.finfo(dtype).eps, 1e-5))


@DTYPES
def test_far_apart_scores(dtype):
    """Weights that vanish vanish, whatever the size of the scores."""
    keys = torch.zeros(1, 1, 4, 8, dtype=dtype)
    keys[0, 0, :, 0] = torch.tensor([-3e4, 3e4, 0.0, -1e30])
    values = torch.arange(32.0).to(dtype).view(1, 1, 4, 8)
    zero, out = torch.zeros(1, dtype=torch.int64), torch.empty(1, 1, 8, dtype=dtype)
    KERNELS[dtype].attend(out, torch.ones(1, 1, 8, dtype=dtype), keys, values, zero[None], zero, zero + 3, 1.0)
    assert torch.equal(out[0], values[0, :, 1])


@pytest.mark.parametrize("window", [None, 6])
def test_a_batch_attends_the_same_with_and_without_kernels(model, window):
    chunks = [Chunk([5], 9, [3, 1, 4]), Chunk([6, 7, 8], 2, [2, 5]), Chunk([9] * 20, 0, [6, 7, 8, 9, 10])]
    q, k, v = torch.randn(24, 6, 8), torch.randn(24, 2, 8), torch.randn(24, 2, 8)
    results = []
    for with_kernels in (True, False):
        pool = KVPool(model.config, 12, 4, torch.float32, torch.device("cpu"))
        torch.manual_seed(1)
        pool.keys.normal_(), pool.values.normal_()
        if not with_kernels:
            pool.kernels = None
        batch = PagedBatch(chunks, [1, 1, 1], pool)
        assert (batch.walk is not None) == with_kernels
        results.append((batch.attend(0, q, k, v, 0.35, window, None), pool.keys, pool.values))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_without_a_compiler(model, reference, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_kernels._load.cache_clear()
    try:
        engine = Engine(model, num_blocks=16)
        assert engine.runner.pool.kernels is None
        assert engine.generate([[5, 6, 7]], SamplingParams(max_tokens=9))[0].token_ids == reference([5, 6, 7], 9)
    finally:
        cpu_kernels._load.cache_clear()


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    cpu_kernels._load.cache_clear()
    try:
        assert cpu_kernels.of(torch.empty(0)) is None
    finally:
        cpu_kernels._load.cache_clear()


def test_other_dtypes_have_none():
    assert cpu_kernels.of(torch.empty(0, dtype=torch.float16)) is None
    assert cpu_kernels.of(torch.empty(0, device="meta")) is None
