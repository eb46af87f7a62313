"""Matrix products with quantized weights: the one place that decides how ``x @ W.T`` is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from optinfer.cpu import kernels
from optinfer.cpu import linear as cpu_linear
from optinfer.quantization.checks import check_choice
from optinfer.quantization.formats.gpu import as_kernel_weight, kernel_matmul, kernel_pays, scaled_matmul, scaled_pays
from optinfer.quantization.formats.llm_int8 import Int8Rows, int8_matmul
from optinfer.quantization.formats.tensor import QuantizedTensor

if TYPE_CHECKING:
    from optinfer.quantization.linear import QuantizedLinear

__all__ = ["dequantized_matmul", "layer_matmul", "quantized_matmul"]

Backend = Literal["auto", "triton", "dequantize"]


def quantized_matmul(
    x: Tensor, q: QuantizedTensor, bias: Tensor | None = None, threshold: float = 6.0, backend: Backend = "auto"
) -> Tensor:
    """``x @ W.T + bias`` for a quantized weight.

    Args:
        x: ``[..., in]``, floating point.
        q: ``[out, in]``, any scheme.
        bias: ``[out]``.
        threshold: of LLM.int8()'s outliers; other schemes do not use it.
        backend: "triton", the kernel that restores weights in registers (interpreted on a CPU, and slow there);
            "dequantize", rows restored and multiplied in turn; "auto", the kernel for few tokens on a GPU.

    Returns:
        ``[..., out]`` in `x.dtype`.

    Raises:
        ValueError: unknown backend, or one that cannot take this weight.
        TritonMissing: backend "triton" without Triton.
    """
    check_choice(backend, get_args(Backend), "backend")
    if isinstance(q, Int8Rows):
        return int8_matmul(x, q, threshold, bias)
    if backend == "triton":
        if (weight := as_kernel_weight(q)) is not None:
            return kernel_matmul(x, weight, bias)
        if (small := q.scaled_weight()) is not None:
            return scaled_matmul(x, *small, bias)
        raise ValueError(f"backend 'triton' cannot take {q!r}; use 'dequantize'")
    if backend == "auto" and kernel_pays(x) and (weight := as_kernel_weight(q)) is not None:
        return kernel_matmul(x, weight, bias)
    if backend == "auto" and scaled_pays(x) and (small := q.scaled_weight()) is not None:
        return scaled_matmul(x, *small, bias)
    return dequantized_matmul(x, q, bias)


def layer_matmul(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """`quantized_matmul` with a `QuantizedLinear`, which remembers how the kernels read its weight: by those of the device
    where they pay for this input and read the layout, else by the formula.
    """
    if x.is_cuda and kernel_pays(x) and (on_gpu := layer.gpu_weight()) is not None:
        return kernel_matmul(x, on_gpu, layer.bias)
    if cpu_pays(x) and (on_cpu := layer.cpu_weight()) is not None:
        return cpu_linear(x, on_cpu)
    return quantized_matmul(x, layer.quantized, layer.bias, layer.scheme.threshold)


def cpu_pays(x: Tensor) -> bool:
    """Whether the C++ kernels (`optinfer.cpu`) are for this input: 16 bits on a CPU, no gradient wanted, a compiler here."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and kernels() is not None


def dequantized_matmul(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """Restore some rows of the weight, multiply, go on: a whole layer is never held in full.

    Weights are restored in `x.dtype`; products are what `torch.nn.functional.linear` makes of them.
    """
    parts = [torch.nn.functional.linear(x, slab) for _, slab in q.slabs(x.dtype)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return out if bias is None else out + bias.to(out.dtype)
