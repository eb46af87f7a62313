"""Fused products on GPUs: a quantized tensor as our Triton kernels take it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from optinfer import hardware
from optinfer.quantization.formats.tensor import QuantizedTensor
from optinfer_kernels import TritonMissing
from optinfer_kernels.quantized_arguments import QuantizedWeight

__all__ = ["as_kernel_weight", "has_kernels", "kernel_matmul", "kernel_pays", "scaled_matmul", "scaled_pays"]

MAX_TOKENS = 64  # with more, restoring the weight once and a product of cuBLAS should win
TURING, AMPERE = (7, 5), (8, 0)  # compute capabilities


def kernel_matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` by the fused kernel, ``x [..., in]`` in float16 or bfloat16."""
    from optinfer_kernels import quantized_matmul_fast

    out = quantized_matmul_fast.quantized_matmul(x.reshape(-1, x.shape[-1]), weight)
    out = out.view(*x.shape[:-1], weight.out_features)
    return out if bias is None else out + bias.to(out.dtype)


def scaled_matmul(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with small floats in eight bits, ``x [..., in]`` in bfloat16."""
    from optinfer_kernels.scaled_matmul import scaled_matmul as kernel

    out = kernel(x.reshape(-1, x.shape[-1]).contiguous(), codes, scale).view(*x.shape[:-1], len(codes))
    return out if bias is None else out + bias.to(out.dtype)


def scaled_pays(x: Tensor) -> bool:
    """Whether the kernel for small floats in eight bits is for this input: as `kernel_pays`, in bfloat16, on a GPU that knows
    E4M3 (compute capability 8.9 and up).
    """
    return x.dtype == torch.bfloat16 and kernel_pays(x) and (hardware.capability(x.device) or (0, 0)) >= (8, 9)


def kernel_pays(x: Tensor) -> bool:
    """Whether the fused kernel is for this input: a few tokens in 16 bits on a GPU, fewer where it finds no tensor cores."""
    if x.dtype not in (torch.float16, torch.bfloat16) or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return 0 < x.numel() <= _most_tokens(x.device, x.dtype) * x.shape[-1]


@functools.cache
def _most_tokens(device: torch.device, dtype: torch.dtype) -> int:
    if has_kernels(device):
        return MAX_TOKENS
    if dtype == torch.float16 and has_kernels(device, TURING):
        from optinfer_kernels.quantized_matmul_fast import FEW_TOKENS

        return FEW_TOKENS
    return 0


@functools.cache
def has_kernels(device: torch.device, since: tuple[int, int] = AMPERE) -> bool:
    """Whether Triton is here and `device` a GPU of this compute capability or later; from Ampere on it uses tensor cores."""
    if device.type != "cuda":
        return False
    try:
        import optinfer_kernels.quantized_matmul_fast  # noqa: F401
    except TritonMissing:
        return False
    return (hardware.capability(device) or (0, 0)) >= since


def as_kernel_weight(q: QuantizedTensor) -> QuantizedWeight | None:
    """`q`'s tensors as the kernels read them, nothing copied; None for layouts that they do not read."""
    if len(q.shape) != 2 or q.shape[1] % 2:
        return None
    weight = q.kernel_weight()
    if weight is None:
        return None
    power_of_2 = q.group_size & -q.group_size
    return weight if weight.groups == 1 or power_of_2 >= 32 else None
