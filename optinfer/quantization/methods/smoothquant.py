"""SmoothQuant: move the outliers of the activations into the weights, so that both fit into 8 bits.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv 2211.10438.

A few input features are a hundred times larger than the rest, the same ones for every token; one scale per token then
leaves the others only a few of the 255 levels. Weights have no such features. Dividing each feature by ``s`` and
multiplying its weights by ``s`` changes nothing in exact arithmetic and shares the difficulty between the two (eq. 4):
``s = max|x|^alpha / max|w|^(1 - alpha)``. Where LLM.int8() computes outliers apart, here nothing is left to compute apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optinfer.quantization.formats.llm_int8 import quantize_int8
from optinfer.quantization.formats.tensor import QuantizedTensor
from optinfer.quantization.methods.awq import fold, foldable, scaling_groups
from optinfer.quantization.methods.calibrate import Calibration, CalibrationLayer, calibrate, quantize_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["smooth_layer", "smoothquant"]


def smoothing_scale(max_abs: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """Eq. 4 for linear layers that share an input: `max_abs` ``[in]``, `weights` ``[out, in]`` each; returns ``[in]``."""
    largest = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    scale = max_abs.float().pow(alpha) / largest.clamp(min=1e-5).pow(1 - alpha)
    return torch.where(max_abs > 0, scale.clamp(min=1e-5), 1.0)


@torch.no_grad()
def smooth_layer(layer: CalibrationLayer, alpha: float = 0.5) -> None:
    """Smooth the inputs that come out of a norm (paper, section 4.3), in the observed layer's copy."""
    found = []
    for scaling in scaling_groups(layer.module):
        if not isinstance(layer.module.get_submodule(scaling.previous), nn.Linear):
            weights = [layer.linears[name].weight for name in scaling.linears]
            max_abs = torch.stack([one.max_abs for one in layer.statistics_of(scaling.linears)]).amax(0)
            scale = smoothing_scale(max_abs, weights, alpha)
            found.append((scaling, scale))
    for scaling, scale in foldable(layer, found):
        fold(layer.module, scaling, scale)


def smoothquant(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | Calibration,
    texts: str | list[str] | None = None,
    alpha: float = 0.5,
    **calibration: Any,
) -> PreTrainedModel:
    """Quantize every linear layer of a decoder to W8A8 with smoothed activations, in place.

    Weights get one scale per row, activations one per token as they come; products are in int8 throughout.
    The model is changed only when the last layer is done.

    Args:
        model, tokenizer, texts: see `calibrate`; a ready `Calibration` may stand in for the tokenizer.
        alpha: how much of the difficulty the weights take over, 0 (none) to 1 (all); the paper's default.
        **calibration: passed on to `calibrate`.

    Raises:
        ValueError: `alpha` out of range, or the decoder's layers are wired in a way there is no rule for.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha!r}")
    run = calibrate(model, tokenizer, texts, **calibration)
    for module in run.layers.values():
        scaling_groups(module)

    def rounded(layer: CalibrationLayer, name: str) -> QuantizedTensor:
        return quantize_int8(layer.linears[name].weight)

    return quantize_layers(model, run, rounded, lambda layer: smooth_layer(layer, alpha), threshold=0.0)
