"""What all formats share: packed codes, their scales, and how to get real numbers back.

Codes narrower than a byte are packed as one big-endian stream of bits: the first code sits in the highest bits of the first
byte, so two 4-bit codes share a byte with the *first one in the high nibble*.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from optinfer.quantization.number_formats import dynamic_table

if TYPE_CHECKING:
    from optinfer.cpu import CpuWeight
    from optinfer.quantization.schemes import Scheme
    from optinfer_kernels.quantized_arguments import QuantizedWeight

__all__ = ["NestedScale", "QuantizedTensor", "pack_bits", "unpack_bits"]

Stored = tuple[tuple[int, ...], torch.dtype]  # of a stored tensor
GroupSize = int | Literal["channel", "tensor"] | None  # weights that share a scale; each function says what None means

# Rows are restored in slabs of about this many weights, so that a matrix product never needs the whole layer.
SLAB = 1 << 20


# ----------------------------------------------------------------------------------------- bits and bytes
def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes of the shortest whole number of bytes: 3 bits -> 8 codes in 3 bytes."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    codes = 8 // math.gcd(bits, 8)
    return codes, codes * bits // 8


def _integer(num_bytes: int) -> torch.dtype:
    """One that holds so many bytes without its sign: 5 and 7 bits need words of 5 and 7 bytes."""
    return torch.int32 if num_bytes < 4 else torch.int64


def packed_width(columns: int, bits: int) -> int:
    """Bytes that `columns` codes of `bits` bits take in one row."""
    return -(-columns * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes ``[..., n]`` of 1 to 8 bits into bytes ``[..., ceil(n * bits / 8)]`` (uint8), first code highest.

    Raises: ValueError: `bits` is not among 1 to 8.
    """
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
    whole = _integer(word_bytes)
    word = torch.zeros(codes.shape[:-1], dtype=whole, device=codes.device)
    for i in range(per_word):
        word |= codes[..., i].to(whole) << (8 * word_bytes - bits * (i + 1))
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
    whole = _integer(word_bytes)
    word = packed[..., 0].to(whole) << 8 * (word_bytes - 1)
    for i in range(1, word_bytes):
        word |= packed[..., i].to(whole) << 8 * (word_bytes - 1 - i)
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

    def to(self, device: torch.device | str) -> NestedScale:
        """A copy on `device`."""
        return NestedScale(self.codes.to(device), self.absmax.to(device), self.offset.to(device))

    def restore(self) -> Tensor:
        """The absmax values, float32 ``[blocks]``."""
        values = dynamic_table(self.codes.device)[self.codes.int()]
        scale = self.absmax.repeat_interleave(self.BLOCK)[: len(values)]
        return values * scale + self.offset


@dataclass
class QuantizedTensor:
    """A matrix ``[out, in]`` stored in few bits, with everything needed to restore it. Each format is a subclass.

    Attributes:
        packed: the codes, and `scale`: their scales, shaped as the format says.
        shape, dtype: of the restored tensor.
        scheme: a key of `SCHEMES`.
        bits: of one code.
        group_size: weights that share a scale.
        zero_point, group_index: see `GridTensor`.
    """

    SCALE: ClassVar[str] = "scale"  # what the stored scales are called
    OTHERS: ClassVar[tuple[str, ...]] = ()  # attributes that are stored, too, where they are not None
    LOOKS_AT_INPUTS: ClassVar[bool] = (
        False  # which work a product is depends on its input's values, as in no CUDA graph
    )

    packed: Tensor
    scale: Tensor | NestedScale
    shape: torch.Size
    dtype: torch.dtype
    scheme: str
    bits: int
    group_size: int
    zero_point: Tensor | None = None
    group_index: Tensor | None = None

    # ---- of what it consists
    @classmethod
    def settle(cls, scheme: Scheme, group_size: GroupSize, options: dict[str, Any]) -> Scheme:
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
            group_size=scheme.group_size if scheme.group_size > 0 else shape[1],
            **{name: tensors.get(name) for name in cls.OTHERS},
        )

    def settled_group(self) -> int:
        """`Scheme.group_size` of the scheme that made this."""
        return 0 if self.group_size == self.shape[1] else self.group_size

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
        others = {name: getattr(self, name) for name in self.OTHERS}
        return stored | {name: tensor for name, tensor in others.items() if tensor is not None}

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
        """Largest magnitude of each block (codebook) or row (``llm_int8``), float32, restored if it is nested."""
        if self.SCALE != "absmax":
            raise AttributeError(f"scheme {self.scheme!r} has .scale, not .absmax")
        return self.scale.restore() if isinstance(self.scale, NestedScale) else self.scale

    # ---- getting numbers back
    def codes(self) -> Tensor:
        """Unsigned codes, uint8, in the tensor's shape."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The restored tensor. Products are formed in float32 and rounded once to `dtype` (default: `self.dtype`)."""
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
        stored = {name: value for name, value in vars(self).items() if isinstance(value, (Tensor, NestedScale))}
        return replace(self, **{name: value.to(device) for name, value in stored.items()})  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.scheme}, shape={tuple(self.shape)}, group_size={self.group_size}, "
            f"{self.bits_per_weight:.3f} bits/weight, {self.nbytes:,} bytes)"
        )
