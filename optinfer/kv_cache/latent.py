"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), computed in both of its orders.

A token leaves one latent c of `rank` numbers, and one rotary key that all heads share. Head h's key is W_k[h] c and its
value W_v[h] c. Expanding all of them first is ordinary attention with a large cache. But

    q · (W_k c) = (W_k^T q) · c        and        Σ p (W_v c) = W_v Σ p c

so the matrices can be absorbed into the one query and the one output, and attention runs over the latents themselves, as if
all heads shared a single key of rank + rope_dim numbers and its value were part of it.

Shapes, for n new tokens of a sequence of `length` (the last query is the last key):
    q [heads, n, head_dim], q_rope [heads, n, rope_dim], latent [length, rank], k_rope [length, rope_dim],
    w_k [heads, head_dim, rank], w_v [heads, value_dim, rank]; out [heads, n, value_dim].
"""

import torch
from torch import Tensor


def expanded_latent_attention(
    q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, scale: float
) -> Tensor:
    """Every head's keys and values are computed from all latents, then attention as usual."""
    keys = latent @ w_k.transpose(1, 2)  # [heads, length, head_dim]
    values = latent @ w_v.transpose(1, 2)
    weights = _weights(q @ keys.transpose(1, 2) + q_rope @ k_rope.T, scale)
    return weights @ values


def absorbed_latent_attention(
    q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, scale: float
) -> Tensor:
    """The same numbers, attending over the latents: no key and no value of a head is ever formed."""
    q_latent = q @ w_k  # [heads, n, rank]
    weights = _weights(q_latent @ latent.T + q_rope @ k_rope.T, scale)
    return (weights @ latent) @ w_v.transpose(1, 2)


def _weights(scores: Tensor, scale: float) -> Tensor:
    queries, length = scores.shape[-2:]
    later = torch.ones(queries, length, dtype=torch.bool, device=scores.device).triu(length - queries + 1)
    return (scores * scale).masked_fill(later, -torch.inf).softmax(-1)
