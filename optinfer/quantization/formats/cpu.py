"""Fused products on CPUs: a quantized tensor as the C++ kernels (`optinfer.cpu`) take it.

They read the stored bytes in their canonical order, where they lie, and round activations to 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optinfer.cpu import CpuWeight, kernels, linear
from optinfer.quantization.formats.tensor import QuantizedTensor

__all__ = ["as_cpu_weight", "cpu_pays", "linear"]


def cpu_pays(x: Tensor) -> bool:
    """Whether the kernels are for this input: 16 bits on a CPU, no gradient wanted, and a compiler here."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and kernels() is not None


def as_cpu_weight(q: QuantizedTensor, bias: Tensor | None = None) -> CpuWeight | None:
    """`q`'s tensors as the kernels read them, nothing copied; None for layouts that they do not read."""
    return q.cpu_weight(bias) if len(q.shape) == 2 else None
