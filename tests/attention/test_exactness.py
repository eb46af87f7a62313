"""The kernels against float64: interpreted on a CPU, compiled where there is a GPU. No environment variable needed.

Interpreted launches go through `optinfer_kernels.interpreter.launch`, which swaps kernels in and out of the
interpreter per launch; so these tests and the compile gate run in one process, in any order.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optinfer.attention import attention_reference, flash_attention, merge_attention, online_softmax_attention

from .cases import DEVICE, KERNELS, SMALL, Tile, assert_exact, exact, inputs, run

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PROFILE = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw, head_dims=(16, 32, 40, 64, 80, 128)):
    kv_heads = draw(st.sampled_from((1, 2)))
    window = draw(st.one_of(st.none(), st.integers(1, 40)))
    return {
        "sizes": (
            draw(st.integers(1, 2)),
            kv_heads * draw(st.sampled_from((1, 2, 3))),
            kv_heads,
            draw(st.integers(1, 90)),
            draw(st.integers(1, 90)),
            draw(st.sampled_from(head_dims)),
        ),
        "dtype": draw(st.sampled_from(DTYPES)),
        "causal": draw(st.booleans()) or window is not None,
        "window": window,
        "softcap": draw(st.sampled_from((None, None, 5.0, 30.0))),
        "tile": draw(st.sampled_from((Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(64, 64, 4, 1)))),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("name", KERNELS)
@PROFILE
@given(p=problems())
def test_error_at_most_twice_plain_torch(name, p):
    dtype = p["dtype"] if name == "flash_attention" else (torch.bfloat16, torch.float16)[p["seed"] % 2]
    options = {"window": p["window"], "softcap": p["softcap"]} if name != "flash_attention_ws" else {}
    q, k, v = inputs(*p["sizes"], dtype, p["seed"])
    out, lse = run(name, q, k, v, p["causal"], tile=p["tile"] if DEVICE == "cpu" else None, return_lse=True, **options)
    assert_exact(out, q, k, v, p["causal"], **options)
    _, expected = exact(q, k, v, p["causal"], return_lse=True, **options)
    assert torch.equal(lse.isfinite(), expected.isfinite())
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=2e-5)


@PROFILE
@given(p=problems())
def test_online_softmax_is_exact(p):
    q, k, v = inputs(*p["sizes"], torch.float64, p["seed"])
    options = {"window": p["window"], "softcap": p["softcap"]}
    tile = p["tile"]
    out, lse = online_softmax_attention(
        q, k, v, p["causal"], None, tile.block_m, tile.block_n, return_lse=True, **options
    )
    expected, expected_lse = exact(q, k, v, p["causal"], return_lse=True, **options)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    "sizes", ((2, 4, 2, 33, 33, 64), (1, 2, 2, 20, 50, 32), (1, 2, 1, 50, 20, 32), (1, 4, 1, 1, 40, 64))
)
def test_reference_agrees_with_torch(sizes, causal):
    """Our formula against torch's math path, so that both cannot be wrong in the same way."""
    q, k, v = inputs(*sizes, torch.float64)
    group = sizes[1] // sizes[2]
    mask = torch.ones(sizes[3], sizes[4], dtype=torch.bool, device=DEVICE)
    mask = mask.tril(sizes[4] - sizes[3]) if causal else mask
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=mask
    )
    expected = expected.masked_fill(~mask.any(-1)[:, None], 0.0)
    torch.testing.assert_close(attention_reference(q, k, v, causal), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ("reference", "online", "sdpa", "triton"))
@pytest.mark.parametrize(
    "sizes", ((1, 4, 2, 30, 30, 64), (1, 2, 2, 20, 45, 32), (1, 2, 1, 45, 20, 32), (1, 2, 2, 1, 33, 64))
)
def test_backends_agree(backend, sizes):
    has_bf16 = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
    q, k, v = inputs(*sizes, torch.bfloat16 if has_bf16 else torch.float16)
    for options in ({}, {"causal": True}, {"causal": True, "window": 7}):
        assert_exact(flash_attention(q, k, v, backend=backend, **options), q, k, v, **options)


@pytest.mark.parametrize("name", KERNELS)
def test_grouped_heads_equal_repeated_heads(name):
    q, k, v = inputs(2, 6, 2, 40, 50, 32)
    repeated = [t.repeat_interleave(3, 1) for t in (k, v)]
    assert torch.equal(run(name, q, k, v, True)[0], run(name, q, *repeated, True)[0])


@pytest.mark.parametrize("name", KERNELS)
def test_two_halves_merge_to_the_whole(name):
    q, k, v = inputs(1, 2, 1, 33, 80, 64)
    parts = [run(name, q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 37), slice(37, 80))]
    merged, lse = merge_attention([(out.double(), part_lse.double()) for out, part_lse in parts])
    assert_exact(merged.to(q.dtype), q, k, v)
    torch.testing.assert_close(lse, exact(q, k, v, return_lse=True)[1], rtol=1e-5, atol=1e-5)


