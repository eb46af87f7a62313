"""Attention that reads keys and values through block tables.

`paged_attention_reference` is the definition: look up each token's page, then ordinary attention. The Triton
kernel does the same without ever building the contiguous copy.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from optinfer_kernels.paged_arguments import check_paged_attention

BACKENDS = ("auto", "reference", "sdpa", "triton")


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float | None = None,
    backend: str = "auto",
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of the newest token(s) of each sequence over its pages.

    Args:
        q: [batch, heads, head_dim], one query per sequence; or [batch, heads, q_len, head_dim], the last q_len
            tokens of each (a prompt chunk, or drafts to verify). float16, bfloat16 or float32.
        k_cache, v_cache: [num_blocks, block_size, kv_heads, head_dim] in q's dtype, or int8.
        block_tables: int [batch, max_blocks]; entries behind a sequence's last block are never looked at.
        context_lens: int [batch], tokens of each sequence, its queries included.
        scale: of the scores; default 1/sqrt(head_dim).
        backend: "triton" (compiled on a GPU, interpreted on a CPU), "sdpa" (gather the pages, then torch),
            "reference" (the definition), or "auto": triton on a GPU, else sdpa.
        k_scale, v_scale: float32 [num_blocks, block_size, kv_heads], for int8 caches.

    Returns: a tensor like q.

    Raises: TypeError, ValueError naming the argument; TritonMissing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = "triton" if q.is_cuda else "sdpa"
    arguments = (q, k_cache, v_cache, block_tables, context_lens, scale)
    scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
    if backend == "triton":
        from optinfer_kernels import paged_attention as kernel

        return kernel.paged_attention(*arguments, **scales)
    if backend == "reference":
        return paged_attention_reference(*arguments, **scales)
    return _gather_and_attend(*arguments, **scales)


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition, one sequence at a time, computed in `dtype` (float64 makes it an oracle for tests)."""
    a = check_paged_attention(q, k_cache, v_cache, block_tables, context_lens, scale, k_scale, v_scale)
    out = torch.empty((a.batch, a.heads, a.q_len, a.head_dim), dtype=dtype, device=q.device)
    queries = q.reshape(out.shape).to(dtype)
    for i, length in enumerate(context_lens.tolist()):
        token = torch.arange(length, device=q.device)
        page, slot = block_tables[i, token // a.block_size].long(), token % a.block_size
        k, v = k_cache[page, slot].to(dtype), v_cache[page, slot].to(dtype)  # [length, kv_heads, head_dim]
        if k_scale is not None and v_scale is not None:
            k, v = k * k_scale[page, slot].to(dtype)[..., None], v * v_scale[page, slot].to(dtype)[..., None]
        k, v = (x.repeat_interleave(a.group, 1).transpose(0, 1) for x in (k, v))  # [heads, length, head_dim]
        scores = queries[i] @ k.transpose(1, 2) * a.scale
        last_seen = torch.arange(length - a.q_len, length, device=q.device)
        scores = scores.masked_fill(token > last_seen[:, None], -torch.inf)
        out[i] = scores.softmax(-1) @ v
    return out.reshape(q.shape).to(q.dtype if dtype == torch.float32 else dtype)


def gather_pages(
    cache: Tensor, blocks: Tensor, length: int, scales: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The contiguous copy of one sequence: [1, kv_heads, length, head_dim] of its blocks, in their order."""
    _, block_size, kv_heads, head_dim = cache.shape
    blocks = blocks[: -(-length // block_size)]  # entries behind the last block may be anything
    # Whole pages, one after the other: a copy of rows is several times faster than an indexed one.
    tokens = cache.flatten(1).index_select(0, blocks).view(-1, kv_heads, head_dim)[:length]
    if scales is not None:
        tokens = tokens * scales.flatten(1).index_select(0, blocks).view(-1, kv_heads, 1)[:length]
    return tokens.to(dtype or cache.dtype).transpose(0, 1)[None]


def _gather_and_attend(q, k_cache, v_cache, block_tables, context_lens, scale, *, k_scale, v_scale) -> Tensor:
    """Gather one sequence's pages, attend with torch's kernel, go on: the copy is read again while it is in cache."""
    a = check_paged_attention(q, k_cache, v_cache, block_tables, context_lens, scale, k_scale, v_scale)
    # The query heads of one KV head become rows of one small problem: no copy of k and v per query head.
    rows = q.reshape(a.batch, a.kv_heads, a.group * a.q_len, a.head_dim)
    out = torch.empty_like(rows)
    for i, length in enumerate(context_lens.tolist()):
        k = gather_pages(k_cache, block_tables[i], length, k_scale, q.dtype)
        v = gather_pages(v_cache, block_tables[i], length, v_scale, q.dtype)
        mask = None
        if a.q_len > 1:
            last_seen = torch.arange(length - a.q_len, length, device=q.device)
            mask = (torch.arange(length, device=q.device) <= last_seen[:, None]).repeat(a.group, 1)
        out[i] = scaled_dot_product_attention(rows[i : i + 1], k, v, attn_mask=mask, scale=a.scale)[0]
    return out.reshape(q.shape)
