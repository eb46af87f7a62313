"""Small floats with small scales: FP8, the microscaling formats MXFP4 and MXFP8, and NVFP4.

=======  ==========  ============================  ======================================  =================
scheme   a number    a scale                       for                                     bits per weight
=======  ==========  ============================  ======================================  =================
fp8      E4M3        float32                       a row (or the tensor, or 128 x 128)     8 and a little
mxfp8    E4M3        E8M0: a power of two          32 columns of a row                     8.25
mxfp4    E2M1        E8M0: a power of two          32 columns                              4.25
nvfp4    E2M1        E4M3                          16 columns, and one float32 for all     4.5
=======  ==========  ============================  ======================================  =================

The MX formats are those of the OCP Microscaling specification 1.0; a power of two costs no multiplication, but a block's largest
number is rarely just what its scale asks for. NVFP4's scale has three bits of mantissa and a narrow range, which one number per
tensor moves to where the scales are. Codes and scales are, bit for bit, those of compressed-tensors, but for the order of two
codes in a byte: here the first sits in the high half, as in all our tensors; in files (`file_order`) in the low one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from optinfer.cpu import CpuWeight
from optinfer.quantization.checks import check_choice, check_weight, refuse_options
from optinfer.quantization.formats.tensor import GroupSize, QuantizedTensor, Stored, packed_width, unpack_bits
from optinfer_kernels.quantized_arguments import QuantizedWeight

if TYPE_CHECKING:
    from optinfer.quantization.schemes import Scheme

__all__ = ["BLOCK_FORMATS", "E2M1", "BlockFloats", "BlockFormat", "file_order", "quantize_blocks"]

# E2M1 by code: sign, two exponent bits, one mantissa bit; no infinity, no NaN.
_E2M1_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = _E2M1_HALF + tuple(-value for value in _E2M1_HALF)
# Halfway between two neighbours; from "even" code to "odd" the tie stays below, from odd to even it goes up.
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
BlockName = Literal["fp8", "fp8_e5m2", "mxfp8", "mxfp4", "nvfp4"]
MxScale = Literal["round", "floor"]  # which power of two, see `quantize_blocks`
TILE = 128  # rows and columns of fp8's tiles, as DeepSeek-V3 has them


@dataclass(frozen=True)
class BlockFormat:
    """What a scheme is made of.

    Attributes:
        name: of the scheme.
        element: "e2m1", "e4m3" or "e5m2".
        block: columns that share a scale; 0: see `quantize_blocks`.
        scale: dtype of the stored scales; uint8 holds E8M0.
    """

    name: BlockName
    element: Literal["e2m1", "e4m3", "e5m2"]
    block: int
    scale: torch.dtype

    @property
    def bits(self) -> int:
        return 4 if self.element == "e2m1" else 8

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored codes; two codes of four bits share a byte."""
        return {"e2m1": torch.uint8, "e4m3": E4M3, "e5m2": E5M2}[self.element]

    @property
    def largest(self) -> float:
        return 6.0 if self.element == "e2m1" else torch.finfo(self.dtype).max


BLOCK_FORMATS: dict[str, BlockFormat] = {
    f.name: f
    for f in (
        BlockFormat("fp8", "e4m3", 0, torch.float32),
        BlockFormat("fp8_e5m2", "e5m2", 0, torch.float32),
        BlockFormat("mxfp8", "e4m3", 32, E8M0),
        BlockFormat("mxfp4", "e2m1", 32, E8M0),
        BlockFormat("nvfp4", "e2m1", 16, E4M3),
    )
}


