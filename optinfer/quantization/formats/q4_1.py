"""llama.cpp's Q4_1: 16 equally spaced values between the smallest and the largest of 32 weights.

``value = code * scale + minimum``. The affine ``int4`` stores a zero point, a code, so that 0.0 is restored exactly; here the
grid begins exactly at the smallest weight instead. Source: ggml's ``quantize_row_q4_1_ref`` and ``block_q4_1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.cpu import CpuWeight
from optinfer.quantization.checks import check_weight, refuse_options
from optinfer.quantization.formats.tensor import (
    GroupSize,
    QuantizedTensor,
    Stored,
    pack_bits,
    packed_width,
    unpack_bits,
)

if TYPE_CHECKING:
    from optinfer.quantization.schemes import Scheme

__all__ = ["GROUP", "Q41Tensor"]

GROUP = 32  # columns that share a scale and a minimum
_FILE_BLOCK = 2 + 2 + GROUP // 2  # bytes: scale and minimum in fp16, then the codes


@dataclass(repr=False)  # as all formats show themselves
class Q41Tensor(QuantizedTensor):
    """A matrix ``[out, in]``: `packed` uint8 ``[out, ceil(in / 2)]``, `scale` fp16 ``[out, ceil(in / 32)]``.

    Attributes:
        minimum: fp16, the shape of `scale`.
    """

    OTHERS = ("minimum",)

    minimum: Tensor | None = None

    @classmethod
    def settle(cls, scheme: Scheme, group_size: GroupSize, options: dict[str, Any]) -> Scheme:
        refuse_options(scheme, options)
        if group_size not in (None, GROUP):
            raise ValueError(f"group_size of q4_1 must be {GROUP}; got {group_size!r}")
        return scheme

    @classmethod
    def make(cls, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
        check_weight(weight)
        rows, columns = weight.shape
        w = weight.detach().float()
        groups = torch.nn.functional.pad(w, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
        low = groups.amin(-1)
        step = (groups.amax(-1) - low) / 15
        if max(float(step.max()), float(low.abs().max())) > torch.finfo(torch.float16).max:
            raise ValueError("weight has values beyond 65504, which q4_1 cannot hold: its scales are fp16")
        codes = ((groups - low[..., None]) * torch.where(step == 0, 0, 1 / step)[..., None] + 0.5).floor().clamp(0, 15)
        packed = pack_bits(codes.reshape(rows, -1)[:, :columns], 4)
        return cls._around(packed, step.half(), low.half(), weight.shape, weight.dtype)

    @classmethod
    def from_file(cls, blocks: Tensor, dtype: torch.dtype = torch.bfloat16) -> Q41Tensor:
        """The rows of a GGUF file as they are.

        Args:
            blocks: uint8 ``[out, in / 32 * 20]``: per 32 columns scale, minimum, and 16 bytes whose low halves hold the first
                16 codes.
            dtype: of the restored tensor.

        Raises:
            ValueError: the width is no multiple of a block's 20 bytes.
        """
        if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] % _FILE_BLOCK:
            raise ValueError(
                f"blocks must be uint8 [out, n * {_FILE_BLOCK}], got {blocks.dtype} with the shape {tuple(blocks.shape)}"
            )
        blocks = blocks.unflatten(1, (-1, _FILE_BLOCK))
        scale, minimum = blocks[..., :4].contiguous().view(torch.float16).unbind(-1)
        codes = torch.cat([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1).flatten(1)
        return cls._around(pack_bits(codes, 4), scale, minimum, codes.shape, dtype)

    @classmethod
    def _around(
        cls, packed: Tensor, scale: Tensor, minimum: Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> Q41Tensor:
        return cls(packed, scale.contiguous(), shape, dtype, "q4_1", 4, GROUP, minimum=minimum.contiguous())

    @classmethod
    def stored(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
        rows, columns = shape
        groups: Stored = ((rows, -(-columns // GROUP)), torch.float16)
        return {"packed": ((rows, packed_width(columns, 4)), torch.uint8), "scale": groups, "minimum": groups}

    def settled_group(self) -> int:
        return GROUP

    def codes(self) -> Tensor:
        return unpack_bits(self.packed, 4, self.shape[1])

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        assert isinstance(self.scale, Tensor)
        assert self.minimum is not None
        columns = self.shape[1]
        scale, minimum = (
            t[start:stop].float().repeat_interleave(GROUP, 1)[:, :columns] for t in (self.scale, self.minimum)
        )
        codes = unpack_bits(self.packed[start:stop], 4, columns).float()
        return codes.mul_(scale).add_(minimum).to(dtype or self.dtype)

    def cpu_weight(self, bias: Tensor | None = None) -> CpuWeight | None:
        assert isinstance(self.scale, Tensor)
        columns = self.shape[1]
        return CpuWeight.linear_codes(self.packed, columns, 4, GROUP, self.scale, bias=bias, minimum=self.minimum)
