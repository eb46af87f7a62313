"""Fused products on CPUs: operators that restore weights in registers, and the memory layouts they want.

Two operators exist. bitsandbytes has one for NF4 and FP4 on CPUs with AVX512-BF16; torch has one for int4
and one for int8. All take bfloat16 activations; anything else goes the plain way (`matmul.py`).

A layout holds the same bits in another order, in the same number of bytes, and can be undone exactly. The
operators
round scales to bfloat16: products differ from the plain way by about 3e-3 relative, as bfloat16 itself does.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from optinfer.quantization.formats import codebook
from optinfer.quantization.tensor import QuantizedTensor, pack_bits

__all__ = ["CpuLayout", "layout_for"]


class CpuLayout:
    """A weight in the order that a fused operator reads.

    Where that order is the canonical one, products of many tokens are better off restoring the weight once.
    """

    in_order = False
    MANY_TOKENS = 128

    def __init__(self, q: QuantizedTensor) -> None:
        self.shape = tuple(q.shape)

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x @ W.T``, x bfloat16 ``[m, in]``, from the re-ordered `weight`."""
        raise NotImplementedError

    def undo(self, weight: Tensor) -> Tensor:
        """The canonical packed tensor again, bit for bit."""
        raise NotImplementedError


def layout_for(q: QuantizedTensor) -> tuple[CpuLayout, Tensor] | None:
    """A layout for `q` and its re-ordered weight, or None where no fused operator takes it."""
    if q.device.type != "cpu" or len(q.shape) != 2 or q.group_index is not None:
        return None
    rows, columns = q.shape
    if q.is_codebook and rows % 32 == 0 and columns % q.block_size == 0 and _bitsandbytes_gemv() is not None:
        return _interleaved(q)
    if q.scheme == "int4" and rows % 16 == 0 and columns % q.block_size == 0 and q.block_size in (32, 64, 128, 256):
        return _int4_packed(q)
    per_row = q.block_size == columns and q.scale.shape[0] == rows
    if q.scheme == "int8" and q.symmetric and per_row and columns % 32 == 0:
        return Int8Rows(q), aligned(q.packed)
    return None


def aligned(x: Tensor) -> Tensor:
    """`x`, contiguous and at a multiple of 64 bytes: the operators' loads crash on anything else.

    Tensors from a memory-mapped file and slices of others may start anywhere.
    """
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


# ------------------------------------------------------------------------------------------------ NF4, FP4
@cache
def _bitsandbytes_gemv():
    """bitsandbytes' fused 4-bit operator, or None where it or the CPU feature is missing."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that an optional hub kernel is absent; its own C++ one does as well
    try:
        import bitsandbytes.functional as functional

        return torch.ops.bitsandbytes.gemv_4bit.default if functional.has_avx512bf16() else None
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None
    finally:
        logger.setLevel(level)


class Interleaved(CpuLayout):
    """Nibbles of 32 rows side by side, column by column, so that one AVX512 register holds 32 outputs."""

    def __init__(self, q: QuantizedTensor) -> None:
        super().__init__(q)
        self.block_size = q.block_size
        self.code = codebook(q.scheme)
        self.absmax = q.absmax.view(q.shape[0], -1).t().to(torch.bfloat16).contiguous()

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        return _bitsandbytes_gemv()(x, weight, self.shape, self.absmax, self.code, self.block_size)

    def undo(self, weight: Tensor) -> Tensor:
        rows, columns = self.shape
        even, odd = weight.view(rows // 32, columns // 2, 16, 2).unbind(-1)
        upper = (even << 4) | (odd & 0xF)  # rows 0 … 15 of each 32
        lower = (even & 0xF0) | (odd >> 4)
        return torch.cat([upper, lower], -1).transpose(1, 2).reshape(-1, 1)


def _interleaved(q: QuantizedTensor) -> tuple[CpuLayout, Tensor]:
    rows, columns = q.shape
    octets = q.packed.view(rows // 32, 32, columns // 2).transpose(1, 2)
    upper, lower = octets[..., :16], octets[..., 16:]
    even = (upper >> 4) | (lower & 0xF0)
    odd = (upper & 0xF) | (lower << 4)
    return Interleaved(q), torch.stack([even, odd], -1).view(q.packed.shape)


# ------------------------------------------------------------------------------------------------ int4, int8
class Int4Packed(CpuLayout):
    """The order of torch's int4 product. It is private to torch and to the CPU, so it is undone by
    multiplying.
    """

    def __init__(self, q: QuantizedTensor) -> None:
        super().__init__(q)
        self.block_size = q.block_size
        # torch computes (code - 8) * scale + zero
        zero = (8.0 - q.zero_points().float()) * q.scale.float()
        self.scale_and_zero = torch.stack([q.scale.float(), zero], -1).transpose(0, 1).bfloat16().contiguous()

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return product(x, weight.view(self.shape[0], -1), self.block_size, self.scale_and_zero)

    def undo(self, weight: Tensor) -> Tensor:
        rows, columns = self.shape
        one = torch.tensor([1.0, 8.0], dtype=torch.bfloat16)  # (code - 8) * 1 + 8: small integers, exact
        unit = one.expand(columns // self.block_size, rows, 2).contiguous()
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        identity = torch.eye(columns, dtype=torch.bfloat16)
        for start in range(0, columns, 64):
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(
                identity[start : start + 64], weight.view(rows, -1), self.block_size, unit
            )
            codes[:, start : start + 64] = product.t().to(torch.uint8)
        return pack_bits(codes, 4)


def _int4_packed(q: QuantizedTensor) -> tuple[CpuLayout, Tensor]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.codes().int(), 2)
    return Int4Packed(q), packed.view(q.packed.shape)


class Int8Rows(CpuLayout):
    """torch's int8 product reads rows as they are."""

    in_order = True

    def __init__(self, q: QuantizedTensor) -> None:
        super().__init__(q)
        self.scale = q.scale.view(-1).bfloat16()

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, weight, self.scale)

    def undo(self, weight: Tensor) -> Tensor:
        return weight
