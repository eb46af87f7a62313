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
    cache: Tensor, block_tables: Tensor, max_len: int, scales: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The contiguous copy: [batch, kv_heads, max_len, head_dim], padded with whatever block 0 holds."""
    pages = cache[block_tables.long()].flatten(1, 2)[:, :max_len]  # [batch, max_len, kv_heads, head_dim]
    if scales is not None:
        pages = pages * scales[block_tables.long()].flatten(1, 2)[:, :max_len, :, None]
    return pages.to(dtype or cache.dtype).transpose(1, 2)


def _gather_and_attend(q, k_cache, v_cache, block_tables, context_lens, scale, *, k_scale, v_scale) -> Tensor:
    """Gather the pages of all sequences, then one call of torch's attention with a mask."""
    a = check_paged_attention(q, k_cache, v_cache, block_tables, context_lens, scale, k_scale, v_scale)
    max_len = int(context_lens.max())
    token = torch.arange(max_len, device=q.device)
    needed = token[:: a.block_size] < context_lens[:, None]  # entries behind the last block may be anything
    tables = torch.where(needed, block_tables[:, : needed.shape[1]], 0)
    k = gather_pages(k_cache, tables, max_len, k_scale, q.dtype)
    v = gather_pages(v_cache, tables, max_len, v_scale, q.dtype)
    mask = None
    if a.q_len > 1 or int(context_lens.min()) < max_len:
        padding = (token >= context_lens[:, None])[:, None, :, None]  # may hold anything, even nan
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        last_seen = context_lens[:, None] - a.q_len + torch.arange(a.q_len, device=q.device)
        mask = (token <= last_seen[..., None]).repeat(1, a.group, 1)[:, None]  # [batch, 1, rows, max_len]
    # The query heads of one KV head become rows of one small problem: no copy of k and v per query head.
    rows = q.reshape(a.batch, a.kv_heads, a.group * a.q_len, a.head_dim)
    return scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=a.scale).reshape(q.shape)
