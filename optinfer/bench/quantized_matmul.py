"""Products with packed weights beside 16-bit ones, and beside other libraries' kernels, from 1 to 128 tokens.

Every peer quantizes the same weights, is checked against float64, and runs in a CUDA graph over copies that do not fit
the cache together. Figures are fractions of the machine's own ceiling: the bandwidth of a copy, measured in this run.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from optinfer import hardware
from optinfer.bench import random_model
from optinfer.bench.rows import QuantizedMatmulRow
from optinfer.bench.timing import copies_past_the_cache, in_turns, one_after_another
from optinfer.quantization.formats.gpu import as_kernel_weight
from optinfer.quantization.formats.grid import quantize_linear
from optinfer.quantization.formats.products import dequantized_matmul
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.schemes import resolve_scheme

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prepared:
    """One peer's packed copy of a weight: how to multiply with it, the bytes a product reads, and how to restore it."""

    apply: Apply
    nbytes: int
    restore: Callable[[], Tensor] | None = None  # None: its rounding is its own, only a loose check is possible


def run(quick: bool = False) -> list[QuantizedMatmulRow]:
    """Rows with peer, shape, tokens, median seconds, bytes read, fraction of copy bandwidth, speed over bf16, error."""
    device = hardware.default_device()
    rows = [copy_row(device)]
    cases = [(*shape, tokens) for shape in shapes(device, quick) for tokens in tokens_of(device, quick)]
    for out_features, in_features, tokens in tqdm(cases, desc="quantized_matmul", unit="product"):
        rows += compare(out_features, in_features, tokens, device, rows[0], quick)
    return rows + random_model.run(quick)


def shapes(device: torch.device, quick: bool) -> list[tuple[int, int]]:
    """[out, in] of layers of Llama-3-8B and 70B; on a CPU of the default model, and one large layer."""
    if device.type != "cuda":
        return [(576, 1536)] if quick else [(1536, 576), (576, 1536), (4096, 4096)]
    return [(4096, 14336)] if quick else [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]


def tokens_of(device: torch.device, quick: bool) -> tuple[int, ...]:
    if device.type != "cuda":
        return (1, 8) if quick else (1, 8, 64)
    return (1, 16) if quick else (1, 2, 4, 8, 16, 32, 64, 128)


def peers(device: torch.device) -> dict[str, Callable[[Tensor], Prepared]]:
    """Name -> function that packs a weight [out, in]."""
    found: dict[str, Callable[[Tensor], Prepared]] = {"torch bf16": _torch}
    variants: dict[str, dict[str, Any]] = {
        "nf4": {"name": "nf4"},
        "nf4 + double quantization": {"name": "nf4", "double_quant": True},
        "int4": {"name": "int4", "group_size": 64},
        "int4 affine": {"name": "int4", "group_size": 64, "symmetric": False},
        "int8": {"name": "int8", "group_size": "channel"},
    }
    for label, options in variants.items():
        found[f"optinfer {label}"] = functools.partial(_optinfer, **options)
    found["nf4, restored then multiplied"] = _restored
    if device.type == "cuda":
        found["optinfer nf4, readable kernel"] = _readable
        found["torch int4 (tinygemm)"] = _tinygemm
        found |= {"torchao int4": _torchao, "gemlite int4": _gemlite}
    return found | {"bitsandbytes nf4": _bitsandbytes}


def compare(
    out_features: int,
    in_features: int,
    tokens: int,
    device: torch.device,
    copy: QuantizedMatmulRow,
    quick: bool,
    most_copies: int | None = None,
) -> list[QuantizedMatmulRow]:
    """One row per peer on one product. A peer that is wrong is an error; one that cannot run has a `skipped` reason.

    copy: the ceiling, from `copy_row`.
    most_copies: of a packed weight, for rehearsals; None: as many as no cache holds.
    """
    dtype = hardware.default_dtype(device)
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator, device="cpu").mul_(0.02).to(device, dtype)
    x = torch.randn(tokens, in_features, generator=generator, device="cpu").to(device, dtype)
    names = QuantizedMatmulRow(out_features=out_features, in_features=in_features, tokens=tokens, dtype=str(dtype)[6:])
    rows: list[QuantizedMatmulRow] = []
    calls: dict[str, Callable[[], Any]] = {}
    copies: dict[str, int] = {}
    for name, prepare in peers(device).items():
        row = replace(names, peer=name)
        rows.append(row)
        if "readable" in name and tokens > 16:
            row.skipped = "one program per token: for few"
            continue
        try:
            first = prepare(weight)
            row.read_bytes, row.error = first.nbytes, check(name, first, weight, x)
            copies[name] = copies_past_the_cache(first.nbytes) if not quick or device.type == "cuda" else 2
            copies[name] = min(copies[name], most_copies or copies[name])
            packed = [first, *(prepare(weight) for _ in range(copies[name] - 1))]
            calls[name] = one_after_another([functools.partial(p.apply, x) for p in packed], device)
        except AssertionError:
            raise
        except Exception as error:  # another library's, of any kind: named in the row, and the others go on
            if name.startswith("optinfer"):
                raise
            row.skipped = f"{type(error).__name__}: {error}".split("\n")[0][:80]
    with torch.inference_mode():
        samples = in_turns(calls, device, repeats=5 if quick or device.type != "cuda" else 21)
    taken = {name: [s / copies[name] for s in own] for name, own in samples.items()}
    for row in rows:
        if row.peer in taken:
            _fill_in(row, taken[row.peer], statistics.median(taken["torch bf16"]), copy)
    return rows


