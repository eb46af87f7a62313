"""Products with packed weights: the readable and the fast kernel, interpreted here and compiled where there is a GPU."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from optinfer import quantization
from optinfer.quantization.formats.gpu import as_kernel_weight
from optinfer.quantization.formats.products import quantized_matmul
from optinfer.quantization.formats.tensor import pack_bits
from optinfer.quantization.number_formats import CODEBOOKS
from optinfer_kernels import quantized_matmul as readable
from optinfer_kernels import quantized_matmul_fast as fast
from optinfer_kernels.int8_matmul import int8_matmul
from optinfer_kernels.quantized_arguments import INT4, QuantizedWeight

from .weights import FORMATS, make_weight, nibbles, restore

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def to_device(w: QuantizedWeight) -> QuantizedWeight:
    from dataclasses import fields, replace

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        if hasattr(value, "__dataclass_fields__"):
            return replace(value, **{f.name: move(getattr(value, f.name)) for f in fields(value)})
        return value

    return move(w)


def assert_exact(y, x, w, codebook_dtype):
    """Within one rounding of the output, and float32's roundings of the sums."""
    values = restore(w, codebook_dtype)
    expected = x.double() @ values.T
    absolute = x.double().abs() @ values.abs().T
    if w.zero_point is not None:  # code and zero point are summed apart
        spread = torch.arange(w.in_features) // w.group_size
        absolute += x.double().abs() @ (8 * w.scale.double()[:, spread]).T
    # Below the smallest normal number the spacing of y's dtype stays what it is there.
    size = expected.abs().clamp(min=torch.finfo(y.dtype).smallest_normal)
    bound = HALF_ULP[y.dtype] * size * 1.01 + 2.0**-20 * absolute
    assert ((y.double().cpu() - expected.cpu()).abs() <= bound.cpu()).all()


@pytest.mark.thorough
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(1, 64),
    st.integers(1, 70),
    st.sampled_from([(32, 1), (32, 3), (64, 2), (64, 5), (96, 2), (128, 1), (100, 1), (2, 1)]),
    st.integers(0, 2**32 - 1),
)
@example("fp4", torch.float16, 14, 17, (2, 1), 157)  # a product of 3.5e-5: subnormal in fp16
def test_both_kernels_are_exact(name, dtype, tokens, n, grouping, seed):
    """Odd numbers of rows, tokens and groups; one group per row of any even length."""
    torch.manual_seed(seed)
    group_size, groups = grouping
    w = make_weight(name, n, group_size * groups, group_size)
    x = torch.randn(tokens, w.in_features).to(dtype)
    y = readable.quantized_matmul(x.to(DEVICE), to_device(w))
    assert_exact(y, x, w, torch.float32)
    if dtype != torch.float32:
        y = fast.quantized_matmul(x.to(DEVICE), to_device(w))
        assert_exact(y, x, w, dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_splits_add_up(name, splits):
    """Splitting the columns changes only the order of float32 sums; some of 8 splits get nothing to do."""
    w = make_weight(name, 40, 64 * 9, 64, torch.bfloat16)
    x = torch.randn(3, w.in_features).bfloat16()
    y = fast.quantized_matmul(x.to(DEVICE), to_device(w), splits=splits)
    assert_exact(y, x, w, torch.bfloat16)


def test_wide_layers_split_by_themselves():
    w = make_weight("nf4", 64, 4096, 64)
    assert fast.choose_splits(w, fast.tile_for(1, 4, 64, 90), 1, processors=132) == 16
    assert fast.choose_splits(w, fast.tile_for(1, 4, 64, 90), 1, processors=8) == 16
    tall = QuantizedWeight(torch.zeros(256 * 600, 64, dtype=torch.uint8), torch.ones(256 * 600, 2), 64, INT4)
    assert fast.choose_splits(tall, fast.tile_for(1, 4, 64, 90), 1, processors=132) == 1


@pytest.mark.parametrize("name", ["nf4", "int4 affine", "int8"])
@pytest.mark.parametrize("splits", [1, 4])
def test_scales_by_group(name, splits):
    """The order of scales and zero points in memory changes no bit, ragged rows included."""
    w = make_weight(name, 37, 64 * 5, 64)
    assert {t.stride() for t in (w.by_group().scale, w.by_group().zero_point) if t is not None} == {(1, 37)}
    x = torch.randn(3, w.in_features).half().to(DEVICE)
    by_row, by_group = to_device(w), to_device(w).by_group()
    assert torch.equal(
        fast.quantized_matmul(x, by_row, splits=splits), fast.quantized_matmul(x, by_group, splits=splits)
    )
    assert torch.equal(readable.quantized_matmul(x, by_row), readable.quantized_matmul(x, by_group))


def test_nested_scales_keep_their_order():
    with pytest.raises(ValueError, match=r"scale must be contiguous with nested scales, got strides \(1, 8\)"):
        make_weight("nf4 nested", 8, 128, 64).by_group()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale):
    """Scales are float32 whatever x is: nothing overflows before the sum does."""
    w = make_weight("nf4", 16, 64, 64)
    w = QuantizedWeight(w.codes, w.scale * scale, 64, w.codebook)
    x = torch.randn(2, 64).bfloat16()
    assert_exact(fast.quantized_matmul(x.to(DEVICE), to_device(w)), x, w, torch.bfloat16)


