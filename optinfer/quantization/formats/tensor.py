"""The quantized tensor: packed codes, their scales, and how to get real numbers back.

Two families share one container:

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

import torch
from torch import Tensor

from optinfer.quantization.number_formats import CODEBOOKS, codebook, dynamic_table

__all__ = ["NestedScale", "QuantizedTensor", "pack_bits", "unpack_bits"]

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
    """A matrix ``[out, in]`` stored in few bits, with everything needed to restore it.

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

    packed: Tensor
    scale: Tensor | NestedScale
    shape: torch.Size
    dtype: torch.dtype
    scheme: str
    bits: int
    block_size: int
    zero_point: Tensor | None = None
    group_index: Tensor | None = None

    # ---- making one
    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        group_index: Tensor | None = None,
    ) -> QuantizedTensor:
        """Pack unsigned integer codes ``[out, in]`` that somebody else computed (round to nearest, GPTQ,
        AWQ…).

        Args:
            codes: integers in ``0 … 2**bits - 1``.
            scale: ``[out, groups]`` (or ``[out, 1]``, ``[1, 1]``), kept in the dtype it comes in.
            zero_point: unsigned integers, shape of `scale`, or None: symmetric around ``2 ** (bits - 1)``.
            group_size: columns per scale.
            dtype: of the restored tensor.
            group_index: int ``[in]``, see the class.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
            raise ValueError(f"codes must lie in 0 … {(1 << bits) - 1} for bits={bits}")
        if bits == 8 and zero_point is None:
            packed = (codes.to(torch.int16) - 128).to(torch.int8)
        else:
            packed = pack_bits(codes, bits)
        return cls(
            packed=packed,
            scale=scale.contiguous(),
            shape=codes.shape,
            dtype=dtype,
            scheme=f"int{bits}",
            bits=bits,
            block_size=group_size,
            zero_point=None if zero_point is None else pack_bits(zero_point, bits),
            group_index=None if group_index is None else group_index.to(torch.int32),
        )

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
            stored["absmax" if self.is_codebook or self.scheme == "llm_int8" else "scale"] = self.scale
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
    def is_codebook(self) -> bool:
        return self.scheme in CODEBOOKS

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
        if not (self.is_codebook or self.scheme == "llm_int8"):
            raise AttributeError(f"scheme {self.scheme!r} has .scale, not .absmax")
        return self.scale.restore() if isinstance(self.scale, NestedScale) else self.scale

    # ---- getting numbers back
    def codes(self) -> Tensor:
        """Unsigned codes, uint8, in the tensor's shape."""
        if self.is_codebook:
            n = math.prod(self.shape)
            return unpack_bits(self.packed.reshape(-1), 4, 2 * self.packed.numel())[:n].reshape(self.shape)
        if self.packed.dtype == torch.int8:
            return (self.packed.to(torch.int16) + 128).to(torch.uint8)
        return unpack_bits(self.packed, self.bits, self.shape[-1])

    def zero_points(self) -> Tensor:
        """Unsigned zero points in the shape of `scale`, uint8."""
        assert isinstance(self.scale, Tensor)  # only codebooks nest their scales
        if self.zero_point is None:
            return torch.full_like(self.scale, 1 << (self.bits - 1), dtype=torch.uint8)
        return unpack_bits(self.zero_point, self.bits, self.scale.shape[-1])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The restored tensor. Products are formed in float32 and rounded once to `dtype` (default:
        `self.dtype`).
        """
        dtype = dtype or self.dtype
        if len(self.shape) != 2:
            return self._codebook_range(0, math.prod(self.shape), dtype).reshape(self.shape)
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
        dtype = dtype or self.dtype
        width = self.shape[1]
        if self.is_codebook:
            return self._codebook_range(start * width, stop * width, dtype).view(stop - start, width)
        if self.scheme == "llm_int8":
            return (self.packed[start:stop].float() * self.absmax[start:stop, None]).mul_(1 / 127).to(dtype)
        assert isinstance(self.scale, Tensor)  # only codebooks nest their scales
        one_scale = self.scale.shape[0] == 1
        scale = self.scale if one_scale else self.scale[start:stop]
        if self.packed.dtype == torch.int8:
            steps = self.packed[start:stop].float()
        else:
            zero: Tensor | float = float(1 << (self.bits - 1))
            if self.zero_point is not None:
                stored = self.zero_point if one_scale else self.zero_point[start:stop]
                zero = self._per_column(unpack_bits(stored, self.bits, self.scale.shape[-1]).float())
            steps = unpack_bits(self.packed[start:stop], self.bits, width).float() - zero
        return steps.mul_(self._per_column(scale.float())).to(dtype)

    def _per_column(self, per_group: Tensor) -> Tensor:
        """Spread ``[rows, groups]`` over the columns (or leave it to broadcasting where there is one group)."""
        if per_group.shape[1] == 1:
            return per_group
        if self.group_index is not None:
            return per_group[:, self.group_index.long()]
        return per_group.repeat_interleave(self.block_size, 1)[:, : self.shape[1]]

    def _codebook_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Elements ``start … stop`` of the flattened tensor."""
        first, last = start // 2, (stop + 1) // 2
        octets = self.packed.reshape(-1)[first:last]
        values = _pairs(self.scheme, self.device).index_select(0, octets.int()).view(-1)
        values = values[start - 2 * first :][: stop - start]
        block = self.block_size
        first_block, last_block = start // block, -(-stop // block)
        if isinstance(self.scale, NestedScale):
            absmax = self.absmax[first_block:last_block]
        else:
            absmax = self.scale[first_block:last_block]
        if start % block == 0 and stop % block == 0:
            return (values.view(-1, block) * absmax[:, None]).view(-1).to(dtype)
        spread = absmax.repeat_interleave(block)[start - first_block * block :][: stop - start]
        return (values * spread).to(dtype)

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


_PAIRS: dict[tuple[str, str], Tensor] = {}


def _pairs(scheme: str, device: torch.device) -> Tensor:
    """Both values of every possible byte, float32 ``[256, 2]``: one look-up restores two weights."""
    key = (scheme, str(device))
    if key not in _PAIRS:
        code = codebook(scheme, device)
        byte = torch.arange(256, device=device)
        _PAIRS[key] = torch.stack([code[byte >> 4], code[byte & 15]], 1)
    return _PAIRS[key]
