"""Weights laid out once for a CPU's 16-bit matrix products, instead of at every call (oneDNN, through torch).

A product of few rows is mostly reading its weight; laying the weight out anew each time reads and writes it once more.
"""

import torch
from torch import Tensor

_TYPICAL_ROWS = 16  # that oneDNN chooses its layout for


def can_pack(weight: Tensor) -> bool:
    """Whether this torch and this processor have oneDNN's products for a weight like this one: bf16, on the CPU."""
    plain = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return plain and torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedWeight:
    """`x @ W.T + b` from a copy of W [out, in] in oneDNN's own layout; what follows the product is part of it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _TYPICAL_ROWS)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
