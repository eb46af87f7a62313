"""What all formats share: packed codes, their scales, and how to get real numbers back.

Two families of formats, beside LLM.int8() and small floats:

* *linear* codes (``int2`` … ``int8``): ``value = (code - zero_point) * scale``, one scale per group of
  consecutive weights of a row, per row ("channel"), or for the whole tensor ("tensor");
* *codebook* codes (``nf4``, ``fp4``): ``value = codebook[code] * absmax``, one absmax per block of
  consecutive weights of the flattened tensor, the layout of bitsandbytes.

Codes narrower than a byte are packed as one big-endian stream of bits: the first code sits in the highest
bits of the first byte, so two 4-bit codes share a byte with the *first one in the high nibble*.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from optinfer.quantization.number_formats import dynamic_table

if TYPE_CHECKING:
    from optinfer.cpu import CpuWeight
    from optinfer.quantization.schemes import Scheme
    from optinfer_kernels.quantized_arguments import QuantizedWeight

__all__ = ["NestedScale", "QuantizedTensor", "pack_bits", "unpack_bits"]

Stored = tuple[tuple[int, ...], torch.dtype]  # of a stored tensor

# Rows are restored in slabs of about this many weights, so that a matrix product never needs the whole layer.
SLAB = 1 << 20


# ----------------------------------------------------------------------------------------- bits and bytes
def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes of the shortest whole number of bytes: 3 bits -> 8 codes in 3 bytes."""
    codes = 8 // math.gcd(bits, 8)
    return codes, codes * bits // 8


def packed_width(columns: int, bits: int) -> int:
    """Bytes that `columns` codes of `bits` bits take in one row."""
    return -(-columns * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes ``[..., n]`` into bytes ``[..., ceil(n * bits / 8)]`` (uint8), first code highest."""
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    per_word, word_bytes = _word(bits)
    width = packed_width(codes.shape[-1], bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    codes = codes.unflatten(-1, (-1, per_word))
    if word_bytes == 1:  # 2 and 4 bits: stay in uint8
        word = codes[..., 0] << (8 - bits)
        for i in range(1, per_word):
            word |= codes[..., i] << (8 - bits * (i + 1))
        return word[..., :width].contiguous()
    word = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(per_word):
        word |= codes[..., i].int() << (8 * word_bytes - bits * (i + 1))
    octets = [(word >> 8 * (word_bytes - 1 - i)).bitwise_and_(0xFF).to(torch.uint8) for i in range(word_bytes)]
    return torch.stack(octets, -1).flatten(-2)[..., :width].contiguous()


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Invert `pack_bits`: bytes ``[..., w]`` to unsigned codes ``[..., columns]`` (uint8)."""
    if bits == 8:
        return packed
    per_word, word_bytes = _word(bits)
    mask = (1 << bits) - 1
    if word_bytes == 1:
        codes = torch.stack([(packed >> (8 - bits * (i + 1))) & mask for i in range(per_word)], -1)
        return codes.flatten(-2)[..., :columns]
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % word_bytes)).unflatten(-1, (-1, word_bytes))
    word = packed[..., 0].int() << 8 * (word_bytes - 1)
    for i in range(1, word_bytes):
        word |= packed[..., i].int() << 8 * (word_bytes - 1 - i)
    shifts = [8 * word_bytes - bits * (i + 1) for i in range(per_word)]
    codes = torch.stack([((word >> s) & mask).to(torch.uint8) for s in shifts], -1)
    return codes.flatten(-2)[..., :columns]


# ---------------------------------------------------------------------------------------------- containers
@dataclass
class NestedScale:
    """The absmax values of a double-quantized tensor: 8-bit codes around their mean.

    ``absmax[i] = DYNAMIC_INT8[codes[i]] * absmax[i // 256] + offset`` (QLoRA, arXiv 2305.14314, section 3).
    """

    codes: Tensor  # uint8 [blocks]
    absmax: Tensor  # float32 [ceil(blocks / 256)]
    offset: Tensor  # float32 []

    BLOCK = 256

    def restore(self) -> Tensor:
        """The absmax values, float32 ``[blocks]``."""
        values = dynamic_table(self.codes.device)[self.codes.int()]
        scale = self.absmax.repeat_interleave(self.BLOCK)[: len(values)]
        return values * scale + self.offset


