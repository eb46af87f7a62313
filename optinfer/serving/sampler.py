"""From logits to tokens. Every continuation brings its own random number, so a sample never depends on the batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optinfer import cpu
from optinfer.serving.request import SamplingParams
from optinfer.upload import upload

NO_TOKEN = -1  # in place of a token where the logits are not numbers


@dataclass(frozen=True, slots=True)
class Draw:
    """Choose a token from a row of the logits; `uniform` in [0, 1) decides, None: the likeliest."""

    row: int
    params: SamplingParams
    uniform: float | None = None


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


def sample(logits: Tensor, params: SamplingParams, uniforms: Sequence[float]) -> Tensor:
    """One token per row of `logits` [rows, vocabulary], by inverting the cumulative law at the given uniforms."""
    cumulative = filter_logits(logits, params).softmax(-1).cumsum(-1)
    points = upload(uniforms, logits.device, torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1)[:, 0]


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row, int64; NO_TOKEN where the largest logit is NaN or infinite.

    (`max`, not `argmax`: on a CPU in bf16 that is four times as fast.)
    """
    if logits.dtype == torch.float32 and logits.device.type == "cpu" and (kernels := cpu.kernels()) is not None:
        # Torch's threads would go on spinning for milliseconds, and take the processor from the next step's.
        return kernels.likeliest(logits.contiguous())
    highest, tokens = logits.max(dim=-1)
    return tokens.masked_fill(~highest.isfinite(), NO_TOKEN)


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token for each draw, NO_TOKEN where its logits are not numbers. The device is waited for once."""
    if not draws:
        return []
    rows = upload([draw.row for draw in draws], logits.device)
    tokens = likeliest(logits)[rows]
    alike: dict[tuple, list[int]] = {}
    for i, draw in enumerate(draws):
        if draw.uniform is not None:
            p = draw.params
            alike.setdefault((p.temperature, p.top_k, p.top_p, p.min_p), []).append(i)
    for members in alike.values():
        uniforms = [u for i in members if (u := draws[i].uniform) is not None]
        index = upload(members, logits.device)
        drawn = sample(logits[rows[index]], draws[members[0]].params, uniforms)
        tokens[index] = torch.where(tokens[index] < 0, NO_TOKEN, drawn)
    return tokens.tolist()
