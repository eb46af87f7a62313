"""Single instructions against plain Python integers, and floats of higher precision."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from optinfer_kernels.emulator import Unsupported
from optinfer_kernels.emulator.formats import bf16_to_f32, f32_to_bf16

from .ptx_text import compute

lists = st.lists(
    st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]), min_size=32, max_size=32
)
words = lists.map(lambda x: np.array(x, np.uint32))
quick = settings(max_examples=15, deadline=None)
MASK = 2**32 - 1


def signed(x):
    return (x ^ 2**31) - 2**31


def truncated(a, b):
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


TWO = {  # on Python integers
    "add.s32": lambda a, b: a + b,
    "add.s16x2": lambda a, b: (a + b & 0xFFFF) | ((a >> 16) + (b >> 16) & 0xFFFF) << 16,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "div.u32": lambda a, b: a // b if b else MASK,
    "div.s32": lambda a, b: truncated(signed(a), signed(b)) if b else MASK,
    "rem.s32": lambda a, b: signed(a) - truncated(signed(a), signed(b)) * signed(b) if b else a,
}


@pytest.mark.parametrize("op", TWO)
@quick
@given(words, words)
def test_integers(op, a, b):
    expected = [TWO[op](x, y) & MASK for x, y in zip(a.tolist(), b.tolist())]
    assert compute(op, a, b).tolist() == expected


@quick
@given(words, words, words)
def test_three_operands(a, b, c):
    rows = list(zip(a.tolist(), b.tolist(), c.tolist()))
    assert compute("mad.lo.s32", a, b, c).tolist() == [(x * y + z) & MASK for x, y, z in rows]
    majority = [(x & y) | (x & z) | (y & z) for x, y, z in rows]
    assert compute("lop3.b32", a, b, c, constants=("0xE8",)).tolist() == majority
    funnel = [((y << 32 | x) << (z % 32) >> 32) & MASK for x, y, z in rows]
    assert compute("shf.l.wrap.b32", a, b, c).tolist() == funnel
    octets = [[(y << 32 | x) >> 8 * k & 255 for k in range(8)] for x, y, _ in rows]

    def permuted(o, z):
        chosen = [(o[n & 7] >> 7) * 255 if n & 8 else o[n & 7] for n in (z >> 4 * k & 15 for k in range(4))]
        return sum(octet << 8 * k for k, octet in enumerate(chosen))

    assert compute("prmt.b32", a, b, c).tolist() == [permuted(o, z) for o, (_, _, z) in zip(octets, rows)]


@quick
@given(words, st.integers(0, 31), st.integers(1, 31))
def test_bit_fields(a, position, length):
    constants = (position, length)
    unsigned = [x >> position & (1 << length) - 1 for x in a.tolist()]
    assert compute("bfe.u32", a, constants=constants).tolist() == unsigned
    width = min(length, 32 - position)
    expected = [(x >> position & (1 << width) - 1 ^ 1 << width - 1) - (1 << width - 1) & MASK for x in a.tolist()]
    assert compute("bfe.s32", a, constants=constants).tolist() == expected
    field = ((1 << length) - 1) << position & MASK
    expected = [0x12345678 & ~field | x << position & field for x in a.tolist()]
    b = np.full(32, 0x12345678, np.uint32)
    assert compute("bfi.b32", a, b, constants=constants).tolist() == expected


@quick
@given(words, words)
def test_wide_products(a, b):
    rows = list(zip(a.tolist(), b.tolist()))
    assert compute("mul.wide.u32", a, b, result=np.uint64).tolist() == [x * y for x, y in rows]
    expected = [signed(x) * signed(y) % 2**64 for x, y in rows]
    assert compute("mul.wide.s32", a, b, result=np.uint64).tolist() == expected
    long = np.array([(x << 32) + y for x, y in rows], np.uint64)
    expected = [x * x >> 64 for x in long.tolist()]
    assert compute("mul.hi.u64", long, long, result=np.uint64).tolist() == expected


@quick
@given(words, words, words)
def test_floats(a, b, c):
    """Any bits: subnormal numbers, infinities and NaN among them."""
    x, y, z = (bits.view(np.float32) for bits in (a, b, c))
    with np.errstate(all="ignore"):
        for op, expected in {
            "add.f32": x + y,
            "mul.f32": x * y,
            "min.f32": np.fmin(x, y),
            "max.NaN.f32": np.maximum(x, y),
            "div.full.f32": x / y,
        }.items():
            np.testing.assert_array_equal(compute(op, x, y, result=np.float32), expected)
        fused = (x.astype(np.longdouble) * y + z).astype(np.float32)
    mine = compute("fma.rn.f32", x, y, z, result=np.float32)
    np.testing.assert_array_equal(np.isnan(mine), np.isnan(fused))
    finite = np.isfinite(fused)
    assert (np.abs(mine - fused)[finite] <= np.spacing(np.abs(fused))[finite]).all()


def test_bfloat16_rounds_to_even_and_keeps_nan():
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.inf, -np.inf, np.nan], np.float32)
    expected = [1.0, 1.0, 1 + 2**-6, np.inf, np.inf, -np.inf, np.nan]
    np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(x)), np.array(expected, np.float32))
    everything = np.arange(2**16, dtype=np.uint16)
    numbers = everything[~np.isnan(bf16_to_f32(everything))]
    np.testing.assert_array_equal(f32_to_bf16(bf16_to_f32(numbers)), numbers)


@quick
@given(words, words)
def test_pairs_of_halves(a, b):
    with np.errstate(all="ignore"):
        expected = a.view(np.float16) + b.view(np.float16)
        np.testing.assert_array_equal(compute("add.f16x2", a, b).view(np.float16), expected)


@quick
@given(words)
def test_conversions(a):
    x = a.view(np.float32)
    with np.errstate(all="ignore"):
        bounded = np.where(np.isnan(x), 0, np.clip(np.trunc(x.astype(np.float64)), -(2**31), 2**31 - 1)).astype(
            np.int32
        )
        np.testing.assert_array_equal(compute("cvt.rzi.s32.f32", x, result=np.int32), bounded)
        np.testing.assert_array_equal(
            compute("cvt.rn.f32.s32", a, result=np.float32), a.view(np.int32).astype(np.float32)
        )


@pytest.mark.parametrize("mode, source", [
    ("bfly", lambda lane, by: lane ^ by), ("idx", lambda lane, by: by),
    ("down", lambda lane, by: min(lane + by, 31) if lane + by < 32 else lane),
    ("up", lambda lane, by: lane - by if lane >= by else lane),
])  # fmt: skip
@pytest.mark.parametrize("by", [1, 2, 16, 31])
def test_shuffles(mode, source, by):
    x = np.arange(100, 132, dtype=np.uint32)
    last = 0 if mode == "up" else 31
    mine = compute(f"shfl.sync.{mode}.b32", x, constants=(by, last, -1))
    assert mine.tolist() == [100 + source(lane, by) for lane in range(32)]


@pytest.mark.parametrize(
    "op", ["madc.hi.u32", "add.sat.s32", "add.cc.u32", "tex.2d.v4.f32", "mma.sync.aligned.m8n8k4.row"]
)
def test_what_is_unknown_is_refused_by_name(op):
    x = np.zeros(32, np.uint32)
    with pytest.raises(Unsupported, match=f"{op}.*does not know"):
        compute(op, x, x)


def test_a_wrong_number_of_operands_is_refused():
    with pytest.raises(Unsupported, match="add with 4 operands"):
        compute("add.s32", *[np.zeros(32, np.uint32)] * 3)


def test_an_array_of_each_thread():
    """Declared, reached by a generic address and by one of its own space; one thread's does not show in another's."""
    from .ptx_text import run

    out = np.zeros((32, 2), np.uint32)
    run(
        """
        .local .align 16 .b8 depot[16];
        mov.b32 %r1, depot; cvt.u64.u32 %d12, %r1; cvta.local.u64 %d12, %d12;
        st.b32 [%d12+8], %r0; st.local.b32 [%r1+12], %r1; ld.v2.b32 {%r2, %r3}, [%d12+8];
        mul.wide.u32 %d11, %r0, 8; add.u64 %d11, %d11, %d0; st.global.v2.b32 [%d11], {%r2, %r3};
        """,
        out,
    )
    assert (out == np.stack([np.arange(32), np.zeros(32)], 1)).all()