@dataclass
class QuantizedTensor:
    """A matrix ``[out, in]`` stored in few bits, with everything needed to restore it. Each format is a subclass.

    Attributes:
        packed: the codes. Linear: uint8 ``[out, ceil(in * bits / 8)]`` (signed int8 ``[out, in]`` for
            symmetric 8-bit). Codebook: uint8 ``[(out * in + 1) // 2, 1]``.
        scale: linear: ``[out, groups]``, ``[out, 1]`` or ``[1, 1]`` in the weight's dtype (``llm_int8``:
            the rows' absmax, float32 ``[out]``). Codebook: float32 absmax ``[blocks]``, or a `NestedScale`.
        shape: of the restored tensor.
        dtype: of the restored tensor.
        scheme: ``int2 int3 int4 int8 llm_int8 nf4 fp4``.
        bits: of one code.
        block_size: weights that share a scale (codebook: consecutive in the flattened tensor; linear: in a
            row).
        zero_point: affine only: packed like the codes, uint8 ``[out, ceil(groups * bits / 8)]``. Symmetric
            codes have the fixed zero ``2 ** (bits - 1)``.
        group_index: int32 ``[in]``, the group of each input column, where groups are not consecutive columns
            (GPTQ's activation order); None otherwise.
    """

    SCALE: ClassVar[str] = "scale"  # what the stored scales are called

    packed: Tensor
    scale: Tensor | NestedScale
    shape: torch.Size
    dtype: torch.dtype
    scheme: str
    bits: int
    block_size: int
    zero_point: Tensor | None = None
    group_index: Tensor | None = None

    # ---- of what it consists
    @classmethod
    def settle(cls, scheme: Scheme, block_size: int | str | None, options: dict[str, Any]) -> Scheme:
        """`scheme` with the user's options in place of the defaults; ValueError for one that the format does not have."""
        raise NotImplementedError

    @classmethod
    def make(cls, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
        """Quantize a weight ``[out, in]``."""
        raise NotImplementedError

    @classmethod
    def stored(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
        """Shape and dtype of every tensor that `make` stores, by the names of `tensors`."""
        raise NotImplementedError

    @classmethod
    def assemble(
        cls, scheme: Scheme, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantizedTensor:
        """The inverse of `tensors`."""
        return cls(
            packed=tensors["packed"],
            scale=tensors[cls.SCALE],
            shape=torch.Size(shape),
            dtype=dtype,
            scheme=scheme.name,
            bits=scheme.bits,
            block_size=scheme.block_size or shape[1],
            zero_point=tensors.get("zero_point"),
            group_index=tensors.get("group_index"),
        )

    def settled_block(self) -> int:
        """`Scheme.block_size` of the scheme that made this."""
        return 0 if self.block_size == self.shape[1] else self.block_size

    # ---- what it weighs
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name: what occupies memory, and what a checkpoint holds."""
        stored: dict[str, Tensor] = {"packed": self.packed}
        if isinstance(self.scale, NestedScale):
            stored |= {
                "absmax": self.scale.codes,
                "nested_absmax": self.scale.absmax,
                "nested_offset": self.scale.offset,
            }
        else:
            stored[self.SCALE] = self.scale
        if self.zero_point is not None:
            stored["zero_point"] = self.zero_point
        if self.group_index is not None:
            stored["group_index"] = self.group_index
        return stored

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of weights: codes, scales and zero points together."""
        return 8 * self.nbytes / math.prod(self.shape)

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    @property
    def double_quant(self) -> bool:
        return isinstance(self.scale, NestedScale)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each block (codebook) or row (``llm_int8``), float32, restored if it is
        nested.
        """
        if self.SCALE != "absmax":
            raise AttributeError(f"scheme {self.scheme!r} has .scale, not .absmax")
        return self.scale.restore() if isinstance(self.scale, NestedScale) else self.scale

    # ---- getting numbers back
    def codes(self) -> Tensor:
        """Unsigned codes, uint8, in the tensor's shape."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The restored tensor. Products are formed in float32 and rounded once to `dtype` (default:
        `self.dtype`).
        """
        dtype = dtype or self.dtype
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for rows, slab in self.slabs(dtype):
            out[rows] = slab
        return out

    def slabs(self, dtype: torch.dtype | None = None, size: int = SLAB) -> Iterator[tuple[slice, Tensor]]:
        """Restore `size` weights or so at a time: pairs of a row slice and those rows, ``[rows, in]``."""
        step = max(1, size // self.shape[1])
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield slice(start, stop), self.rows(start, stop, dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``start … stop`` restored, ``[stop - start, in]``."""
        raise NotImplementedError

    # ---- multiplying by it
    def kernel_weight(self) -> QuantizedWeight | None:
        """The tensors as the Triton kernels read them, nothing copied; None for layouts that they do not read."""
        return None

    def scaled_weight(self) -> tuple[Tensor, Tensor] | None:
        """Codes and scales as `optinfer_kernels.scaled_matmul` reads them; None for layouts that it does not read."""
        return None

    def cpu_weight(self, bias: Tensor | None = None) -> CpuWeight | None:
        """The tensors as the C++ kernels read them, nothing copied; None for layouts that they do not read."""
        return None

    # ---- moving it
    def to(self, device: torch.device | str) -> QuantizedTensor:
        """A copy on `device`."""
        scale = self.scale
        if isinstance(scale, NestedScale):
            scale = NestedScale(scale.codes.to(device), scale.absmax.to(device), scale.offset.to(device))
        else:
            scale = scale.to(device)
        return replace(
            self,
            packed=self.packed.to(device),
            scale=scale,
            zero_point=None if self.zero_point is None else self.zero_point.to(device),
            group_index=None if self.group_index is None else self.group_index.to(device),
        )

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.scheme}, shape={tuple(self.shape)}, block_size={self.block_size}, "
            f"{self.bits_per_weight:.3f} bits/weight, {self.nbytes:,} bytes)"
        )
