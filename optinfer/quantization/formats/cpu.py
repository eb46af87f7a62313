"""Fused products on CPUs: a quantized tensor as the C++ kernels (`optinfer.cpu`) take it.

They read the stored bytes in their canonical order, where they lie, and round activations to 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optinfer.cpu import CpuWeight, kernels, linear
from optinfer.quantization.formats.small_floats import E2M1, BlockFloats
from optinfer.quantization.formats.tensor import NestedScale, QuantizedTensor
from optinfer.quantization.number_formats import DYNAMIC_INT8, codebook

__all__ = ["as_cpu_weight", "cpu_pays", "linear"]

_DYNAMIC = torch.tensor(DYNAMIC_INT8)


def cpu_pays(x: Tensor) -> bool:
    """Whether the kernels are for this input: 16 bits on a CPU, no gradient wanted, and a compiler here."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and kernels() is not None


def as_cpu_weight(q: QuantizedTensor, bias: Tensor | None = None) -> CpuWeight | None:
    """`q`'s tensors as the kernels read them, nothing copied; None for layouts that they do not read."""
    if len(q.shape) != 2 or q.group_index is not None or q.scheme == "llm_int8":
        return None
    rows, columns = q.shape
    if isinstance(q, BlockFloats):  # E2M1 is a codebook; its scales are read as float32
        if q.bits == 8 or columns % q.block_size:
            return None
        return CpuWeight.codebook_codes(
            q.packed, (rows, columns), q.block_size, torch.tensor(E2M1), q.scales().view(-1), bias=bias
        )
    if q.is_codebook:
        if isinstance(q.scale, NestedScale):
            nested = (_DYNAMIC, q.scale.absmax, q.scale.offset)
            return CpuWeight.codebook_codes(
                q.packed, (rows, columns), q.block_size, codebook(q.scheme), q.scale.codes, nested, bias
            )
        return CpuWeight.codebook_codes(q.packed, (rows, columns), q.block_size, codebook(q.scheme), q.scale, bias=bias)
    assert isinstance(q.scale, Tensor)  # only codebooks nest their scales
    return CpuWeight.linear_codes(q.packed, columns, q.bits, q.block_size, q.scale, q.zero_point, bias)
