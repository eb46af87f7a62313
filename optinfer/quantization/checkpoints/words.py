"""What compressed-tensors, GPTQ and AWQ files have in common: codes in 32-bit words, the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

from optinfer.quantization.formats.grid import GridTensor

__all__ = ["group_size", "pack_int32", "unpack_int32"]


def pack_int32(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack unsigned codes along one dimension into int32 words: a stream of bits, the first code lowest.

    32 codes fill exactly `bits` words; 3-bit codes may straddle two. The last word is filled with zeros.

    Returns:
        int32, `dim` now ``ceil(n * bits / 32)`` long.
    """
    codes = codes.movedim(dim, -1).to(torch.int64)
    words = -(-codes.shape[-1] * bits // 32)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 32)).unflatten(-1, (-1, 32))
    packed = torch.zeros(*codes.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        packed[..., word] |= codes[..., i] << offset & 0xFFFFFFFF
        if offset + bits > 32:
            packed[..., word + 1] |= codes[..., i] >> (32 - offset)
    packed = packed.flatten(-2)[..., :words]
    return torch.where(packed < 1 << 31, packed, packed - (1 << 32)).to(torch.int32).movedim(-1, dim).contiguous()


def unpack_int32(packed: Tensor, bits: int, length: int, dim: int = -1) -> Tensor:
    """The inverse of `pack_int32`: unsigned codes, uint8, `dim` `length` long."""
    packed = packed.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    packed = torch.nn.functional.pad(packed, (0, 1))
    bit = torch.arange(length, device=packed.device) * bits
    word, offset = bit // 32, bit % 32
    pair = packed[..., word] | packed[..., word + 1] << 32
    return (pair >> offset & (1 << bits) - 1).to(torch.uint8).movedim(-1, dim).contiguous()


def group_size(layers: dict[str, GridTensor]) -> int:
    """Columns that share a scale in all of them; -1: a row."""
    if all(q.group_size == q.shape[1] for q in layers.values()):
        return -1
    return next(iter(layers.values())).group_size