def test_merge_ignores_a_part_that_saw_nothing():
    out, lse = merge_attention([
        (torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), -torch.inf)),
        (torch.ones(1, 1, 2, 4), torch.tensor([[[0.5, -torch.inf]]])),
    ])  # fmt: skip
    assert torch.equal(out[0, 0], torch.tensor([[1.0] * 4, [0.0] * 4]))
    assert lse[0, 0, 0] == 0.5 and lse[0, 0, 1] == -torch.inf


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", (1e4, -1e4))
def test_huge_scores(name, size):
    q, k, v = inputs(1, 1, 1, 20, 40, 32, torch.bfloat16)
    q = torch.full_like(q, size / 32) * q.sign()
    out, lse = run(name, q, k.sign(), v, scale=1.0, return_lse=True)
    assert_exact(out, q, k.sign(), v, scale=1.0)
    assert lse.isfinite().all()


@pytest.mark.parametrize("name", KERNELS)
def test_rows_with_nothing_to_see_are_zero(name):
    q, k, v = inputs(1, 2, 2, 70, 30, 32)
    out, lse = run(name, q, k, v, True, return_lse=True)
    assert not out[:, :, :40].any() and (lse[:, :, :40] == -torch.inf).all()
    assert_exact(out, q, k, v, True)
    assert lse[:, :, 40:].isfinite().all()


@pytest.mark.parametrize("name", KERNELS)
def test_every_element_is_written_and_no_other(name):
    """Poisoned output: what the kernel misses stays NaN; what it writes too much shows in the guard rows."""
    q, k, v = inputs(1, 2, 1, 37, 50, 64)
    buffer = torch.full((1, 2, 39, 64), torch.nan, dtype=q.dtype, device=q.device)
    out, _ = run(name, q, k, v, True, out=buffer[:, :, 1:38])
    assert_exact(out, q, k, v, True)
    assert buffer[:, :, 0].isnan().all() and buffer[:, :, 38].isnan().all()


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_outside_the_inputs_is_used(name):
    """Keys and queries cut out of a sea of NaN: reading one row too many would poison the result."""
    q, k, v = inputs(1, 2, 1, 21, 35, 64)

    def in_nan(x):
        sea = torch.full((1, x.shape[1], x.shape[2] + 64, 64), torch.nan, dtype=x.dtype, device=x.device)
        sea[:, :, 16 : 16 + x.shape[2]] = x
        return sea[:, :, 16 : 16 + x.shape[2]]

    assert_exact(run(name, in_nan(q), in_nan(k), in_nan(v))[0], q, k, v)


@pytest.mark.parametrize("name", KERNELS)
def test_any_memory_layout(name):
    q, k, v = inputs(2, 4, 2, 30, 40, 32)
    expected, _ = run(name, q, k, v, True)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # [batch, length, heads, dim]
    strided = [torch.stack((t, t), -1)[..., 0] for t in (q, k, v)]
    offset = [torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) for t in (q, k, v)]
    shared = [t[:1].expand(2, -1, -1, -1) for t in (q, k, v)]
    for layout in (transposed, strided, offset):
        assert torch.equal(run(name, *layout, True)[0], expected)
    assert torch.equal(run(name, *shared, True)[0], expected[:1].expand_as(expected))


@pytest.mark.parametrize("name", KERNELS)
def test_no_keys_no_queries_no_batch(name):
    for sizes in ((1, 2, 2, 5, 0, 32), (1, 2, 2, 0, 5, 32), (0, 2, 2, 5, 5, 32)):
        q, k, v = inputs(*sizes)
        out, lse = run(name, q, k, v, return_lse=True)
        assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("head_dim", (32, 64, 96, 128, 192, 256))
def test_head_dims(head_dim):
    for name in KERNELS[:2]:
        q, k, v = inputs(1, 1, 1, 33, 33, head_dim, torch.bfloat16)
        assert_exact(run(name, q, k, v, True)[0], q, k, v, True)


def test_constant_values_come_back():
    q, k, v = inputs(1, 2, 2, 30, 45, 32, spread=3.0)
    out, _ = run("flash_attention", q, k, torch.full_like(v, 0.75))
    assert torch.equal(out, torch.full_like(out, 0.75))


def test_tile_size_does_not_change_the_answer_beyond_rounding():
    q, k, v = inputs(1, 1, 1, 65, 65, 32, torch.float32)
    outs = [
        run("flash_attention", q, k, v, True, tile=tile)[0] for tile in (Tile(16, 16, 4, 1), Tile(64, 32, 4, 1), SMALL)
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6)


def test_the_bound_can_fail():
    """An error of one part in a hundred in the softmax, or a mask off by one, must not pass."""
    q, k, v = inputs(1, 2, 2, 40, 40, 64)
    out, _ = run("flash_attention", q, k, v, True)
    with pytest.raises(AssertionError):
        assert_exact(out * 1.01, q, k, v, True)
    with pytest.raises(AssertionError):
        assert_exact(out, q, k, v, True, window=39)
    with pytest.raises(AssertionError):
        assert_exact(run("flash_attention", q, k, v, True, 0.99 * 64**-0.5)[0], q, k, v, True)
