"""The product with small floats, interpreted, against float64 of the restored numbers; and which layers use it."""

import pytest
import torch

pytest.importorskip("triton")

from optinfer.quantization import QuantizedLinear
from optinfer.quantization.formats import products
from optinfer.quantization.formats.products import quantized_matmul
from optinfer.quantization.formats.small_floats import BlockFloats, file_order, quantize_blocks
from optinfer_kernels.scaled_matmul import scaled_matmul

knows_e4m3 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="refused: this GPU knows no E4M3"
)


def made(scheme: str, rows: int, columns: int, block: str | int | None = None) -> BlockFloats:
    weight = torch.randn(
        rows, columns, generator=torch.Generator(torch.get_default_device()).manual_seed(rows + columns)
    )
    weight *= torch.logspace(-3, 1, rows)[:, None]  # scales far apart
    return quantize_blocks(weight.bfloat16(), scheme, block)


def tokens(count: int, columns: int) -> torch.Tensor:
    return torch.randn(
        count, columns, generator=torch.Generator(torch.get_default_device()).manual_seed(count)
    ).bfloat16()


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, relative to each output feature's size: small features count as much as large ones."""
    return float(((got.double() - wanted).abs() / wanted.norm(dim=0).clamp_min(1e-9)).max())


def codes(q: BlockFloats) -> torch.Tensor:
    return file_order(q.packed) if q.bits == 4 else q.packed


@knows_e4m3
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 8, 32), (3, 70, 160), (65, 66, 288)])
@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8", "fp8"])
def test_16_bit_tokens(scheme: str, count: int, rows: int, columns: int) -> None:
    """Products of bfloat16 by restored E2M1 and E4M3 are exact: what is left is the output's rounding."""
    q, x = made(scheme, rows, columns), tokens(count, columns)
    wanted = x.double() @ q.dequantize(torch.float64).T
    assert error(scaled_matmul(x, codes(q), q.scale), wanted) < 2**-8


@knows_e4m3
@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8", "nvfp4"])
def test_small_floats_by_small_floats(scheme: str) -> None:
    q, x = made(scheme, 40, 160), quantize_blocks(tokens(5, 160), scheme)
    alpha = None if q.tensor_scale is None else 1 / (q.tensor_scale * x.tensor_scale)
    wanted = x.dequantize(torch.float64) @ q.dequantize(torch.float64).T
    if scheme == "nvfp4" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (10, 0):
        with pytest.raises(ValueError, match="multiplied by hardware alone"):
            scaled_matmul(codes(x), codes(q), q.scale, x.scale, alpha)
        return
    got = scaled_matmul(codes(x), codes(q), q.scale, x.scale, alpha)
    # The formula rounds NVFP4's two scales to one float32 before it multiplies, the kernel after it.
    assert error(got, wanted) < 2**-8


@knows_e4m3
@pytest.mark.parametrize(
    ("scheme", "block"), [("mxfp8", None), ("fp8", None), ("fp8", "tensor")], ids=["mxfp8", "rows", "tensor"]
)
def test_layers_use_it_where_it_pays(scheme: str, block: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = made(scheme, 48, 96, block), tokens(6, 96).view(2, 3, 96)
    calls = []
    monkeypatch.setattr(products, "scaled_pays", lambda x: True)
    monkeypatch.setattr(products, "scaled_matmul", lambda *a: calls.append(a) or original(*a))
    bias = torch.randn(48).bfloat16()
    wanted = x.double() @ q.dequantize(torch.float64).T + bias.double()
    got = QuantizedLinear.from_quantized(q, bias)(x)
    assert len(calls) == 1 and got.dtype == torch.bfloat16
    assert error(got.flatten(0, 1), wanted.flatten(0, 1)) < 2**-7
    assert error(quantized_matmul(x, q, bias, backend="triton").flatten(0, 1), wanted.flatten(0, 1)) < 2**-7


original = products.scaled_matmul


@pytest.mark.parametrize(("scheme", "block"), [("fp8", 128), ("fp8_e5m2", None), ("nvfp4", None), ("mxfp4", None)])
def test_what_it_does_not_read_goes_by_the_formula(
    scheme: str, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, x = made(scheme, 136, 160, block), tokens(3, 160)
    monkeypatch.setattr(products, "scaled_pays", lambda x: True)
    monkeypatch.setattr(products, "cpu_pays", lambda x: False)
    monkeypatch.setattr(products, "scaled_matmul", None)  # not called
    wanted = torch.nn.functional.linear(x, q.dequantize(torch.bfloat16))
    assert torch.equal(QuantizedLinear.from_quantized(q)(x), wanted)


def test_it_pays_on_gpus_that_know_e4m3() -> None:
    knows = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    assert products.scaled_pays(tokens(2, 32).to("cuda" if knows else "cpu")) == knows


def test_refusals() -> None:
    q, x = made("fp8", 8, 32), tokens(2, 32)
    with pytest.raises(TypeError, match="float32 scales go with float8_e4m3fn codes"):
        scaled_matmul(x, codes(made("mxfp4", 8, 32)), q.scale)
    with pytest.raises(ValueError, match=r"scale must be torch.float32 \[8, 1\], got torch.float32 \[1, 1\]"):
        scaled_matmul(x, q.packed, q.scale[:1])
    with pytest.raises(TypeError, match="scale must be uint8"):
        scaled_matmul(x, q.packed, q.scale.half())
    with pytest.raises(ValueError, match="x has 16 columns and the weight 32"):
        scaled_matmul(x[:, :16], q.packed, q.scale)
    with pytest.raises(TypeError, match="x must be bfloat16, got torch.float16"):
        scaled_matmul(x.half(), q.packed, q.scale)
