"""NF4 and FP4: four bits that index sixteen well-chosen values (QLoRA, arXiv 2305.14314, section 3).

The bytes are those of bitsandbytes 0.50, for every dtype, block size and shape.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from optinfer.cpu import CpuWeight
from optinfer.quantization.checks import check_choice, check_weight, refuse_options
from optinfer.quantization.formats.tensor import GroupSize, NestedScale, QuantizedTensor, Stored, unpack_bits
from optinfer.quantization.number_formats import CODEBOOKS, DYNAMIC_INT8, CodebookName, codebook, dynamic_table
from optinfer_kernels.quantized_arguments import NestedScale as KernelNestedScale
from optinfer_kernels.quantized_arguments import QuantizedWeight, codebook_tensor

if TYPE_CHECKING:
    from optinfer.quantization.schemes import Scheme

__all__ = ["CodebookTensor", "dequantize_4bit", "quantize_4bit"]

# Quantize this many weights at a time: temporaries stay small, and threads have enough to do between two barriers.
# A multiple of every block size.
CHUNK = 1 << 18
GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # as in bitsandbytes


class CodebookTensor(QuantizedTensor):
    """nf4, fp4: ``value = codebook[code] * absmax``, an absmax per block of the flattened tensor.

    `packed` is uint8 ``[(out * in + 1) // 2, 1]``, `scale` the blocks' absmax, float32 ``[blocks]``, or a `NestedScale`.
    """

    SCALE = "absmax"
    scheme: CodebookName

    @classmethod
    def settle(cls, scheme: Scheme, group_size: GroupSize, options: dict[str, Any]) -> Scheme:
        refuse_options(scheme, options, "double_quant")
        if group_size is None:
            group_size = scheme.group_size
        check_choice(group_size, GROUP_SIZES, "group_size")
        return replace(scheme, group_size=int(group_size), double_quant=options["double_quant"])

    @classmethod
    def make(cls, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
        return quantize_4bit(weight, cast(CodebookName, scheme.name), scheme.group_size, scheme.double_quant)

    @classmethod
    def stored(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
        n = math.prod(shape)
        blocks = -(-n // scheme.group_size)
        stored: dict[str, Stored] = {"packed": (((n + 1) // 2, 1), torch.uint8)}
        if not scheme.double_quant:
            return stored | {"absmax": ((blocks,), torch.float32)}
        return stored | {
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // NestedScale.BLOCK),), torch.float32),
            "nested_offset": ((), torch.float32),
        }

    @classmethod
    def assemble(
        cls, scheme: Scheme, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantizedTensor:
        q = super().assemble(scheme, tensors, shape, dtype)
        if scheme.double_quant:
            q.scale = NestedScale(tensors["absmax"], tensors["nested_absmax"], tensors["nested_offset"])
        return q

    def settled_group(self) -> int:
        return self.group_size

    def codes(self) -> Tensor:
        n = math.prod(self.shape)
        return unpack_bits(self.packed.reshape(-1), 4, 2 * self.packed.numel())[:n].reshape(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        if len(self.shape) == 2:
            return super().dequantize(dtype)
        return self._range(0, math.prod(self.shape), dtype or self.dtype).reshape(self.shape)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        width = self.shape[1]
        return self._range(start * width, stop * width, dtype or self.dtype).view(stop - start, width)

    def _range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Elements ``start … stop`` of the flattened tensor."""
        first, last = start // 2, (stop + 1) // 2
        octets = self.packed.reshape(-1)[first:last]
        values = _pairs(self.scheme, self.device).index_select(0, octets.int()).view(-1)
        values = values[start - 2 * first :][: stop - start]
        block = self.group_size
        first_block, last_block = start // block, -(-stop // block)
        if isinstance(self.scale, NestedScale):
            absmax = self.absmax[first_block:last_block]
        else:
            absmax = self.scale[first_block:last_block]
        if start % block == 0 and stop % block == 0:
            return (values.view(-1, block) * absmax[:, None]).view(-1).to(dtype)
        spread = absmax.repeat_interleave(block)[start - first_block * block :][: stop - start]
        return (values * spread).to(dtype)

    def kernel_weight(self) -> QuantizedWeight | None:
        rows, columns = self.shape
        if columns % self.group_size:  # a block goes on in the next row
            return None
        nested, scale = None, self.scale
        if isinstance(scale, NestedScale):
            table = codebook_tensor(DYNAMIC_INT8, torch.float32, self.device)
            nested = KernelNestedScale(scale.absmax, scale.offset, table)
            scale = scale.codes
        return QuantizedWeight(
            self.packed.view(rows, columns // 2), scale.view(rows, columns // self.group_size), self.group_size,
            tuple(CODEBOOKS[self.scheme]), None, nested,
        )  # fmt: skip

    def cpu_weight(self, bias: Tensor | None = None) -> CpuWeight | None:
        if len(self.shape) != 2:
            return None
        nested, scale = None, self.scale
        if isinstance(scale, NestedScale):
            nested, scale = (dynamic_table(), scale.absmax, scale.offset), scale.codes
        rows, columns = self.shape
        values = codebook(self.scheme)
        return CpuWeight.codebook_codes(self.packed, (rows, columns), self.group_size, values, scale, nested, bias)


def quantize_4bit(
    weight: Tensor, quant_type: CodebookName = "nf4", group_size: int = 64, double_quant: bool = False
) -> QuantizedTensor:
    """Quantize a tensor to NF4 or FP4.

    The tensor is flattened and cut into blocks (rows do not matter); each block is divided by its largest
    magnitude, `absmax`, and each number replaced by the nearest of the sixteen values.

    Args:
        weight: any shape, float32, bfloat16 or float16, finite.
        quant_type: ``"nf4"`` or ``"fp4"``.
        group_size: 32, 64 … 4096. The last block is shorter where the size is no multiple of it.
        double_quant: also quantize the absmax values, to 8 bits around their mean: 0.127 instead of 0.5
            bits per weight at block size 64.

    Returns:
        A QuantizedTensor: `packed` uint8 ``[(n + 1) // 2, 1]``, two codes a byte, the first in the high nibble.

    Raises:
        TypeError: `weight` is no tensor of those dtypes.
        ValueError: empty, NaN or Inf inside; unknown `quant_type` or `group_size`.
    """
    check_choice(quant_type, get_args(CodebookName), "quant_type")
    check_choice(group_size, GROUP_SIZES, "group_size")
    check_weight(weight, ndim=None)

    flat = weight.detach().reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // group_size), device=flat.device)
    step = CHUNK if flat.device.type == "cpu" else flat.numel() + flat.numel() % 2
    for start in range(0, flat.numel(), step):
        codes, scale = _nearest_codes(flat[start : start + step].float(), quant_type, group_size)
        absmax[start // group_size :][: len(scale)] = scale
        if len(codes) % 2:
            codes = torch.cat([codes, codes.new_full((1,), _code_of_zero(quant_type))])
        pairs = codes.view(-1, 2)
        packed[start // 2 :][: len(pairs), 0] = (pairs[:, 0] << 4) | pairs[:, 1]

    return CodebookTensor(
        packed=packed,
        scale=nest(absmax) if double_quant else absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        scheme=quant_type,
        bits=4,
        group_size=group_size,
    )


def dequantize_4bit(q: QuantizedTensor) -> Tensor:
    """Restore a tensor quantized by `quantize_4bit`: ``codebook[code] * absmax``, in its shape and dtype."""
    if not isinstance(q, CodebookTensor):
        found = q.scheme if isinstance(q, QuantizedTensor) else type(q).__name__
        raise TypeError(f"q must be a QuantizedTensor of scheme {' or '.join(CODEBOOKS)}, got {found}")
    return q.dequantize()


def nest(absmax: Tensor) -> NestedScale:
    """Quantize the absmax values themselves (double quantization): 8-bit codes of ``absmax - mean`` in blocks of 256."""
    offset = absmax.mean()
    values = absmax - offset
    pad = -len(values) % NestedScale.BLOCK
    blocks = torch.nn.functional.pad(values, (0, pad)).view(-1, NestedScale.BLOCK)
    outer = blocks.abs().amax(1)
    scaled = blocks * (1 / outer.clamp(min=1e-38))[:, None]
    table = dynamic_table(absmax.device)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    return NestedScale(codes.view(-1)[: len(values)].clone(), outer, offset)


def _nearest_codes(values: Tensor, quant_type: CodebookName, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes (uint8 ``[n]``) and absmax (float32 ``[blocks]``) of a flat float32 tensor.

    A value halfway between two levels goes to the lower one. Full blocks are multiplied by ``1 / absmax``, a short last block
    is divided by it: the two differ in the last bit, and this is how bitsandbytes does it.
    """
    full = len(values) // group_size * group_size
    blocks = values[:full].view(-1, group_size)
    absmax = torch.maximum(blocks.amax(1), -blocks.amin(1)) if full else values.new_empty(0)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if full < len(values):
        rest = values[full:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, rest[None]])
        scaled = torch.cat([scaled, values[full:] / rest])
    return _nearest_level(scaled, quant_type), absmax


def _nearest_level(scaled: Tensor, quant_type: CodebookName) -> Tensor:
    """The code of the level nearest to each value of a flat tensor in [-1, 1], uint8.

    What `torch.bucketize` with the fifteen midpoints would say, ten times faster: the range is cut into
    bins so narrow that each holds at most one midpoint, so one look-up and one comparison settle it. Exact,
    because the bin is a monotone function of the value, computed in the same way for values and midpoints.
    """
    below, threshold, order = _bins(quant_type, scaled.device)
    index = _bin(scaled)
    level = below.index_select(0, index).add_(scaled > threshold.index_select(0, index))
    return level if order is None else order.index_select(0, level.int())


BINS = 512  # per unit; FP4's closest midpoints are 1/384 apart


def _bin(scaled: Tensor) -> Tensor:
    return (scaled * BINS).add_(BINS).to(torch.int32)


@cache
def _bins(quant_type: CodebookName, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each bin its threshold (the midpoint inside it, or infinity), and the level of the values up to it."""
    midpoints, order = _boundaries(quant_type, device)
    middle_bins = _bin(midpoints).long()
    bins = torch.arange(2 * BINS + 1, device=device)
    below = torch.searchsorted(middle_bins, bins).to(torch.uint8)
    threshold = torch.full(bins.shape, torch.inf, device=device)
    threshold[middle_bins] = midpoints
    return below, threshold, order


@cache
def _boundaries(quant_type: CodebookName, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Midpoints between neighbouring levels, and the code of each level where levels are not sorted (FP4)."""
    code = codebook(quant_type, device)
    order = torch.argsort(code)
    midpoints = (code[order[:-1]] + code[order[1:]]) / 2
    return midpoints, None if order.tolist() == list(range(16)) else order.to(torch.uint8)


def _code_of_zero(quant_type: CodebookName) -> int:
    """The code that pads an odd number of weights to whole bytes: what 0.0 is quantized to."""
    return int(_nearest_level(torch.zeros(1, device="cpu"), quant_type))


@cache
def _pairs(name: CodebookName, device: torch.device) -> Tensor:
    """Both values of every possible byte, float32 ``[256, 2]``: one look-up restores two weights."""
    code, byte = codebook(name, device), torch.arange(256, device=device)
    return torch.stack([code[byte >> 4], code[byte & 15]], 1)
