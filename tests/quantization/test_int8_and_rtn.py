"""LLM.int8() against bitsandbytes; round to nearest against float64; number formats against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optinfer.quantization import FORMATS, int8_matmul, quantize_int8, quantize_linear
from optinfer.quantization.formats.grid import round_linear
from optinfer.quantization.formats.llm_int8 import quantize_activations


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("tokens", (1, 5, 40))
@pytest.mark.parametrize("threshold", (0.0, 6.0))
def test_statistics_and_outputs_of_bitsandbytes(dtype, tokens, threshold):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(tokens)
    weight = (torch.randn(96, 160) * 0.1).to(dtype)
    x, bias = torch.randn(tokens, 160).to(dtype), torch.randn(96).to(dtype)
    x[tokens // 2, 7], x[0, 30] = 9, -20
    q = quantize_int8(weight)
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight)
    assert torch.equal(q.packed, codes)
    assert torch.equal(q.absmax, absmax)
    assert torch.equal(q.dequantize(), bnb.functional.int8_vectorwise_dequant(codes, absmax).to(dtype))

    a = quantize_activations(x, threshold)
    theirs = bnb.functional.int8_vectorwise_quant(x.half().clone(), threshold=threshold)
    assert torch.equal(a.codes, theirs[0])
    assert torch.equal(a.absmax, theirs[1])
    assert a.outliers.tolist() == ([7, 30] if threshold else [])

    state = bnb.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.is_training = codes, absmax, False, False
    state.threshold = threshold
    expected = bnb.matmul(x, weight, state=state, threshold=threshold, bias=bias)
    assert torch.equal(int8_matmul(x, q, threshold, bias), expected)


def test_outliers_break_int8_and_decomposition_repairs_it():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256), torch.randn(128, 256) * 0.05
    x[:, 17] *= 60
    exact = x @ weight.T
    q = quantize_int8(weight)
    error = [((int8_matmul(x, q, t) - exact).norm() / exact.norm()).item() for t in (0.0, 6.0)]
    assert error[1] < error[0] / 4


def test_zero_rows_and_huge_activations():
    weight = torch.randn(4, 64)
    weight[1] = 0
    q = quantize_int8(weight)
    assert torch.equal(q.dequantize()[1], torch.zeros(64))
    out = int8_matmul(torch.full((3, 64), 1e30), q, threshold=0.0)
    assert torch.isfinite(out).all()
    assert int8_matmul(torch.zeros(0, 64), q).shape == (0, 4)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 150),
    bits=st.sampled_from((2, 3, 4, 8)),
    group=st.one_of(st.integers(1, 70), st.sampled_from(("channel", "tensor", -1, None))),
    symmetric=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**31),
)
def test_round_to_nearest_errs_by_half_a_step_at_most(rows, columns, bits, group, symmetric, dtype, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)).to(
        dtype
    )
    q = quantize_linear(weight, bits, group, symmetric)
    step = q._per_column(q.scale.double()).expand(rows, -1)
    error = (q.dequantize(torch.float64) - weight.double()).abs()
    # Half a step; the rounding of scales to 16 bits and of zero points may cut the ends of the range by a little.
    clipped = 0.5 if symmetric else 1.0
    slack = 1e-5 if dtype == torch.float32 else 2**-7 * (1 << bits)
    assert (error <= step * (clipped + slack) + 1e-7).all()
    assert q.codes().shape == weight.shape
    zero = quantize_linear(torch.zeros(rows, columns).to(dtype), bits, group, symmetric)
    assert not zero.dequantize().any()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("group", (32, "channel", "tensor"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_rounding_without_packing_gives_the_same_values(bits, symmetric, group, dtype):
    weight = torch.randn(9, 70).to(dtype)
    weight[3] = 0
    rounded = round_linear(weight, bits, group, symmetric)
    assert torch.equal(rounded, quantize_linear(weight, bits, group, symmetric).dequantize())
    assert rounded.dtype == dtype


def test_half_a_step_is_tight():
    """The bound above could not be a third of a step."""
    weight = torch.linspace(-1, 1, 1001)[None]
    q = quantize_linear(weight, 4, "tensor")
    assert (q.dequantize() - weight).abs().max() / q.scale.item() > 0.49


def test_zero_is_exact():
    weight = torch.randn(8, 64) + 3
    weight[:, 5] = 0
    for symmetric in (True, False):
        assert not quantize_linear(weight, 4, 32, symmetric).dequantize()[:, 5].any()


@pytest.mark.parametrize(("options", "words"), [
    ({"bits": 5}, "bits must be one of"),
    ({"group_size": 0}, "group_size must be"),
    ({"group_size": 2.5}, "group_size must be"),
    ({"group_size": "row"}, "group_size must be"),
])  # fmt: skip
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        quantize_linear(torch.randn(4, 64), **options)


@pytest.mark.parametrize("weight", (torch.tensor([[float("nan")]]), torch.empty(0, 3), torch.randn(3)))
@pytest.mark.parametrize("quantizer", (quantize_linear, quantize_int8))
def test_bad_weights(weight, quantizer):
    with pytest.raises(ValueError, match="weight"):
        quantizer(weight)


def test_mismatched_product():
    q = quantize_int8(torch.randn(4, 64))
    with pytest.raises(ValueError, match="32 features, the weight takes 64"):
        int8_matmul(torch.randn(2, 32), q)
    with pytest.raises(ValueError, match="threshold"):
        int8_matmul(torch.randn(2, 64), q, threshold=-1)


@pytest.mark.parametrize("name", ["FP16", "BF16", "FP8 E4M3", "FP8 E5M2"])
def test_formats_are_those_of_torch(name):
    f = FORMATS[name]
    patterns = torch.arange(1 << f.bits, dtype=torch.int32).to(torch.uint8 if f.bits == 8 else torch.uint16)
    assert np.array_equal(patterns.view(f.dtype).double().numpy(), f.table(), equal_nan=True)
    info = torch.finfo(f.dtype)
    assert (f.max, f.smallest) == (info.max, info.smallest_normal * 2.0**-f.mantissa_bits)
    for value in torch.randn(50).tolist():
        assert f.round(value) == torch.tensor(value).double().to(f.dtype).double().item()


def test_fields_cover_all_bits():
    for f in FORMATS.values():
        digits = "".join(bits for _, bits in f.fields(f.encode(0.3)))
        assert len(digits) == f.bits
        assert int(digits, 2) == f.encode(0.3)
    assert FORMATS["FP32"].fields(FORMATS["FP32"].encode(-1.0))[0] == ("sign", "1")
