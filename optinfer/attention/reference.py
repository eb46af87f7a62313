"""Attention as the formula says: the whole matrix of scores at once. What every other version is measured against."""

import torch

from optinfer.attention.traffic import HbmCounter
from optinfer_kernels.attention_arguments import DTYPES, check_attention


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    return_lse: bool = False,
    counter: HbmCounter | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · scale) v in the inputs' own dtype, float64 included; memory grows with N x M.

    Args:
        q: [batch, heads, N, head_dim].
        k, v: [batch, kv_heads, M, head_dim]; heads is a multiple of kv_heads.
        causal: the last query sees the last key, the one before it one key less, and so on (bottom right).
        scale: 1/sqrt(head_dim) by default.
        window: with causal, a query sees this many keys, itself the last.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        mask: further restriction, [batch or 1, heads or 1, N, M]: bool (True may look) or added to the logits.
        return_lse: also return log(sum(exp(logits))) [batch, heads, N].
        counter: counts what three kernels, one per step, would move to and from memory.

    A query that sees no key gives zeros, and -inf in the lse.
    """
    a = check_attention(q, k, v, causal, scale, window, softcap, dtypes=(*DTYPES, torch.float64))
    counter = counter or HbmCounter()
    k, v = k.repeat_interleave(a.group, 1), v.repeat_interleave(a.group, 1)

    counter.read(q, k)
    logits = q @ k.mT * a.scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        logits = logits.masked_fill(~causal_mask(a.q_len, a.kv_len, window, q.device), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    counter.write(logits)

    counter.read(logits)
    lse = torch.logsumexp(logits, -1)
    weights = torch.softmax(logits, -1).masked_fill(lse.unsqueeze(-1) == -torch.inf, 0.0)
    counter.write(weights)

    counter.read(weights, v)
    out = weights @ v
    counter.write(out)
    return (out, lse) if return_lse else out


def causal_mask(q_len: int, kv_len: int, window: int | None = None, device=None) -> torch.Tensor:
    """[q_len, kv_len] bool: which keys each query may see, aligned to the bottom right."""
    position = torch.arange(q_len, device=device)[:, None] + (kv_len - q_len)
    key = torch.arange(kv_len, device=device)
    visible = key <= position
    return visible & (key > position - window) if window is not None else visible


def merge_attention(
    parts: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from attention over parts of them: [(out, lse), ...] -> (out, lse).

    Each part is weighted by its share of the softmax's denominator, exp(lse). This is what lets keys be split over
    tiles, programs (split-KV decoding) or machines (ring attention).
    """
    if not parts:
        raise ValueError("parts must hold at least one (out, lse)")
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    shares = torch.exp(lses - total.masked_fill(total == -torch.inf, 0.0))
    out = sum(share.unsqueeze(-1) * out for share, (out, _) in zip(shares, parts, strict=True))
    return out.to(parts[0][0].dtype), total
