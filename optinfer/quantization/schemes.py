"""The schemes by name: how each one turns a weight into stored tensors, and how large those are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from optinfer.quantization.checks import check_choice
from optinfer.quantization.formats.codebook import CodebookTensor
from optinfer.quantization.formats.grid import BITS, GridTensor
from optinfer.quantization.formats.llm_int8 import Int8Rows
from optinfer.quantization.formats.q4_1 import GROUP as Q4_1_GROUP
from optinfer.quantization.formats.q4_1 import Q41Tensor
from optinfer.quantization.formats.small_floats import BLOCK_FORMATS, BlockFloats
from optinfer.quantization.formats.tensor import GroupSize, QuantizedTensor, Stored
from optinfer.quantization.number_formats import CODEBOOKS

__all__ = ["SCHEMES", "Scheme", "SchemeName", "resolve_scheme"]

SchemeName = Literal[
    "int8", "llm_int8", "int4", "int3", "int2", "nf4", "fp4", "fp8", "mxfp8", "mxfp4", "nvfp4", "q4_1"
]  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """A scheme with its options settled.

    Attributes:
        name: ``int8 llm_int8 int4 int3 int2 nf4 fp4 fp8 mxfp8 mxfp4 nvfp4 q4_1``.
        group_size: weights per scale; 0: one scale per row; -1: one for the tensor (fp8 only).
        double_quant: nf4 and fp4 only: store the scales in 8 bits too.
        symmetric: int2 … int8 only: no zero points.
        threshold: llm_int8 only: features this large stay in 16 bits.
        act_order: int2 … int8 only: columns carry their group's index (GPTQ's activation order).
    """

    name: str
    group_size: int = 0
    double_quant: bool = False
    symmetric: bool = True
    threshold: float = 6.0
    act_order: bool = False

    @property
    def format(self) -> type[QuantizedTensor]:
        """The class of this scheme's tensors: how they are made, stored, restored and multiplied."""
        return _FORMATS[self.name][0]

    @property
    def bits(self) -> int:
        return _FORMATS[self.name][1]

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Quantize one weight ``[out, in]``."""
        return self.format.make(weight, self)

    def stored(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
        """Shape and dtype of every tensor that `quantize` stores, by the names of `QuantizedTensor.tensors`."""
        return self.format.stored(self, shape, dtype)

    def nbytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes that a weight of this shape takes when quantized."""
        return sum(math.prod(s) * d.itemsize for s, d in self.stored(shape, dtype).values())

    def assemble(self, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> QuantizedTensor:
        """The QuantizedTensor around stored tensors: the inverse of `QuantizedTensor.tensors`."""
        return self.format.assemble(self, tensors, shape, dtype)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, q: QuantizedTensor) -> Scheme:
        """The scheme that a quantized tensor was made by."""
        return cls(q.scheme, q.settled_group(), q.double_quant, q.symmetric, act_order=q.group_index is not None)


_FORMATS: dict[str, tuple[type[QuantizedTensor], int]] = {
    **{f"int{bits}": (GridTensor, bits) for bits in BITS},
    **dict.fromkeys(CODEBOOKS, (CodebookTensor, 4)),
    **{name: (BlockFloats, form.bits) for name, form in BLOCK_FORMATS.items()},
    "llm_int8": (Int8Rows, 8),
    "q4_1": (Q41Tensor, 4),
}

# Defaults: 8 bits need no groups; below that, groups of 64 divide the layers of small models where 128 does
# not.
SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme("int8"),
    "llm_int8": Scheme("llm_int8"),
    "int4": Scheme("int4", 64),
    "int3": Scheme("int3", 64),
    "int2": Scheme("int2", 64),
    "nf4": Scheme("nf4", 64),
    "fp4": Scheme("fp4", 64),
    "fp8": Scheme("fp8"),
    "mxfp8": Scheme("mxfp8", 32),
    "mxfp4": Scheme("mxfp4", 32),
    "nvfp4": Scheme("nvfp4", 16),
    "q4_1": Scheme("q4_1", Q4_1_GROUP),
}


def resolve_scheme(
    name: SchemeName,
    group_size: GroupSize = None,
    double_quant: bool = False,
    symmetric: bool = True,
    threshold: float = 6.0,
) -> Scheme:
    """A scheme by name, with options checked.

    Args:
        group_size: None: the scheme's default. nf4, fp4: 32 … 4096; int2 … int8: any positive int, or
            ``"channel"`` for one scale per row; llm_int8 has one per row always; fp8: ``"channel"``, ``"tensor"`` or 128;
            the MX formats and nvfp4 have blocks of their own.

    Raises:
        ValueError: an unknown scheme (the message lists the known), or an option that the scheme does not have.
    """
    check_choice(name, tuple(SCHEMES), "scheme")
    options = {"double_quant": double_quant, "symmetric": symmetric, "threshold": threshold}
    return SCHEMES[name].format.settle(SCHEMES[name], group_size, options)
