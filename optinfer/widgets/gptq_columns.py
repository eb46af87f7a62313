"""Watch GPTQ round a small matrix column by column, and the error move to the columns not yet rounded."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from optinfer.widgets.base import StaticWidget, traitlets

if TYPE_CHECKING:
    from torch import Tensor


class GptqColumns(StaticWidget):
    """One frame per rounded column.

    Frame ``i``: ``weights`` ``[out][in]`` after column ``i`` is rounded and its error passed on; ``moved``, what that
    added to each weight; ``shares``, what a rounding error of 1 in column ``i`` adds to each later column (row ``i`` of
    the Cholesky factor of the inverse Hessian, over its diagonal); ``error``, the output's error so far; ``nearest``,
    the same for round to nearest.
    """

    _esm = pathlib.Path(__file__).with_suffix(".js")

    frames = traitlets.List().tag(sync=True)
    original = traitlets.List().tag(sync=True)
    bits = traitlets.Int().tag(sync=True)

    @classmethod
    def trace(cls, weight: Tensor, hessian: Tensor, bits: int = 3, damp: float = 0.01) -> GptqColumns:
        """Run GPTQ on ``weight [out, in]`` (small, one affine grid per row) and keep every step.

        The walk alone: `gptq_quantize` afterwards takes the nearest codes in rows that came out worse than those.
        """
        import torch

        from optinfer.quantization.formats.grid import quantize_linear, scale_and_zero
        from optinfer.quantization.methods.gptq import inverse_factor

        w = weight.double().clone()
        original = w.clone()
        factor = inverse_factor(hessian, damp)
        low, high = weight.float().aminmax(dim=1)
        scale, zero = scale_and_zero(low, high, bits, False, weight.dtype)
        nearest = quantize_linear(weight, bits, "channel", False).dequantize().double()
        frames: list[dict[str, Any]] = []
        for i in range(w.shape[1]):
            before = w.clone()
            step = torch.where(scale == 0, 1, scale).float()
            code = ((w[:, i].float() / step).round() + zero).clamp(0, (1 << bits) - 1)
            rounded = (code - zero).double() * scale.double()
            w[:, i:] -= torch.outer((w[:, i] - rounded) / factor[i, i], factor[i, i:])
            frames.append(
                {
                    "weights": w.tolist(),
                    "moved": (w - before).tolist(),
                    "shares": (-factor[i] / factor[i, i]).tolist(),
                    "error": _error(original - w, hessian),
                    "nearest": _error(torch.cat([(original - nearest)[:, : i + 1], 0 * w[:, i + 1 :]], 1), hessian),
                }
            )
        return cls(frames=frames, original=original.tolist(), bits=bits)

    def summary(self) -> str:
        last = self.frames[-1]
        return (
            f"GPTQ over {len(self.frames)} columns, {self.bits} bits: output error {last['error']:.3g}, "
            f"round to nearest {last['nearest']:.3g}"
        )


def _error(difference: Tensor, hessian: Tensor) -> float:
    return float(((difference @ hessian.double()) * difference).sum())
