"""The schemes by name: how each one turns a weight into stored tensors, and how large those are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optinfer.quantization.checks import check_block_size, check_choice
from optinfer.quantization.formats.codebook import quantize_4bit
from optinfer.quantization.formats.grid import quantize_linear, resolve_group_size
from optinfer.quantization.formats.llm_int8 import quantize_int8
from optinfer.quantization.formats.small_floats import (
    BLOCK_FORMATS,
    BlockFloats,
    check_block,
    quantize_blocks,
    stored_blocks,
)
from optinfer.quantization.formats.tensor import NestedScale, QuantizedTensor, packed_width
from optinfer.quantization.number_formats import CODEBOOKS

__all__ = ["SCHEMES", "Scheme", "resolve_scheme"]


@dataclass(frozen=True)
class Scheme:
    """A scheme with its options settled.

    Attributes:
        name: ``int8 llm_int8 int4 int3 int2 nf4 fp4 fp8 mxfp8 mxfp4 nvfp4``.
        block_size: weights per scale; 0: one scale per row; -1: one for the tensor (fp8 only).
        double_quant: nf4 and fp4 only: store the scales in 8 bits too.
        symmetric: int2 … int8 only: no zero points.
        threshold: llm_int8 only: features this large stay in 16 bits.
        act_order: int2 … int8 only: columns carry their group's index (GPTQ's activation order).
    """

    name: str
    block_size: int = 0
    double_quant: bool = False
    symmetric: bool = True
    threshold: float = 6.0
    act_order: bool = False

    @property
    def bits(self) -> int:
        if self.name in BLOCK_FORMATS:
            return BLOCK_FORMATS[self.name].bits
        return 4 if self.name in CODEBOOKS else 8 if self.name == "llm_int8" else int(self.name[3:])

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Quantize one weight ``[out, in]``."""
        if self.name in BLOCK_FORMATS:
            return quantize_blocks(
                weight, self.name, {0: "channel", -1: "tensor"}.get(self.block_size, self.block_size)
            )
        if self.name in CODEBOOKS:
            return quantize_4bit(weight, self.name, self.block_size, self.double_quant)
        if self.name == "llm_int8":
            return quantize_int8(weight)
        return quantize_linear(weight, self.bits, self.block_size or "channel", self.symmetric)

    def stored(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that `quantize` stores, by the names of `QuantizedTensor.tensors`."""
        if self.name in BLOCK_FORMATS:
            return stored_blocks(BLOCK_FORMATS[self.name], self.block_size, shape)
        rows, columns = shape
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if self.name in CODEBOOKS:
            n = rows * columns
            blocks = -(-n // self.block_size)
            stored = {"packed": (((n + 1) // 2, 1), torch.uint8)}
            if not self.double_quant:
                return stored | {"absmax": ((blocks,), torch.float32)}
            return stored | {
                "absmax": ((blocks,), torch.uint8),
                "nested_absmax": ((-(-blocks // NestedScale.BLOCK),), torch.float32),
                "nested_offset": ((), torch.float32),
            }
        if self.name == "llm_int8":
            return {"packed": (shape, torch.int8), "absmax": ((rows,), torch.float32)}
        groups = -(-columns // resolve_group_size(self.block_size or "channel", torch.Size(shape)))
        if self.bits == 8 and self.symmetric:
            stored = {"packed": (shape, torch.int8)}
        else:
            stored = {"packed": ((rows, packed_width(columns, self.bits)), torch.uint8)}
        stored["scale"] = ((rows, groups), dtype)
        if not self.symmetric:
            stored["zero_point"] = ((rows, packed_width(groups, self.bits)), torch.uint8)
        if self.act_order:
            stored["group_index"] = ((columns,), torch.int32)
        return stored

    def nbytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes that a weight of this shape takes when quantized."""
        return sum(math.prod(s) * d.itemsize for s, d in self.stored(shape, dtype).values())

    def assemble(self, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> QuantizedTensor:
        """The QuantizedTensor around stored tensors: the inverse of `QuantizedTensor.tensors`."""
        if self.name in BLOCK_FORMATS:
            block = self.block_size if self.block_size > 0 else shape[1]
            return BlockFloats(
                tensors["packed"], tensors["scale"], torch.Size(shape), dtype, self.name, self.bits, block,
                tensor_scale=tensors.get("tensor_scale"),
            )  # fmt: skip
        scale: Tensor | NestedScale
        if self.double_quant:
            scale = NestedScale(tensors["absmax"], tensors["nested_absmax"], tensors["nested_offset"])
        else:
            scale = tensors["absmax"] if "absmax" in tensors else tensors["scale"]
        return QuantizedTensor(
            packed=tensors["packed"],
            scale=scale,
            shape=torch.Size(shape),
            dtype=dtype,
            scheme=self.name,
            bits=self.bits,
            block_size=self.block_size or shape[1],
            zero_point=tensors.get("zero_point"),
            group_index=tensors.get("group_index"),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, q: QuantizedTensor) -> Scheme:
        """The scheme that a quantized tensor was made by."""
        if isinstance(q, BlockFloats):
            assert isinstance(q.scale, Tensor)
            wholes: dict[tuple[int, ...], int] = {(1, 1): -1, (q.shape[0], 1): 0}
            whole = wholes.get(tuple(q.scale.shape), q.block_size)
            return cls(q.scheme, q.format.block or whole)
        per_row = not q.is_codebook and q.block_size == q.shape[1]
        return cls(
            q.scheme,
            0 if per_row else q.block_size,
            q.double_quant,
            q.symmetric,
            act_order=q.group_index is not None,
        )


# Defaults: 8 bits need no groups; below that, groups of 64 divide the layers of small models where 128 does
# not.
SCHEMES: dict[str, Scheme] = {
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
}


def resolve_scheme(
    name: str,
    block_size: int | str | None = None,
    double_quant: bool = False,
    symmetric: bool = True,
    threshold: float = 6.0,
) -> Scheme:
    """A scheme by name, with options checked.

    Args:
        block_size: None: the scheme's default. nf4, fp4: 32 … 4096; int2 … int8: any positive int, or
            ``"channel"`` for one scale per row; llm_int8 has one per row always; fp8: ``"channel"``, ``"tensor"`` or 128;
            the MX formats and nvfp4 have blocks of their own.

    Raises:
        ValueError: an unknown scheme (the message lists the known), or an option that the scheme does not
            have.
    """
    check_choice(name, tuple(SCHEMES), "scheme")
    scheme = SCHEMES[name]
    is_codebook, is_llm_int8 = name in CODEBOOKS, name == "llm_int8"
    if double_quant and not is_codebook:
        raise ValueError(f"double_quant goes with nf4 and fp4, not with scheme={name!r}")
    if not symmetric and (is_codebook or is_llm_int8 or name in BLOCK_FORMATS):
        raise ValueError(f"symmetric=False goes with int2, int3, int4 and int8, not with scheme={name!r}")
    if name in BLOCK_FORMATS:
        check_block(BLOCK_FORMATS[name], None if block_size == -1 else block_size)
        words = {None: scheme.block_size, "channel": 0, "tensor": -1}
        return replace(scheme, block_size=words.get(block_size, block_size))  # type: ignore[arg-type]
    if threshold < 0:
        raise ValueError(f"threshold must be 0 or more, got {threshold!r}")
    if block_size is None or (is_llm_int8 and block_size == 0):
        block_size = scheme.block_size
    elif is_llm_int8:
        raise ValueError(f"llm_int8 has one scale per row; block_size={block_size!r} cannot be set")
    elif is_codebook:
        check_block_size(block_size)  # type: ignore[arg-type]
    elif block_size in ("channel", -1, 0):
        block_size = 0
    elif isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f'block_size must be a positive int or "channel", got {block_size!r}')
    return replace(
        scheme,
        block_size=int(block_size),
        double_quant=double_quant,
        symmetric=symmetric,
        threshold=float(threshold) if is_llm_int8 else scheme.threshold,
    )