@pytest.mark.parametrize(
    "name, options",
    [
        ("nf4", {}),
        ("nf4", {"double_quant": True}),
        ("fp4", {}),
        ("int4", {"group_size": 32}),
        ("int4", {"group_size": 64, "symmetric": False}),
        ("int4", {"group_size": "channel"}),
        ("int8", {}),
    ],
)
def test_tensors_of_the_package(name, options):
    """What `quantize` makes goes into the kernels as it is, and comes out as `dequantize` says."""
    weight = torch.randn(48, 192)
    if name in CODEBOOKS:
        q = quantization.quantize_4bit(weight, name, **options)
    else:
        q = quantization.quantize_linear(weight, int(name[3:]), **({"group_size": "channel"} | options))
    w = as_kernel_weight(q)
    assert w is not None and w.codes.data_ptr() == q.packed.data_ptr()
    torch.testing.assert_close(restore(w).float(), q.dequantize(torch.float32), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{"name": "nf4"}, {"name": "nf4", "double_quant": True}, {"name": "int8"}])
def test_a_layer_by_either_backend(options):
    """`quantized_matmul` by the kernel and by dequantization, batched input, with bias."""
    from optinfer.quantization.schemes import resolve_scheme

    linear = torch.nn.Linear(128, 40, dtype=torch.bfloat16)
    q = resolve_scheme(**options).quantize(linear.weight)
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    by_kernel = quantized_matmul(x, q, linear.bias, backend="triton")
    restored = quantized_matmul(x.float(), q, linear.bias.float(), backend="dequantize")
    torch.testing.assert_close(by_kernel.float(), restored, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="backend must be one of auto, triton, dequantize; got 'cuda'"):
        quantized_matmul(x, q, backend="cuda")


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 64), st.integers(1, 200), st.integers(1, 1100), st.integers(0, 2**32 - 1))
def test_int8_sums_are_exact(tokens, n, k, seed):
    torch.manual_seed(seed)
    a = torch.randint(-128, 128, (tokens, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    expected = (a.double() @ b.double().T).int()
    assert torch.equal(int8_matmul(a.to(DEVICE), b.to(DEVICE)).cpu(), expected.cpu())


def test_what_the_kernels_do_not_take():
    """Three bits, permuted columns, blocks that straddle rows: left to dequantization."""
    weight = torch.randn(48, 96)
    assert as_kernel_weight(quantization.quantize_linear(weight, 3, 32)) is None
    assert as_kernel_weight(quantization.quantize_4bit(weight, "nf4", 64)) is None
    assert as_kernel_weight(quantization.quantize_int8(weight)) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group_size": 0}, "group_size must be positive"),
        ({"group_size": 32}, r"scale must be \[8, 2\]"),
        ({"codebook": (0.0,) * 15}, "codebook must hold 16"),
        ({"codes": torch.zeros(8, 32)}, "codes must be uint8"),
        ({"codes": torch.zeros(0, 32, dtype=torch.uint8)}, "not empty"),
        ({"zero_point": torch.zeros(8, 5, dtype=torch.uint8)}, "zero_point must be"),
        ({"scale": torch.zeros(8, 1, dtype=torch.uint8)}, "nested"),
    ],
)
def test_bad_weights(change, message):
    fields = {"codes": torch.zeros(8, 32, dtype=torch.uint8), "scale": torch.ones(8, 1), "group_size": 64}
    with pytest.raises((TypeError, ValueError), match=message):
        QuantizedWeight(**({**fields, "codebook": INT4} | change))


def test_bad_input():
    w = make_weight("nf4", 8, 64, 64)
    with pytest.raises(ValueError, match=r"x must be \[tokens, 64\]"):
        fast.quantized_matmul(torch.randn(1, 63).half(), w)
    with pytest.raises(TypeError, match="float16, bfloat16"):
        fast.quantized_matmul(torch.randn(1, 64), w)
    with pytest.raises(ValueError, match="multiple of 32"):
        fast.quantized_matmul(torch.randn(1, 48).half(), make_weight("int4", 8, 48, 24))


def test_nibble_order_is_that_of_the_package():
    codes = torch.arange(16).repeat(4)[None]
    packed = pack_bits(codes, 4)
    assert torch.equal(nibbles(packed, 64), codes)