def _fill_in(row: QuantizedMatmulRow, samples: list[float], in_16_bits: float, copy: QuantizedMatmulRow) -> None:
    """The figures that follow from the seconds of each product."""
    assert row.read_bytes is not None and copy.bytes_per_second is not None
    row.samples, row.seconds = samples, statistics.median(samples)
    row.bytes_per_second = row.read_bytes / row.seconds
    row.of_copy = row.bytes_per_second / copy.bytes_per_second
    row.over_bf16 = in_16_bits / row.seconds


def check(name: str, prepared: Prepared, weight: Tensor, x: Tensor) -> float:
    """Relative error of the product against float64; raises where it is more than rounding explains."""
    restored = weight if prepared.restore is None else prepared.restore()
    expected = x.double() @ restored.double().T
    error = ((prepared.apply(x).double() - expected).norm() / expected.norm()).item()
    limit = 0.2 if prepared.restore is None else 0.01
    if not error <= limit:
        raise AssertionError(f"{name} is off by {error:.3g} (allowed {limit}) for {list(weight.shape)} x {len(x)}")
    return error


def copy_row(device: torch.device) -> QuantizedMatmulRow:
    """Bandwidth of a copy far larger than the caches, counting what is read and what is written."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = in_turns({"copy": lambda: target.copy_(source)}, device, repeats=11)["copy"]
    seconds = statistics.median(samples)
    rate = 2 * source.nbytes / seconds
    return QuantizedMatmulRow(peer="copy", seconds=seconds, bytes_per_second=rate, of_copy=1.0, samples=samples)


# ---------------------------------------------------------------------------------------------------- the peers
def _torch(weight: Tensor) -> Prepared:
    weight = weight.clone()
    return Prepared(lambda x: F.linear(x, weight), weight.nbytes, lambda: weight)


def _optinfer(weight: Tensor, **options: Any) -> Prepared:
    layer = QuantizedLinear.from_quantized(resolve_scheme(**options).quantize(weight))
    q = layer.quantized
    return Prepared(layer, q.nbytes, functools.partial(q.dequantize, torch.float32))


def _restored(weight: Tensor) -> Prepared:
    q = resolve_scheme("nf4").quantize(weight)
    return Prepared(lambda x: dequantized_matmul(x, q), q.nbytes, functools.partial(q.dequantize, torch.float32))


def _readable(weight: Tensor) -> Prepared:
    from optinfer_kernels.quantized_matmul import quantized_matmul

    q = resolve_scheme("nf4").quantize(weight)
    packed = as_kernel_weight(q)
    assert packed is not None
    return Prepared(lambda x: quantized_matmul(x, packed), q.nbytes, functools.partial(q.dequantize, torch.float32))


def _tinygemm(weight: Tensor) -> Prepared:
    """torch's own int4 product (the one behind torchao): affine, groups of 64, offsets in bfloat16."""
    q = quantize_linear(weight, 4, 64, symmetric=False)
    codes = q.codes().to(torch.uint8)
    scale = q.scale.float()
    zero = (8.0 - q.zero_points().float()) * scale
    scale_and_zero = torch.stack([scale, zero], -1).transpose(0, 1).bfloat16().contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    return Prepared(
        lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 64, scale_and_zero),
        packed.nbytes + scale_and_zero.nbytes,
    )


def _torchao(weight: Tensor) -> Prepared:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = _linear(weight)
    quantize_(linear, Int4WeightOnlyConfig(group_size=64))
    return Prepared(linear, weight.numel() // 2 + weight.numel() // 64 * 4)


def _gemlite(weight: Tensor) -> Prepared:
    from gemlite import DType, GemLiteLinear

    q = quantize_linear(weight, 4, 64, symmetric=False)
    kind = DType.BF16 if weight.dtype == torch.bfloat16 else DType.FP16
    layer = GemLiteLinear(4, 64, weight.shape[1], weight.shape[0], input_dtype=kind, output_dtype=kind)
    layer.pack(q.codes(), q.scale.reshape(-1, 1), q.zero_points().to(q.scale.dtype).reshape(-1, 1))
    return Prepared(layer, q.nbytes, functools.partial(q.dequantize, torch.float32))


def _bitsandbytes(weight: Tensor) -> Prepared:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer.to(weight.device)
    nbytes = layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes

    def restore() -> Tensor:  # its bytes are ours: that is tested elsewhere
        return resolve_scheme("nf4").quantize(weight).dequantize(torch.float32)

    return Prepared(layer.eval(), nbytes, restore)


def _linear(weight: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return linear
