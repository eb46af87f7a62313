"""Round to nearest: the simplest quantizer, and the yardstick of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from optinfer.quantization.checks import check_weight
from optinfer.quantization.formats.tensor import QuantizedTensor

__all__ = ["grid", "quantize_linear", "resolve_group_size", "round_linear"]

BITS = (2, 3, 4, 8)


def resolve_group_size(group_size: int | str | None, shape: torch.Size) -> int:
    """How many columns share a scale: 0 for the whole tensor.

    Args:
        group_size: a positive int; ``"channel"`` or -1: a row; ``"tensor"`` or None: everything.
        shape: of the weight.
    """
    if group_size in ("tensor", None):
        return 0
    if group_size in ("channel", -1):
        return shape[1]
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f'group_size must be a positive int, "channel" or "tensor", got {group_size!r}')
    return min(group_size, shape[1])


def grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers ``low … high``.

    Symmetric: ``scale = max(|low|, |high|) / (2**(bits-1) - 1)``, zero fixed at ``2**(bits-1)``: the grid
        has as many
    steps up as down, so one of the ``2**bits`` codes stays unused. Affine: ``scale = (high - low) /
    (2**bits - 1)`` over a range widened to hold 0, zero point an integer code, so that 0.0 is restored
    exactly.

    Args:
        low, high: float32, any one shape.
        dtype: the scale is rounded to it *before* codes are chosen, so that they fit the scale that is
            stored.

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
    group_size: int | str | None = 64,
    symmetric: bool = True,
) -> QuantizedTensor:
    """Round each weight to the nearest of ``2**bits`` equally spaced values.

    Args:
        weight: ``[out, in]``, float32, bfloat16 or float16, finite.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; ``"channel"``: one scale a row; ``"tensor"``: one in all.
            The last group of a row is shorter where `in` is no multiple of it.
        symmetric: see `grid`.

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
    block_size = resolve_group_size(group_size, weight.shape) or width
    return QuantizedTensor.from_codes(codes, scale, None if symmetric else zero, bits, block_size, dtype=weight.dtype)


def round_linear(weight: Tensor, bits: int = 4, group_size: int | str | None = 64, symmetric: bool = True) -> Tensor:
    """The values that `quantize_linear` with the same arguments restores, in `weight`'s dtype, without packing them.

    For searches and training loops, which round the same matrix many times and never store it. Arguments are not checked.
    """
    codes, scale, zero = nearest_codes(weight, bits, group_size, symmetric)
    values = codes.sub_(zero[..., None]).mul_(scale.float()[..., None])
    return values.reshape(len(weight), -1)[:, : weight.shape[1]].to(weight.dtype)


def nearest_codes(
    weight: Tensor, bits: int, group_size: int | str | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as float32 ``[rows, groups, group]`` (padded; ``[1, 1, all]`` for one scale in all), scale and zero."""
    columns = resolve_group_size(group_size, weight.shape)
    w = weight.detach().float()
    if columns == 0:
        groups = w.reshape(1, 1, -1)
    else:
        padded = torch.nn.functional.pad(w, (0, -w.shape[1] % columns))  # zeros: inside every grid anyway
        groups = padded.unflatten(1, (-1, columns))
    low, high = groups.amin(-1), groups.amax(-1)  # on a CPU nine times faster than aminmax
    scale, zero = grid(low, high, bits, symmetric, weight.dtype)
    step = torch.where(scale == 0, 1, scale).float()
    codes = (groups / step[..., None]).round_().add_(zero[..., None])
    return codes.clamp_(1 if symmetric else 0, (1 << bits) - 1), scale, zero
