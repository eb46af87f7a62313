"""int2 … int8: equally spaced values, and rounding to the nearest, the yardstick of all other quantizers."""

from __future__ import annotations

from dataclasses import replace
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
from optinfer_kernels.quantized_arguments import INT4, QuantizedWeight

if TYPE_CHECKING:
    from optinfer.quantization.schemes import Scheme

__all__ = ["GridTensor", "quantize_linear", "resolve_group_size", "round_linear", "scale_and_zero"]

BITS = (2, 3, 4, 8)


class GridTensor(QuantizedTensor):
    """int2 … int8: ``value = (code - zero_point) * scale``, a scale per group of a row, per row, or one in all.

    `packed` is uint8 ``[out, ceil(in * bits / 8)]`` (symmetric 8 bits: signed int8 ``[out, in]``), `scale` ``[out, groups]``,
    ``[out, 1]`` or ``[1, 1]`` in the weight's dtype.

    Attributes:
        zero_point: affine only: packed like the codes, uint8 ``[out, ceil(groups * bits / 8)]``. Symmetric codes have the
            fixed zero ``2 ** (bits - 1)``.
        group_index: int32 ``[in]``, the group of each column, where groups are not consecutive columns (GPTQ's activation
            order); None otherwise.
    """

    OTHERS = ("zero_point", "group_index")

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
    ) -> GridTensor:
        """Pack unsigned integer codes ``[out, in]`` that somebody else computed (round to nearest, GPTQ, AWQ…).

        Args:
            codes: integers in ``0 … 2**bits - 1``.
            scale: kept in the dtype it comes in.
            zero_point: unsigned integers, shape of `scale`, or None: symmetric.
            group_size, dtype, group_index: see the class.
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
            group_size=group_size,
            zero_point=None if zero_point is None else pack_bits(zero_point, bits),
            group_index=None if group_index is None else group_index.to(torch.int32),
        )

    @classmethod
    def settle(cls, scheme: Scheme, group_size: GroupSize, options: dict[str, Any]) -> Scheme:
        refuse_options(scheme, options, "symmetric")
        if group_size is None:
            group_size = scheme.group_size
        elif group_size in ("channel", -1, 0):
            group_size = 0
        elif isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f'group_size must be a positive int or "channel", got {group_size!r}')
        return replace(scheme, group_size=int(group_size), symmetric=options["symmetric"])

    @classmethod
    def make(cls, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
        return quantize_linear(weight, scheme.bits, scheme.group_size or "channel", scheme.symmetric)

    @classmethod
    def stored(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
        rows, columns = shape
        groups = -(-columns // resolve_group_size(scheme.group_size or "channel", torch.Size(shape)))
        packed: Stored = (shape, torch.int8)
        if scheme.bits < 8 or not scheme.symmetric:
            packed = ((rows, packed_width(columns, scheme.bits)), torch.uint8)
        stored: dict[str, Stored] = {"packed": packed, "scale": ((rows, groups), dtype)}
        if not scheme.symmetric:
            stored["zero_point"] = ((rows, packed_width(groups, scheme.bits)), torch.uint8)
        if scheme.act_order:
            stored["group_index"] = ((columns,), torch.int32)
        return stored

    def codes(self) -> Tensor:
        if self.packed.dtype == torch.int8:
            return (self.packed.to(torch.int16) + 128).to(torch.uint8)
        return unpack_bits(self.packed, self.bits, self.shape[-1])

    def zero_points(self) -> Tensor:
        """Unsigned zero points in the shape of `scale`, uint8."""
        assert isinstance(self.scale, Tensor)
        if self.zero_point is None:
            return torch.full_like(self.scale, 1 << (self.bits - 1), dtype=torch.uint8)
        return unpack_bits(self.zero_point, self.bits, self.scale.shape[-1])

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        assert isinstance(self.scale, Tensor)
        one_scale = self.scale.shape[0] == 1
        scale = self.scale if one_scale else self.scale[start:stop]
        if self.packed.dtype == torch.int8:
            steps = self.packed[start:stop].float()
        else:
            zero: Tensor | float = float(1 << (self.bits - 1))
            if self.zero_point is not None:
                stored = self.zero_point if one_scale else self.zero_point[start:stop]
                zero = self._per_column(unpack_bits(stored, self.bits, self.scale.shape[-1]).float())
            steps = unpack_bits(self.packed[start:stop], self.bits, self.shape[1]).float() - zero
        return steps.mul_(self._per_column(scale.float())).to(dtype or self.dtype)

    def _per_column(self, per_group: Tensor) -> Tensor:
        """Spread ``[rows, groups]`` over the columns (or leave it to broadcasting where there is one group)."""
        if per_group.shape[1] == 1:
            return per_group
        if self.group_index is not None:
            return per_group[:, self.group_index.long()]
        return per_group.repeat_interleave(self.group_size, 1)[:, : self.shape[1]]

    def kernel_weight(self) -> QuantizedWeight | None:
        assert isinstance(self.scale, Tensor)
        if self.group_index is not None or self.scale.shape[0] != self.shape[0]:
            return None
        if self.bits != 4 and not (self.bits == 8 and self.symmetric):
            return None
        codebook = INT4 if self.bits == 4 else None
        return QuantizedWeight(self.packed, self.scale, self.group_size, codebook, self.zero_point)

    def cpu_weight(self, bias: Tensor | None = None) -> CpuWeight | None:
        assert isinstance(self.scale, Tensor)
        if self.group_index is not None:
            return None
        return CpuWeight.linear_codes(
            self.packed, self.shape[1], self.bits, self.group_size, self.scale, self.zero_point, bias
        )


def resolve_group_size(group_size: GroupSize, shape: torch.Size) -> int:
    """How many columns share a scale: 0 for the whole tensor.

    `group_size`: a positive int; ``"channel"`` or -1: a row; ``"tensor"`` or None: everything.
    """
    if group_size in ("tensor", None):
        return 0
    if group_size in ("channel", -1):
        return shape[1]
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f'group_size must be a positive int, "channel" or "tensor", got {group_size!r}')
    return min(group_size, shape[1])


def scale_and_zero(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers ``low … high``.

    Symmetric: ``scale = max(|low|, |high|) / (2**(bits-1) - 1)``, zero fixed at ``2**(bits-1)``: as many steps up as down, so
    one of the ``2**bits`` codes stays unused. Affine: ``scale = (high - low) / (2**bits - 1)`` over a range widened to hold
    0, zero point an integer code, so that 0.0 is restored exactly.

    Args:
        low, high: float32, any one shape.
        dtype: the scale is rounded to it *before* codes are chosen, so that they fit the scale that is stored.

    Returns:
        scale (`dtype`) and zero point (float32 integers), shape of `low`.
    """
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / ((1 << (bits - 1)) - 1)
        zero = torch.full_like(scale, 1 << (bits - 1))
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / ((1 << bits) - 1)
        zero = torch.zeros_like(scale)
    scale = scale.to(dtype)
    if not symmetric:
        safe = torch.where(scale == 0, 1, scale).float()
        zero = (-low / safe).round().clamp(0, (1 << bits) - 1)
    return scale, zero


