"""Fused products on GPUs: a quantized tensor as our Triton kernels take it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from optinfer import hardware
from optinfer.quantization.formats.small_floats import E2M1, BlockFloats
from optinfer.quantization.formats.tensor import NestedScale as NestedTensor
from optinfer.quantization.formats.tensor import QuantizedTensor
from optinfer.quantization.number_formats import CODEBOOKS, DYNAMIC_INT8
from optinfer_kernels import TritonMissing
from optinfer_kernels.quantized_arguments import INT4, NestedScale, QuantizedWeight, codebook_tensor

__all__ = ["as_kernel_weight", "has_kernels", "kernel_matmul", "kernel_pays"]

MAX_TOKENS = 64  # with more, restoring the weight once and a product of cuBLAS should win


def kernel_matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` by the fused kernel, ``x [..., in]`` in float16 or bfloat16."""
    from optinfer_kernels import quantized_matmul_fast

    out = quantized_matmul_fast.quantized_matmul(x.reshape(-1, x.shape[-1]), weight)
    out = out.view(*x.shape[:-1], weight.out_features)
    return out if bias is None else out + bias.to(out.dtype)


def kernel_pays(x: Tensor) -> bool:
    """Whether the fused kernel is for this input: a few tokens in 16 bits on a GPU with tensor cores for them."""
    if x.dtype not in (torch.float16, torch.bfloat16) or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return 0 < x.numel() <= MAX_TOKENS * x.shape[-1] and has_kernels(x.device)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton is here and `device` is a GPU whose tensor cores it can use (compute capability 8.0 and up)."""
    if device.type != "cuda":
        return False
    try:
        import optinfer_kernels.quantized_matmul_fast  # noqa: F401
    except TritonMissing:
        return False
    return (hardware.capability(device) or (0, 0)) >= (8, 0)


def as_kernel_weight(q: QuantizedTensor) -> QuantizedWeight | None:
    """`q`'s tensors as the kernels read them, nothing copied; None for layouts that they do not read."""
    if len(q.shape) != 2 or q.group_index is not None or q.shape[1] % 2:
        return None
    rows, columns = q.shape
    nested = None
    codebook: tuple[float, ...] | None
    if isinstance(q, BlockFloats):  # E2M1 is a codebook; its scales are read as float32
        if q.bits == 8 or columns % q.block_size:
            return None
        codes, scale, codebook = q.packed, q.scales(), E2M1
    elif q.is_codebook:
        if columns % q.block_size:  # a block goes on in the next row
            return None
        codes, codebook = q.packed.view(rows, columns // 2), tuple(CODEBOOKS[q.scheme])
        stored = q.scale
        if isinstance(stored, NestedTensor):
            table = codebook_tensor(DYNAMIC_INT8, torch.float32, q.device)
            nested = NestedScale(stored.absmax, stored.offset, table)
            stored = stored.codes
        scale = stored.view(rows, columns // q.block_size)
    elif q.scheme == "int4" or (q.scheme == "int8" and q.symmetric):
        if isinstance(q.scale, NestedTensor) or q.scale.shape[0] != rows:
            return None
        codes, scale, codebook = q.packed, q.scale, INT4 if q.scheme == "int4" else None
    else:
        return None
    weight = QuantizedWeight(codes, scale, q.block_size, codebook, q.zero_point, nested)
    power_of_2 = q.block_size & -q.block_size
    return weight if weight.groups == 1 or power_of_2 >= 32 else None
