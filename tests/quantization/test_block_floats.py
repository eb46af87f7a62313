"""Small floats: bit for bit torch's, compressed-tensors' and the specification's; whole models; files that others load."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optinfer.quantization import QuantizedLinear, memory_footprint, quantize, save_checkpoint
from optinfer.quantization.checkpoints.save import CheckpointError
from optinfer.quantization.footprint import allocated_bytes
from optinfer.quantization.formats.products import quantized_matmul
from optinfer.quantization.formats.small_floats import BLOCK_FORMATS, E2M1, file_order, mx_scales, quantize_blocks

SCHEMES = ("fp8", "mxfp8", "mxfp4", "nvfp4")


def weights(rows: int = 8, columns: int = 96, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return (torch.randn(rows, columns, generator=g) * torch.randn(rows, 1, generator=g).exp()).to(dtype)


# ---------------------------------------------------------------------------------------------- one number


def test_every_float8_is_restored_as_torch_reads_it() -> None:
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        every = every[every.float().isfinite()][None]
        q = quantize_blocks(every.float() / 2, name)  # half: the scale is then exactly one half
        assert float(q.scale) == 0.5 and torch.equal(q.packed.float(), every.float())
        assert torch.equal(q.dequantize(), every.float() / 2)


def test_fp4_values_are_those_of_the_specification() -> None:
    """OCP MX 1.0, table 4: sign, exponent with bias 1, one bit of mantissa; exponent 0 is subnormal."""
    for code, value in enumerate(E2M1):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        expected = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert value == (-expected if sign else expected)


@settings(deadline=None, max_examples=200)
@given(st.floats(-7, 7, width=32))
def test_a_number_goes_to_the_nearest_code_ties_to_even(value: float) -> None:
    row = torch.zeros(1, 32)
    row[0, 0], row[0, 1] = 6.0, value if abs(value) <= 6 else math.copysign(6, value)  # 6 makes the scale one
    q = quantize_blocks(row, "mxfp4")
    assert int(q.scale) == 127
    code = int(q.codes()[0, 1])
    distance = [abs(v - float(row[0, 1])) for v in E2M1]
    assert distance[code] == min(distance)
    nearest = {abs(E2M1[i]) for i in range(16) if distance[i] == min(distance)}
    if len(nearest) > 1:
        assert code % 2 == 0


@settings(deadline=None, max_examples=200)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_mx_scales(largest: float) -> None:
    """The specification: the exponent of the block's largest number, less the element's largest exponent."""
    x = torch.tensor([[largest]])
    for name, top in (("mxfp4", 2), ("mxfp8", 8)):
        exponent = math.frexp(largest)[1] - 1
        assert int(mx_scales(x, BLOCK_FORMATS[name], "floor")) == exponent - top + 127
        up = largest / 2.0**exponent >= 1.75
        assert int(mx_scales(x, BLOCK_FORMATS[name])) == exponent - top + 127 + up


# ---------------------------------------------------------------------------------------------- against compressed-tensors


def library(q, weight: torch.Tensor, preset: str) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of a weight with its own scales."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    group = scheme.weights.group_size
    groups = weight.unflatten(1, (-1, group))
    state = {"weight": weight}
    if preset.startswith("NV"):
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    state["weight_scale"], _ = calculate_qparams(
        groups.amin(-1), groups.amax(-1), scheme.weights, state.get("weight_global_scale")
    )
    name = {"NVFP4A16": "nvfp4-pack-quantized", "MXFP4A16": "mxfp4-pack-quantized", "MXFP8A16": "mxfp8-quantized"}[
        preset
    ]
    return BaseCompressor.get_value_from_registry(name).compress(state, scheme)


@pytest.mark.parametrize(("scheme", "preset"), [("nvfp4", "NVFP4A16"), ("mxfp4", "MXFP4A16"), ("mxfp8", "MXFP8A16")])
@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_compressed_tensors(scheme: str, preset: str, seed: int) -> None:
    weight = weights(seed=seed)
    weight[2] *= 1e-3  # scales far apart, some of NVFP4's near their smallest
    weight[3, :32] = 0
    q = quantize_blocks(weight, scheme)
    theirs = library(q, weight, preset)
    scale = theirs["weight_scale"]
    assert torch.equal(q.scale.view(torch.uint8), scale.view(torch.uint8))
    if q.bits == 4:
        assert torch.equal(file_order(q.packed), theirs["weight_packed"])
    else:
        assert torch.equal(q.packed.float(), theirs["weight"].float())
    if scheme == "nvfp4":
        assert torch.equal(q.tensor_scale, theirs["weight_global_scale"])


def test_torch_packs_pairs_as_files_do() -> None:
    """float4_e2m1fn_x2 is two codes in a byte, the first in the low half."""
    q = quantize_blocks(weights(), "mxfp4")
    low, high = file_order(q.packed) & 15, file_order(q.packed) >> 4
    assert torch.equal(torch.stack([low, high], -1).flatten(1), q.codes())
    if hasattr(torch, "float4_e2m1fn_x2"):
        assert file_order(q.packed).view(torch.float4_e2m1fn_x2).shape == (8, 48)


# ---------------------------------------------------------------------------------------------- the tensor


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([*SCHEMES, "fp8_e5m2"]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_any_shape_and_an_error_within_half_a_gap(scheme: str, rows: int, columns: int, seed: int) -> None:
    weight = weights(rows, columns, seed)
    q = quantize_blocks(weight, scheme)
    back = q.dequantize()
    assert back.shape == weight.shape and bool(back.isfinite().all())
    block = q.format.block or columns
    largest = torch.nn.functional.pad(weight, (0, -columns % block)).unflatten(1, (-1, block)).abs().amax(-1)
    # The widest gap is 2 of 6 for E2M1 and 32 of 448 for E4M3; a power of two may leave the scale up to a factor of two high,
    # NVFP4's is off by up to 1/16, and a block far below the tensor's largest may be lost altogether.
    widest = {"e2m1": 1 / 3, "e4m3": 32 / 448, "e5m2": 8192 / 57344}[q.format.element]
    allowed = largest * widest / 2 * (2 if "mx" in scheme else 1.07) + weight.abs().max() * 2.0**-8 * ("nv" in scheme)
    error = torch.nn.functional.pad((back - weight).abs(), (0, -columns % block)).unflatten(1, (-1, block)).amax(-1)
    assert bool((error <= allowed * 1.001 + 1e-9).all())
    again = quantize_blocks(back, scheme) if scheme in ("fp8", "mxfp4") else None
    if again is not None:
        torch.testing.assert_close(again.dequantize(), back, rtol=1e-6, atol=1e-9)


def test_bits_per_weight() -> None:
    weight = weights(64, 512)
    bits = {name: quantize_blocks(weight, name).bits_per_weight for name in SCHEMES}
    assert bits["mxfp4"] == 4.25 and bits["mxfp8"] == 8.25 and bits["nvfp4"] == 4.5 + 32 / weight.numel()


def test_fp8_scales_by_row_tensor_or_tile() -> None:
    weight = weights(200, 300)
    shapes = {None: (200, 1), "channel": (200, 1), "tensor": (1, 1), 128: (2, 3)}
    error = {}
    for block, shape in shapes.items():
        q = quantize_blocks(weight, "fp8", block)
        assert tuple(q.scale.shape) == shape
        for tile in ((0, 0), (150, 290)):
            assert q.rows(tile[0], tile[0] + 2)[0, tile[1]] == q.dequantize()[tile]
        error[block] = float((q.dequantize() - weight).square().mean())
    # Floats carry their own scale: how many scales there are decides little, until numbers become subnormal.
    assert max(error.values()) < 1.1 * min(error.values())
    weight[0] *= 2.0**-16
    rows = {block: quantize_blocks(weight, "fp8", block).dequantize()[0] for block in ("channel", "tensor")}
    assert (rows["channel"] - weight[0]).norm() < 0.1 * weight[0].norm() < (rows["tensor"] - weight[0]).norm()


def test_the_scale_with_a_mantissa_is_worth_its_bits() -> None:
    """At equal bits (blocks of 16), E4M3 scales beat powers of two; the reason to have NVFP4."""
    weight = weights(256, 512, dtype=torch.float32)
    nv = (quantize_blocks(weight, "nvfp4").dequantize() - weight).square().mean()
    groups = weight.view(-1, 16)  # an MX format with blocks of 16, by padding each to 32
    mx16 = quantize_blocks(torch.nn.functional.pad(groups, (0, 16)), "mxfp4").dequantize()[:, :16]
    assert nv < 0.85 * (mx16 - groups).square().mean()


# ---------------------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM(config).bfloat16().eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_computes_with_its_restored_weights(model, scheme: str, tmp_path) -> None:
    q = quantize(copy.deepcopy(model), scheme, progress=False)
    assert memory_footprint(model, scheme) == allocated_bytes(q)
    plain = copy.deepcopy(model)
    for name, layer in q.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(name).weight.data = layer.quantized.dequantize()
    tokens = torch.randint(3, 60, (1, 9))
    with torch.no_grad():
        ours, restored = q(tokens).logits.float(), plain(tokens).logits.float()
    assert float((ours - restored).norm() / restored.norm()) < 0.02
    q.save_pretrained(tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits.float(), ours, rtol=0.02, atol=0.02)
    for name, layer in q.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(back.get_submodule(name).quantized.dequantize(), layer.quantized.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(scheme: str, dtype: torch.dtype) -> None:
    weight, x = weights(48, 128).to(dtype), torch.randn(3, 128).to(dtype)
    q = quantize_blocks(weight, scheme)
    wanted = x.double() @ q.dequantize(torch.float64).T
    for got in (quantized_matmul(x, q), QuantizedLinear.from_quantized(q)(x)):
        assert float((got.double() - wanted).norm() / wanted.norm()) < (0.02 if dtype == torch.bfloat16 else 1e-5)


def test_the_kernels_for_codebooks_read_mxfp4() -> None:
    """E2M1 is a codebook of sixteen values: the Triton kernel (interpreted here) needs nothing new."""
    pytest.importorskip("triton")
    weight, x = weights(16, 64).half(), torch.randn(2, 64).half()
    q = quantize_blocks(weight, "mxfp4")
    wanted = x.double() @ q.dequantize(torch.float64).T
    got = quantized_matmul(x, q, backend="triton").double()
    assert float((got - wanted).norm() / wanted.norm()) < 2e-3
    with pytest.raises(ValueError, match="cannot take"):  # blocks of 16 are smaller than a tile's
        quantized_matmul(x, quantize_blocks(weight, "nvfp4"), backend="triton")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_transformers_loads_the_files(model, scheme: str, tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    q = quantize(copy.deepcopy(model), scheme, progress=False)
    folder = save_checkpoint(q, tmp_path / scheme)
    back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = torch.randint(3, 60, (1, 9))
    with torch.no_grad():
        ours, theirs, original = q(tokens).logits.float(), back(tokens).logits.float(), model(tokens).logits.float()
    assert float((theirs - ours).norm()) < 0.1 * float((ours - original).norm()) + 0.02 * float(ours.norm())


def test_refusals(model, tmp_path) -> None:
    q = quantize(copy.deepcopy(model), "mxfp4", progress=False)
    with pytest.raises(CheckpointError, match="mxfp4 has no place in format 'gptq'"):
        save_checkpoint(q, tmp_path / "x", format="gptq")
    for options, message in [
        ({"group_size": 64}, "group_size of mxfp4 must be one of 32; got 64"),
        ({"double_quant": True}, "double_quant goes with nf4 and fp4"),
        ({"symmetric": False}, "symmetric=False goes with"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize(copy.deepcopy(model), "mxfp4", progress=False, **options)
    with pytest.raises(ValueError, match="group_size of fp8 must be one of 'channel', 'tensor', 128; got 64"):
        quantize(copy.deepcopy(model), "fp8", group_size=64, progress=False)
