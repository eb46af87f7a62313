"""Small floats in compressed-tensors files, as vLLM reads them.

=======  ======================  =====================================================================================
scheme   format                  tensors of a linear layer ``[out, in]``
=======  ======================  =====================================================================================
fp8      naive-quantized         ``weight`` float8 ``[out, in]``, ``weight_scale`` ``[out, 1]``, ``[1]`` or tiles
mxfp8    mxfp8-quantized         ``weight`` float8, ``weight_scale`` uint8 (E8M0) ``[out, in/32]``
mxfp4    mxfp4-pack-quantized    ``weight_packed`` uint8 ``[out, in/2]``, ``weight_scale`` uint8 (E8M0) ``[out, in/32]``
nvfp4    nvfp4-pack-quantized    ``weight_packed``, ``weight_scale`` float8 ``[out, in/16]``, ``weight_global_scale`` ``[1]``
=======  ======================  =====================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optinfer.quantization.checkpoints.compressed_tensors import configuration
from optinfer.quantization.checks import CheckpointError
from optinfer.quantization.formats.small_floats import BlockFloats, file_order
from optinfer.quantization.formats.tensor import QuantizedTensor

__all__ = ["convert"]

_FORMATS = {
    "fp8": "naive-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}


def convert(
    layers: dict[str, QuantizedTensor], format: str, plain: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors by full name, and the `quantization_config`. `plain`: linear layers that are not quantized.

    Raises CheckpointError: another format; layers of several schemes; columns that do not fill blocks.
    """
    blocks = {name: q for name, q in layers.items() if isinstance(q, BlockFloats)}
    first_name, first = next(iter(blocks.items()))
    kind = first.scheme
    if format != "compressed-tensors":
        raise CheckpointError(f"{kind} has no place in format {format!r}; write format='compressed-tensors'")
    if kind not in _FORMATS:
        raise CheckpointError(f"{kind} is not a scheme of compressed-tensors")
    for name, q in layers.items():
        if q.scheme != kind or _strategy(q) != _strategy(first):
            raise CheckpointError(
                f"{name} ({q.scheme}) differs from {first_name} ({kind}): one checkpoint holds one scheme"
            )
        if q.shape[1] % (first.format.block or 1):
            raise CheckpointError(f"{name}: {q.shape[1]} inputs are not whole blocks of {first.format.block} columns")
    tensors = {f"{name}.{k}": v for name, q in blocks.items() for k, v in _file_tensors(q).items()}
    weights: dict[str, Any] = {
        "num_bits": first.bits,
        "type": "float",
        "symmetric": True,
        "strategy": _strategy(first),
        "group_size": first.format.block or None,
        "block_structure": [128, 128] if _strategy(first) == "block" else None,
        "dynamic": False,
        "observer": "minmax",
    }
    if first.format.block:
        weights["scale_dtype"] = weights["zp_dtype"] = str(first.format.scale)
    return tensors, configuration(_FORMATS[kind], weights, plain)


def _strategy(q: QuantizedTensor) -> str | None:
    if not isinstance(q, BlockFloats):
        return None
    if q.format.block:
        return "tensor_group" if q.tensor_scale is not None else "group"
    assert isinstance(q.scale, Tensor)
    if q.scale.shape == (q.shape[0], 1):
        return "channel"
    return "tensor" if q.scale.numel() == 1 and q.group_size == q.shape[1] else "block"


def _file_tensors(q: BlockFloats) -> dict[str, Tensor]:
    assert isinstance(q.scale, Tensor)
    scale = q.scale.view(1) if _strategy(q) == "tensor" else q.scale
    if not q.format.block:
        scale = scale.to(q.dtype) if q.dtype != torch.float16 else scale.float()
    if q.bits == 8:
        return {"weight": q.packed, "weight_scale": scale}
    tensors = {"weight_packed": file_order(q.packed), "weight_scale": scale}
    if q.tensor_scale is not None:
        tensors["weight_global_scale"] = q.tensor_scale
    return tensors