def quantize_linear(
    weight: Tensor,
    bits: int = 4,
    group_size: GroupSize = 64,
    symmetric: bool = True,
) -> GridTensor:
    """Round each weight to the nearest of ``2**bits`` equally spaced values.

    Args:
        weight: ``[out, in]``, float32, bfloat16 or float16, finite.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; ``"channel"``: one scale a row; ``"tensor"``: one in all.
            The last group of a row is shorter where `in` is no multiple of it.
        symmetric: see `scale_and_zero`.

    Returns:
        A QuantizedTensor of scheme ``int{bits}``; scales in the weight's dtype.

    Raises:
        TypeError: `weight` is no floating-point tensor of those dtypes.
        ValueError: empty, not 2-D, NaN or Inf inside; bits or group size not allowed.
    """
    check_weight(weight)
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
    codes, scale, zero = nearest_codes(weight, bits, group_size, symmetric)
    rows, width = weight.shape
    codes = codes.to(torch.uint8).reshape(rows, -1)[:, :width]
    group_size = resolve_group_size(group_size, weight.shape) or width
    return GridTensor.from_codes(codes, scale, None if symmetric else zero, bits, group_size, dtype=weight.dtype)


def round_linear(weight: Tensor, bits: int = 4, group_size: GroupSize = 64, symmetric: bool = True) -> Tensor:
    """The values that `quantize_linear` with the same arguments restores, in `weight`'s dtype, without packing them.

    For searches and training loops, which round the same matrix many times and never store it. Arguments are not checked.
    """
    codes, scale, zero = nearest_codes(weight, bits, group_size, symmetric)
    values = codes.sub_(zero[..., None]).mul_(scale.float()[..., None])
    return values.reshape(len(weight), -1)[:, : weight.shape[1]].to(weight.dtype)


def nearest_codes(weight: Tensor, bits: int, group_size: GroupSize, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as float32 ``[rows, groups, group]`` (padded; ``[1, 1, all]`` for one scale in all), scale and zero."""
    columns = resolve_group_size(group_size, weight.shape)
    w = weight.detach().float()
    if columns == 0:
        groups = w.reshape(1, 1, -1)
    else:
        padded = torch.nn.functional.pad(w, (0, -w.shape[1] % columns))  # zeros: inside every grid anyway
        groups = padded.unflatten(1, (-1, columns))
    low, high = groups.amin(-1), groups.amax(-1)  # on a CPU nine times faster than aminmax
    scale, zero = scale_and_zero(low, high, bits, symmetric, weight.dtype)
    step = torch.where(scale == 0, 1, scale).float()
    codes = (groups / step[..., None]).round_().add_(zero[..., None])
    return codes.clamp_(1 if symmetric else 0, (1 << bits) - 1), scale, zero
