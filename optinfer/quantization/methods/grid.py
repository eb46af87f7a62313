"""What the methods round to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optinfer.quantization.formats.grid import GridTensor, quantize_linear, round_linear
from optinfer.quantization.formats.tensor import GroupSize

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """Equally spaced values, and how many weights share their spacing.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, or a word, see `quantize_linear`.
        symmetric: around zero; False: each group has a zero point.
    """

    bits: int
    group_size: GroupSize
    symmetric: bool

    def quantize(self, weight: Tensor) -> GridTensor:
        """Round a weight ``[out, in]`` to nearest, and pack it."""
        return quantize_linear(weight, self.bits, self.group_size, self.symmetric)

    def round(self, weight: Tensor) -> Tensor:
        """The values that `quantize` restores, without packing them."""
        return round_linear(weight, self.bits, self.group_size, self.symmetric)
