"""LLM.int8(): eight-bit matrix products that survive outliers (arXiv 2208.07339).

Weights get one scale per output row, activations one per token. A token with one huge feature would spend
all 255 levels on it, so features that reach the threshold in any token leave the int8 product and are
multiplied in 16 bits. Statistics, codes and outputs are those of bitsandbytes 0.50.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.quantization.checks import check_weight, refuse_options
from optinfer.quantization.formats.gpu import has_kernels
from optinfer.quantization.formats.tensor import GroupSize, QuantizedTensor, Stored

if TYPE_CHECKING:
    from optinfer.quantization.schemes import Scheme

__all__ = ["Int8Activations", "Int8Rows", "int8_matmul", "quantize_activations", "quantize_int8"]

# 1 / 127**2 as bitsandbytes rounds it: part of the format if outputs are to agree to the last bit.
DEQUANT = 6.200124e-05
FP16_MAX = torch.finfo(torch.float16).max


@dataclass
class Int8Activations:
    """Activations quantized token by token."""

    codes: Tensor  # int8 [tokens, features]; outlier features are zero
    absmax: Tensor  # float32 [tokens], outliers left out
    outliers: Tensor  # int64 [n], the features kept in 16 bits


class Int8Rows(QuantizedTensor):
    """llm_int8: ``value = code * absmax / 127``, an absmax per row: `packed` int8 ``[out, in]``, `scale` float32 ``[out]``."""

    SCALE = "absmax"
    LOOKS_AT_INPUTS = True

    @classmethod
    def settle(cls, scheme: Scheme, group_size: GroupSize, options: dict[str, Any]) -> Scheme:
        refuse_options(scheme, options)
        if group_size not in (None, 0):
            raise ValueError(f"llm_int8 has one scale per row; group_size={group_size!r} cannot be set")
        return replace(scheme, threshold=float(options["threshold"]))

    @classmethod
    def make(cls, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
        return quantize_int8(weight)

    @classmethod
    def stored(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
        return {"packed": (shape, torch.int8), "absmax": (shape[:1], torch.float32)}

    def codes(self) -> Tensor:
        return (self.packed.to(torch.int16) + 128).to(torch.uint8)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        values = self.packed[start:stop].float() * self.absmax[start:stop, None]
        return values.mul_(1 / 127).to(dtype or self.dtype)


def quantize_int8(weight: Tensor) -> QuantizedTensor:
    """Quantize ``[out, in]`` to int8, one absmax per row: ``code = round(weight * 127 / absmax)``.

    Returns:
        A QuantizedTensor of scheme ``llm_int8``: `packed` int8 ``[out, in]``, `absmax` float32 ``[out]``.

    Raises:
        TypeError, ValueError: see `check_weight`.
    """
    check_weight(weight)
    w = weight.detach().float()
    absmax = torch.maximum(w.amax(1), -w.amin(1))
    codes = (w * (127.0 / _nonzero(absmax))[:, None]).round_().to(torch.int8)
    return Int8Rows(codes, absmax, weight.shape, weight.dtype, "llm_int8", 8, weight.shape[1])


def quantize_activations(x: Tensor, threshold: float = 6.0) -> Int8Activations:
    """Quantize activations ``[tokens, features]`` to int8, one absmax per token, outliers aside.

    An element with ``|x| >= threshold`` is left out of its token's absmax; with more than one token, its whole feature is
    zeroed in all of them (`int8_matmul` adds it back in 16 bits). A threshold of 0 means no outliers.
    """
    x = x.clamp(-FP16_MAX, FP16_MAX).half().float()  # int8 steps are 8 times coarser than fp16's
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    outliers = none
    if threshold > 0:
        large = x.abs() >= threshold
        if large.any():
            outliers = large.any(0).nonzero().view(-1)
            x = x.masked_fill(large, 0.0)
    absmax = x.abs().amax(1)
    codes = (x * (127.0 / _nonzero(absmax))[:, None]).round_().to(torch.int8)
    if len(outliers) and len(x) > 1:
        codes[:, outliers] = 0
    return Int8Activations(codes, absmax, outliers)


def int8_matmul(x: Tensor, q: QuantizedTensor, threshold: float = 6.0, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with both factors in int8, sums in int32, outlier features in `x.dtype`.

    Rounding has no slope, so the gradient of `x` is that of the product with the restored weight (straight through).

    Args:
        x: ``[..., in]``, float32, bfloat16 or float16.
        q: from `quantize_int8`, ``[out, in]``.
        threshold: features that reach this magnitude in any token stay in 16 bits; 0 turns that off.

    Returns:
        ``[..., out]`` in `x.dtype`.
    """
    if not isinstance(q, Int8Rows):
        raise TypeError(f"q must be of scheme llm_int8, got {q.scheme}")
    if x.shape[-1] != q.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {q.shape[1]}")
    if threshold < 0:
        raise ValueError(f"threshold must be 0 or more, got {threshold}")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        out = _StraightThrough.apply(x, q, threshold)
        return out if bias is None else out + bias.to(out.dtype)
    return _matmul(x, q, threshold, bias)


class _StraightThrough(torch.autograd.Function):
    """The product in int8 forwards, with the restored weight backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: QuantizedTensor, threshold: float) -> Tensor:
        ctx.q = q
        return _matmul(x, q, threshold, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient @ ctx.q.dequantize(gradient.dtype), None, None


def _matmul(x: Tensor, q: QuantizedTensor, threshold: float, bias: Tensor | None) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    if not len(tokens):
        return x.new_empty(*x.shape[:-1], q.shape[0])
    a = quantize_activations(tokens, threshold)
    sums = _int_matmul(a.codes, q.packed)
    out = sums * (a.absmax[:, None] * q.absmax) * DEQUANT
    if bias is not None:
        out += bias
    out = out.to(x.dtype)
    if len(a.outliers):
        columns = (q.packed[:, a.outliers].float() * q.absmax[:, None]).mul_(1 / 127)
        out = out.addmm(tokens[:, a.outliers], columns.to(x.dtype).t())
    return out.reshape(*x.shape[:-1], q.shape[0])


def _nonzero(absmax: Tensor) -> Tensor:
    """A row of zeros is divided by one."""
    return torch.where(absmax == 0, 1.0, absmax)


def _int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 ``[m, k]``, ``[n, k]`` with exact int32 sums."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    m = len(a)
    if m <= 16 and has_kernels(a.device):
        from optinfer_kernels.int8_matmul import int8_matmul as kernel

        return kernel(a, b)
    # cuBLAS wants more than 16 rows, and sizes in multiples of 8
    if b.shape[0] % 8 or b.shape[1] % 8:
        return (a.double() @ b.double().t()).int()
    a = torch.nn.functional.pad(a, (0, 0, 0, max(32 - m, -m % 8)))
    return torch._int_mm(a, b.t())[:m]
