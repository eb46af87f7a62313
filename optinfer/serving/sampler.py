"""From logits to tokens. Every continuation brings its own random number, so a sample never depends on the batch."""

import torch
from torch import Tensor

from optinfer import cpu
from optinfer.serving.request import SamplingParams


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then top-k, min-p and top-p, in transformers' order; dropped tokens get -inf. [rows, vocabulary]."""
    logits = logits.double() / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= params.top_p  # the likeliest token always stays
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)
    if params.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits


def sample(logits: Tensor, params: SamplingParams, uniforms: list[float]) -> list[int]:
    """One token per row of `logits` [rows, vocabulary], by inverting the cumulative law at the given uniforms."""
    cumulative = filter_logits(logits, params).softmax(-1).cumsum(-1)
    points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1)[:, 0].tolist()


def greedy(logits: Tensor) -> list[int]:
    """The likeliest token of each row. (`max`, not `argmax`: on a CPU in bf16 that is four times as fast.)"""
    if logits.dtype == torch.float32 and logits.device.type == "cpu" and (kernels := cpu.kernels()) is not None:
        # Torch's threads would go on spinning for milliseconds, and take the processor from the next step's.
        return kernels.argmax(logits.contiguous()).tolist()
    return logits.max(dim=-1).indices.tolist()
