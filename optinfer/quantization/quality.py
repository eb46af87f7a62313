"""What quantization costs in quality: perplexity with its error bar, and the distance to the original model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Agreement", "Perplexity", "Reference", "kl_divergence", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity ``exp(mean negative log-likelihood)`` of a text.

    Attributes:
        value: the perplexity.
        stderr: its standard error, from the spread between windows (tokens of one window depend on each other).
        tokens: how many were predicted.
        windows: mean negative log-likelihood of each window, nats. Two models on the same windows can be
            compared pairwise, which is far sharper than comparing two error bars.
    """

    value: float
    stderr: float
    tokens: int
    windows: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f}"

    def ratio(self, other: Perplexity) -> tuple[float, float]:
        """``self / other`` and its standard error, from differences window by window."""
        if len(self.windows) != len(other.windows):
            raise ValueError(f"{len(self.windows)} windows against {len(other.windows)}: use the same text and length")
        mean, error = _mean_and_error([a - b for a, b in zip(self.windows, other.windows)])
        return math.exp(mean), math.exp(mean) * error


@dataclass(frozen=True)
class Agreement:
    """How close a model's next-token distributions are to a reference's.

    Attributes:
        value: mean KL divergence ``KL(reference || model)``, nats per token.
        stderr: its standard error, from the spread between windows.
        top1: fraction of tokens where both find the same token most likely.
        tokens: how many were compared.
    """

    value: float
    stderr: float
    top1: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.stderr:.4f} nats, top-1 {self.top1:.1%}"


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 256,
    max_tokens: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of `text`, cut into windows that do not overlap; the first token of a window is not predicted.

    Args:
        window: tokens per window. Shorter windows give higher values: compare only at one length.
        max_tokens: use this many tokens from the start of the text.

    Raises:
        ValueError: the text has fewer than two tokens, or `window` is below 2.
    """
    windows = _windows(model, tokenizer, text, window, max_tokens, progress)
    return _perplexity([_loss(_log_probabilities(model, ids), ids) for ids in windows])


@torch.no_grad()
def kl_divergence(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 256,
    max_tokens: int | None = None,
    progress: bool = False,
) -> Agreement:
    """KL divergence of `model` from `reference` on `text`, token by token, and how often the favourite agrees.

    Args:
        reference: the unquantized model.
        model: with the same vocabulary.
        window, max_tokens: as for `perplexity`.
    """
    windows = _windows(model, tokenizer, text, window, max_tokens, progress)
    return _agreement(
        [_divergence(_log_probabilities(reference, ids), _log_probabilities(model, ids)) for ids in windows]
    )


class Reference:
    """A model's predictions for a text, kept: every model that is held against them costs one pass of its own.

    Args:
        model, tokenizer, text, window, max_tokens: as for `perplexity`. Kept are 4 bytes per token and word of the
            vocabulary, 100 MB for 512 tokens of 49,152 words.

    Attributes:
        model: the model.
        perplexity: its own perplexity.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        window: int = 256,
        max_tokens: int | None = 512,
    ):
        self.model = model
        self._windows = list(_windows(model, tokenizer, text, window, max_tokens, progress=False))
        self._predictions = [_log_probabilities(model, ids) for ids in self._windows]
        self.perplexity = _perplexity([_loss(p, ids) for p, ids in zip(self._predictions, self._windows)])

    @torch.no_grad()
    def compare(self, model: PreTrainedModel) -> tuple[Perplexity, Agreement]:
        """What `perplexity` and `kl_divergence` say of a model with the same vocabulary."""
        losses, divergences = [], []
        for p, ids in zip(self._predictions, self._windows):
            q = _log_probabilities(model, ids.to(model.device))
            losses.append(_loss(q, ids))
            divergences.append(_divergence(p, q.to(p.device)))
        return _perplexity(losses), _agreement(divergences)


def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of every next token, ``[tokens, vocabulary]``."""
    return model(ids).logits[0].float().log_softmax(-1)


def _loss(predicted: Tensor, ids: Tensor) -> tuple[float, int]:
    """Mean negative log-likelihood of a window's tokens after its first, and their number."""
    following = ids[0, 1:].to(predicted.device)
    return torch.nn.functional.nll_loss(predicted[:-1], following).item(), len(following)


def _divergence(p: Tensor, q: Tensor) -> tuple[float, int, int]:
    """Mean KL divergence of one window, the number of its tokens, and of those where the favourite is the same."""
    if p.shape != q.shape:
        raise ValueError(f"vocabularies differ: {p.shape[-1]} and {q.shape[-1]} tokens")
    mean = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item() / len(p)
    return mean, len(p), int((p.argmax(-1) == q.argmax(-1)).sum())


def _perplexity(losses: list[tuple[float, int]]) -> Perplexity:
    means, counts = [mean for mean, _ in losses], [count for _, count in losses]
    mean, error = _mean_and_error(means, counts)
    value = math.exp(mean) if mean < 700 else math.inf  # of random logits in the thousands, say
    return Perplexity(value, value * error, sum(counts), tuple(means))


def _agreement(divergences: list[tuple[float, int, int]]) -> Agreement:
    means, counts, same = zip(*divergences)
    mean, error = _mean_and_error(list(means), list(counts))
    return Agreement(mean, error, sum(same) / sum(counts), sum(counts))


def _windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int,
    max_tokens: int | None,
    progress: bool,
) -> Iterator[Tensor]:
    if window < 2:
        raise ValueError(f"window must be 2 or more, got {window}")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :max_tokens]
    if ids.shape[1] < 2:
        raise ValueError(f"text has {ids.shape[1]} token(s); 2 are needed to predict one")
    pieces = [piece for piece in ids.split(window, 1) if piece.shape[1] > 1]
    for piece in tqdm(pieces, desc="evaluate", leave=False, disable=not progress):
        yield piece.to(model.device)


def _mean_and_error(values: list[float], weights: list[int] | None = None) -> tuple[float, float]:
    """Weighted mean, and its standard error treating values as independent; NaN where there is only one."""
    weights = weights or [1] * len(values)
    total = sum(weights)
    mean = sum(v * w for v, w in zip(values, weights)) / total
    n = len(values)
    if n < 2:
        return mean, math.nan
    spread = sum((w / total) ** 2 * (v - mean) ** 2 for v, w in zip(values, weights))
    return mean, math.sqrt(spread * n / (n - 1))