@dataclass(repr=False)  # as all formats show themselves
class BlockFloats(QuantizedTensor):
    """A matrix ``[out, in]`` of small floats. `packed` uint8 ``[out, ceil(in / 2)]`` or float8 ``[out, in]``; `scale`
    ``[out, groups]``, of fp8 ``[out, 1]``, ``[1, 1]`` or tiles ``[ceil(out / 128), ceil(in / 128)]``.

    Attributes:
        tensor_scale: NVFP4 only, float32 ``[1]``: scales are stored times this number.
    """

    OTHERS = ("tensor_scale",)

    tensor_scale: Tensor | None = None

    @classmethod
    def settle(cls, scheme: Scheme, group_size: GroupSize, options: dict[str, Any]) -> Scheme:
        refuse_options(scheme, options)
        check_block(BLOCK_FORMATS[scheme.name], None if group_size == -1 else group_size)
        words = {None: scheme.group_size, "channel": 0, "tensor": -1}
        return replace(scheme, group_size=words.get(group_size, group_size))  # type: ignore[arg-type]

    @classmethod
    def make(cls, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
        words: dict[int, GroupSize] = {0: "channel", -1: "tensor"}
        return quantize_blocks(weight, cast(BlockName, scheme.name), words.get(scheme.group_size, scheme.group_size))

    @classmethod
    def stored(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
        form, (rows, columns) = BLOCK_FORMATS[scheme.name], shape
        width = packed_width(columns, 4) if form.bits == 4 else columns
        if form.block:
            scale = (rows, -(-columns // form.block))
        elif scheme.group_size == TILE:
            scale = (-(-rows // TILE), -(-columns // TILE))
        else:
            scale = (1, 1) if scheme.group_size == -1 else (rows, 1)
        stored: dict[str, Stored] = {"packed": ((rows, width), form.dtype), "scale": (scale, form.scale)}
        return stored | ({"tensor_scale": ((1,), torch.float32)} if form.scale == E4M3 else {})

    def settled_group(self) -> int:
        assert isinstance(self.scale, Tensor)
        wholes: dict[tuple[int, ...], int] = {(1, 1): -1, (self.shape[0], 1): 0}
        return self.format.block or wholes.get(tuple(self.scale.shape), self.group_size)

    @property
    def format(self) -> BlockFormat:
        return BLOCK_FORMATS[self.scheme]

    def codes(self) -> Tensor:
        """Bit patterns, uint8, in the tensor's shape."""
        if self.bits == 4:
            return unpack_bits(self.packed, 4, self.shape[1])
        return self.packed.view(torch.uint8)

    def scales(self) -> Tensor:
        """The scales as the numbers they are, float32, in their stored shape."""
        assert isinstance(self.scale, Tensor)
        if self.scale.dtype == E8M0:
            return torch.ldexp(torch.ones(self.scale.shape, device=self.device), self.scale.int() - 127)
        scale = self.scale.float()
        return scale if self.tensor_scale is None else scale / self.tensor_scale

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.bits == 4:
            table = torch.tensor(E2M1, device=self.device)
            values = table[unpack_bits(self.packed[start:stop], 4, self.shape[1]).int()]
        else:
            values = self.packed[start:stop].float()
        return (values * self.scales_of_weights(start, stop)).to(dtype or self.dtype)

    def scales_of_weights(self, start: int, stop: int) -> Tensor:
        """The scale of each weight in some rows, broadcastable to them."""
        scales = self.scales()
        if scales.shape[0] == self.shape[0]:
            scales = scales[start:stop]
        elif scales.numel() > 1:  # tiles
            scales = scales.repeat_interleave(TILE, 0)[start:stop]
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.group_size, 1)[:, : self.shape[1]]
        return scales

    def kernel_weight(self) -> QuantizedWeight | None:
        if self.bits == 8 or self.shape[1] % self.group_size:
            return None
        # A codebook, and scales in float32: a copy anyhow, so in the order that the kernel reads best.
        return QuantizedWeight(self.packed, self.scales(), self.group_size, E2M1).by_group()

    def scaled_weight(self) -> tuple[Tensor, Tensor] | None:
        """E4M3 with a scale per block, row or tensor. The kernel for codebooks reads MXFP4; NVFP4's instruction wants activations
        in four bits too, and ours stay in sixteen.
        """
        if self.packed.dtype != E4M3 or self.shape[1] % (self.format.block or 1):
            return None
        assert isinstance(self.scale, Tensor)
        if self.format.block:
            return self.packed, self.scale
        if self.settled_group() == TILE:
            return None
        return self.packed, self.scale.expand(self.shape[0], 1)

    def cpu_weight(self, bias: Tensor | None = None) -> CpuWeight | None:
        if self.bits == 8 or self.shape[1] % self.group_size:
            return None
        shape, scales = (self.shape[0], self.shape[1]), self.scales().view(-1)
        return CpuWeight.codebook_codes(self.packed, shape, self.group_size, torch.tensor(E2M1), scales, bias=bias)


def quantize_blocks(
    weight: Tensor, scheme: BlockName, group_size: GroupSize = None, mx_scale: MxScale = "round"
) -> BlockFloats:
    """Quantize a matrix to small floats.

    Args:
        weight: ``[out, in]``, float32, bfloat16 or float16, finite.
        scheme: ``fp8 fp8_e5m2 mxfp8 mxfp4 nvfp4``.
        group_size: fp8 only: ``"channel"`` (a scale per row, the default), ``"tensor"``, or 128 (tiles of 128 x 128).
        mx_scale: which power of two. ``"floor"``: the specification's example, of the largest number's own exponent, so that
            numbers above 6 steps are cut; ``"round"``: one more where the largest would be rounded up to the next power
            (compressed-tensors, vLLM).

    Raises:
        ValueError, TypeError: another scheme, option or kind of weight.
    """
    check_choice(scheme, tuple(BLOCK_FORMATS), "scheme")
    check_choice(mx_scale, get_args(MxScale), "mx_scale")
    check_weight(weight)
    form = BLOCK_FORMATS[scheme]
    check_block(form, group_size)
    x = weight.detach().float()
    tensor_scale = None
    if form.block:
        groups = torch.nn.functional.pad(x, (0, -x.shape[1] % form.block)).unflatten(1, (-1, form.block))
        absmax = groups.abs().amax(-1)
        if form.scale == E8M0:
            scale = mx_scales(absmax, form, mx_scale)
        else:
            tensor_scale = (torch.finfo(E4M3).max * form.largest / x.abs().max().clamp_min(torch.finfo().tiny)).view(1)
            scale = (absmax / form.largest * tensor_scale).clamp_max(torch.finfo(E4M3).max).to(E4M3)
            scale = torch.where(scale.float() == 0, torch.full((), 0.125, device=x.device), scale.float()).to(E4M3)
        block = form.block
    else:
        block, absmax = _fp8_absmax(x, group_size)
        scale = absmax / form.largest
        scale = torch.where(scale == 0, torch.ones((), device=x.device), scale)
    q = BlockFloats(
        x, scale.contiguous(), weight.shape, weight.dtype, scheme, form.bits, block, tensor_scale=tensor_scale
    )
    q.packed = _round(x / q.scales_of_weights(0, len(x)), form)
    return q


def check_block(form: BlockFormat, group_size: GroupSize) -> None:
    """Raise ValueError for a block size that the format does not have."""
    allowed = (None, form.block) if form.block else (None, "channel", "tensor", TILE, 0)
    if group_size not in allowed:
        shown = ", ".join(repr(a) for a in allowed if a)
        raise ValueError(f"group_size of {form.name} must be one of {shown}; got {group_size!r}")


def mx_scales(absmax: Tensor, form: BlockFormat, rule: MxScale = "round") -> Tensor:
    """E8M0 scales, uint8, of blocks whose largest magnitudes are `absmax` (float32). See `quantize_blocks` for the rule."""
    bits = absmax.contiguous().view(torch.int32)
    if rule == "round":
        bits = bits + (1 << 21)  # half a step of one bit of mantissa: from 1.75 on it carries into the exponent
    exponent = (bits >> 23) - (2 if form.element == "e2m1" else 8)
    return exponent.clamp(0, 254).to(torch.uint8)


def file_order(packed: Tensor) -> Tensor:
    """Bytes with their two codes exchanged: the first in the low half, as compressed-tensors and torch have them."""
    return packed >> 4 | packed << 4


def _fp8_absmax(x: Tensor, group_size: GroupSize) -> tuple[int, Tensor]:
    if group_size == TILE:
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE, 0, -x.shape[0] % TILE))
        return TILE, padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).abs().amax((1, 3))
    if group_size == "tensor":
        return x.shape[1], x.abs().amax().view(1, 1)
    return x.shape[1], x.abs().amax(1, keepdim=True)


def _round(x: Tensor, form: BlockFormat) -> Tensor:
    """Numbers in units of their scale to codes, ties to even, beyond the largest: the largest."""
    if form.element != "e2m1":
        return x.clamp(-form.largest, form.largest).to(form.dtype)
    magnitude = x.abs()
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for i, middle in enumerate(_MIDDLES):
        codes += (magnitude > middle) if i % 2 == 0 else (magnitude >= middle)
    codes |= (x < 0).to(torch.uint8) << 3
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] << 4 | codes[:, 1::2]
