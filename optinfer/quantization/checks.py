"""What a weight must be before anything is made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optinfer.quantization.schemes import Scheme

__all__ = ["CheckpointError", "check_choice", "check_finite", "check_weight"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CheckpointError(ValueError):
    """The model cannot be written in this format, or not here; the message says why. Nothing was written."""


def check_weight(weight: Tensor, name: str = "weight", ndim: int | None = 2) -> None:
    """Raise unless `weight` is a non-empty, finite float32, bfloat16 or float16 tensor (of `ndim` dimensions)."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(weight.shape)}")
    if ndim is not None and weight.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(weight.shape)}")
    check_finite(weight, name)


def check_finite(weight: Tensor, name: str = "weight") -> None:
    """Raise if there is a NaN or an Inf. One pass: the extremes of a tensor with a NaN are NaN."""
    if weight.device.type == "meta":
        return
    low, high = weight.detach().aminmax()
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = (~torch.isfinite(weight)).sum().item()
    raise ValueError(f"{name} has {bad} NaN or Inf value(s) among {weight.numel():,}: nothing was quantized")


def check_choice(value: object, allowed: tuple, name: str) -> None:
    """Raise ValueError naming `name`, the value and the values allowed."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def refuse_options(scheme: Scheme, options: dict[str, Any], *taken: str) -> None:
    """Raise ValueError for an option of `quantize` that the scheme's format does not take."""
    if options["double_quant"] and "double_quant" not in taken:
        raise ValueError(f"double_quant goes with nf4 and fp4, not with scheme={scheme.name!r}")
    if not options["symmetric"] and "symmetric" not in taken:
        raise ValueError(f"symmetric=False goes with int2, int3, int4 and int8, not with scheme={scheme.name!r}")
    if options["threshold"] < 0:
        raise ValueError(f"threshold must be 0 or more, got {options['threshold']!r}")
