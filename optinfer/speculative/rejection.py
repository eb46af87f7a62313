"""Rejection sampling: the coin flip that makes a draft free of consequences (Leviathan et al. 2023, Chen et al. 2023).

The draft proposes ``x`` with probability ``q(x)``; the target would have chosen it with probability ``p(x)``. Accept with
probability ``min(1, p(x) / q(x))``; on the first rejection draw from what is left of p, ``max(0, p - q)`` normalized.
Then each emitted token is distributed exactly as p, whatever q is.

A *deterministic* draft (a lookup, a greedy model) names its token without a coin: q is 1 there, and is passed as None.
"""

import torch
from torch import Tensor


def acceptance_probability(draft_tokens: Tensor, draft_probs: Tensor | None, target_probs: Tensor) -> Tensor:
    """``min(1, p(x) / q(x))`` for each drafted token; 0 where p(x) is 0.

    Args:
        draft_tokens: integers [..., gamma].
        draft_probs: q, [..., gamma, vocab], or None for a deterministic draft.
        target_probs: p, [..., gamma, vocab] or with further rows, which are ignored.
    """
    index = draft_tokens.unsqueeze(-1)
    p = target_probs[..., : draft_tokens.shape[-1], :].gather(-1, index).squeeze(-1)
    if draft_probs is None:
        return p
    q = draft_probs.gather(-1, index).squeeze(-1)
    return torch.where(p >= q, (p > 0).to(p.dtype), p / q.clamp_min(torch.finfo(q.dtype).tiny))


def residual_distribution(draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """``max(0, p - q)`` normalized, [..., vocab]: what to draw from after a rejection.

    Where q covers p, a rejection has probability zero; rounding can still bring one about, and p is returned.
    """
    left = (target_probs - draft_probs).clamp_min(0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp_min(torch.finfo(left.dtype).tiny), target_probs)


def output_distribution(draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """The exact law of the first emitted token: accepted or, after a rejection, drawn from the residual.

    It is computed as the algorithm runs, branch by branch, so that it can be compared with p.

    Args:
        draft_probs: q of the first position, [..., vocab]; or [gamma, vocab], of a whole draft.
        target_probs: p, of the same shape; or [gamma + 1, vocab], of the whole draft and one more position.
    """
    if draft_probs.dim() == target_probs.dim() == 2 and target_probs.shape[0] == draft_probs.shape[0] + 1:
        draft_probs, target_probs = draft_probs[0], target_probs[0]
    if draft_probs.shape != target_probs.shape:
        raise ValueError(
            f"draft_probs {tuple(draft_probs.shape)} and target_probs {tuple(target_probs.shape)} do not fit together: "
            f"give both [..., vocab], or [gamma, vocab] and [gamma + 1, vocab]"
        )
    vocab = draft_probs.shape[-1]
    every_token = torch.arange(vocab, device=draft_probs.device).expand(*draft_probs.shape[:-1], vocab)
    rows = (*draft_probs.shape[:-1], vocab, vocab)  # one row per token the draft may name
    accept = acceptance_probability(
        every_token, draft_probs.unsqueeze(-2).expand(rows), target_probs.unsqueeze(-2).expand(rows)
    )
    accepted = draft_probs * accept
    rejected = 1 - accepted.sum(-1, keepdim=True)
    return accepted + rejected * residual_distribution(draft_probs, target_probs)


def rejection_sample(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Accept a prefix of the draft and add one token of the target's own.

    Args:
        draft_tokens: int64 [gamma], or [batch, gamma]; gamma may be 0.
        draft_probs: q of each drafted token, [(batch,) gamma, vocab]; None for a deterministic draft.
        target_probs: p at the drafted positions and one further, [(batch,) gamma + 1, vocab].
        generator: of the device that the tensors are on.

    Returns:
        One draft: the 1 to gamma + 1 emitted tokens. A batch: [batch, gamma + 1], each row's tokens followed by -1, and
        no synchronization with the host.

    Raises:
        ValueError: the shapes or devices do not fit; a drafted token lies outside the vocabulary (checked on a CPU only).
    """
    _check(draft_tokens, draft_probs, target_probs, generator)
    if draft_tokens.dim() == 1:
        one = rejection_sample(
            draft_tokens[None],
            None if draft_probs is None else draft_probs[None],
            target_probs[None],
            generator,
        )[0]
        return one[one >= 0]

    batch, gamma = draft_tokens.shape
    if draft_probs is None:
        draft_probs = torch.zeros_like(target_probs[:, :gamma]).scatter_(-1, draft_tokens.unsqueeze(-1), 1.0)
    coins = torch.rand(batch, gamma, dtype=target_probs.dtype, device=target_probs.device, generator=generator)
    accepted = coins < acceptance_probability(draft_tokens, draft_probs, target_probs)
    count = accepted.cumprod(-1).sum(-1, keepdim=True)  # tokens before the first rejection, [batch, 1]

    # After the last drafted token nothing was proposed: there q is 0 and the residual is p itself.
    q = torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], dim=1)
    row = count.unsqueeze(-1).expand(-1, -1, q.shape[-1])
    residual = residual_distribution(q.gather(1, row), target_probs.gather(1, row)).squeeze(1)
    last = torch.multinomial(residual, 1, generator=generator)

    position = torch.arange(gamma + 1, device=draft_tokens.device)
    padded = torch.cat([draft_tokens, last], dim=1)
    return torch.where(position < count, padded, torch.where(position == count, last, -1))


def greedy_accept(draft_tokens: Tensor, target_tokens: Tensor) -> Tensor:
    """`rejection_sample` in the limit of temperature zero: the target's tokens up to its first disagreement, inclusive.

    Args:
        draft_tokens: int64 [gamma].
        target_tokens: the target's most likely token at each position and one further, int64 [gamma + 1].
    """
    agreed = (draft_tokens == target_tokens[:-1]).cumprod(-1).sum()
    return target_tokens[: int(agreed) + 1]


def _check(
    draft_tokens: Tensor, draft_probs: Tensor | None, target_probs: Tensor, generator: torch.Generator | None
) -> None:
    if draft_tokens.dim() not in (1, 2):
        raise ValueError(f"draft_tokens must be [gamma] or [batch, gamma], got shape {tuple(draft_tokens.shape)}")
    *batch, gamma = draft_tokens.shape
    vocab = target_probs.shape[-1]
    if tuple(target_probs.shape) != (*batch, gamma + 1, vocab):
        raise ValueError(
            f"target_probs must be {(*batch, gamma + 1, 'vocab')} for {gamma} drafted tokens, one position more than the draft; "
            f"got {tuple(target_probs.shape)}"
        )
    if draft_probs is not None and tuple(draft_probs.shape) != (*batch, gamma, vocab):
        raise ValueError(
            f"draft_probs must be {(*batch, gamma, vocab)}, with the target's vocabulary; got {tuple(draft_probs.shape)}"
        )
    device = target_probs.device
    for name, given in (("draft_tokens", draft_tokens), ("draft_probs", draft_probs), ("generator", generator)):
        if given is not None and given.device.type != device.type:
            raise ValueError(f"{name} is on {given.device} and target_probs on {device}; make both on one device")
    if device.type == "cpu" and gamma and not 0 <= draft_tokens.min() <= draft_tokens.max() < vocab:
        raise ValueError(f"draft_tokens must lie in 0..{vocab - 1}, got {draft_tokens.tolist()}")
