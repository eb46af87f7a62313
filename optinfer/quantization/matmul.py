"""Matrix products with quantized weights: the one place that decides how ``x @ W.T`` is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from optinfer.quantization.int8 import int8_matmul
from optinfer.quantization.tensor import QuantizedTensor

__all__ = ["dequantized_matmul", "quantized_matmul"]


def quantized_matmul(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None, threshold: float = 6.0) -> Tensor:
    """``x @ W.T + bias`` for a quantized weight.

    Args:
        x: ``[..., in]``, floating point.
        q: ``[out, in]``, any scheme.
        bias: ``[out]``.
        threshold: of LLM.int8()'s outliers; other schemes do not use it.

    Returns:
        ``[..., out]`` in `x.dtype`.
    """
    if q.scheme == "llm_int8":
        return int8_matmul(x, q, threshold, bias)
    # A fused GPU kernel, which restores weights in registers, belongs here: `if x.is_cuda and supports(q)`.
    return dequantized_matmul(x, q, bias)


def dequantized_matmul(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """Restore some rows of the weight, multiply, go on: a whole layer is never held in full.

    Weights are restored in `x.dtype`; products are what `torch.nn.functional.linear` makes of them.
    """
    parts = [torch.nn.functional.linear(x, slab) for _, slab in q.slabs(x.dtype)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return out if bias is None else out + bias.to(out.dtype)
