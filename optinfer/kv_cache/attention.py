"""Attention that reads keys and values through block tables.

The queries of a batch lie in a row, and sequences may have different numbers of them: one token each while decoding, a
piece of a prompt, drafts to verify, or all of these in one step.

`paged_attention_reference` is the definition: look up each token's page, then ordinary attention. The Triton kernel
and the C++ loops do the same without ever building the contiguous copy.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from optinfer import cpu
from optinfer_kernels.paged_arguments import PagedArguments, check_paged_attention

Backend = Literal["auto", "triton", "loops", "sdpa", "reference"]
BACKENDS = get_args(Backend)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float | None = None,
    backend: Backend = "auto",
    **options: Any,
) -> Tensor:
    """Attention of the newest token(s) of each sequence over its pages.

    Args:
        q: packed [tokens, heads, head_dim] with `query_starts`; without it [batch, heads, head_dim], one query per
            sequence, or [batch, heads, q_len, head_dim], the last q_len tokens of each. float16, bfloat16 or float32.
        k_cache, v_cache: [num_blocks, block_size, kv_heads, head_dim] in q's dtype, or int8.
        block_tables: int [batch, max_blocks]; entries behind a sequence's last block are never looked at.
        context_lens: int [batch], tokens of each sequence, its queries included.
        scale: of the scores; default 1/sqrt(head_dim).
        backend: "triton" (compiled on a GPU, interpreted on a CPU), "loops" (C++, on a CPU), "sdpa" (gather the pages of
            one sequence, then torch), "reference" (the definition), or "auto": triton on a GPU; on a CPU loops, and sdpa
            where there is no compiler.
        query_starts: int [batch + 1], where each sequence's queries begin in q, and their end.
        max_queries: most queries of one sequence; on a GPU give it with query_starts, or the stream must be waited for.
        window: a query sees so many tokens at most, itself included; None: all before it.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        sinks: [heads], scores of one more key, whose value is zero (GPT-OSS).
        tree_mask: bool [tokens, max_queries]: which of its sequence's queries each query sees, of those up to itself (draft
            trees); all older tokens are seen. Not together with a window.
        k_scale, v_scale: float32 [num_blocks, block_size, kv_heads], for int8 caches.

    Returns: a tensor like q.

    Raises: TypeError, ValueError naming the argument; TritonMissing; RuntimeError for "loops" without a compiler.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    arguments = (q, k_cache, v_cache, block_tables, context_lens, scale)
    if backend == "auto":
        backend = choose_backend(q.device) if isinstance(q, Tensor) else "reference"
    if backend == "triton":
        from optinfer_kernels import paged_attention as kernel

        return kernel.paged_attention(*arguments, **options)
    if backend == "reference":
        return paged_attention_reference(*arguments, **options)
    scales = {name: options.get(name) for name in ("k_scale", "v_scale")}
    a = check_paged_attention(*arguments, **options)
    if backend == "loops":
        return a.unpack(_by_loops(a, k_cache, v_cache, block_tables, context_lens, **scales))
    return a.unpack(_by_sdpa(a, k_cache, v_cache, block_tables, context_lens, **scales))


def choose_backend(device: torch.device) -> Backend:
    """What "auto" means on a device."""
    if device.type == "cuda":
        return "triton"
    return "loops" if device.type == "cpu" and cpu.kernels() is not None else "sdpa"


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    """The definition, one sequence at a time, computed in `dtype` (float64 makes it an oracle for tests)."""
    a = check_paged_attention(q, k_cache, v_cache, block_tables, context_lens, scale, **options)
    out = torch.empty(a.q.shape, dtype=dtype, device=q.device)
    starts = a.query_starts.tolist()
    for i, length in enumerate(context_lens.tolist()):
        token = torch.arange(length, device=q.device)
        page, slot = block_tables[i, token // a.block_size].long(), token % a.block_size
        k, v = k_cache[page, slot].to(dtype), v_cache[page, slot].to(dtype)  # [length, kv_heads, head_dim]
        if a.int8:
            k = k * options["k_scale"][page, slot].to(dtype)[..., None]
            v = v * options["v_scale"][page, slot].to(dtype)[..., None]
        k, v = (x.repeat_interleave(a.group, 1).transpose(0, 1) for x in (k, v))  # [heads, length, head_dim]
        queries = a.q[starts[i] : starts[i + 1]].to(dtype).transpose(0, 1)  # [heads, queries, head_dim]
        scores = queries @ k.transpose(1, 2) * a.scale
        if a.softcap:
            scores = torch.tanh(scores / a.softcap) * a.softcap
        scores = scores.masked_fill(~_visible(a, queries.shape[1], length, q.device, starts[i]), -torch.inf)
        if a.sinks is not None:
            sinks = a.sinks.to(dtype)[:, None, None].expand(-1, queries.shape[1], 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[starts[i] : starts[i + 1]] = (weights @ v).transpose(0, 1)
    return a.unpack(out.to(q.dtype if dtype == torch.float32 else dtype))


def _visible(a: PagedArguments, queries: int, length: int, device: torch.device, start: int) -> Tensor:
    """Bool [queries, length]: which of its context each of a sequence's last tokens sees; its queries begin at `start`."""
    token = torch.arange(length, device=device)
    own = torch.arange(length - queries, length, device=device)[:, None]
    visible = token <= own
    if a.tree_mask is not None:
        visible[:, length - queries :] &= a.tree_mask[start : start + queries, :queries]
    return visible & (token > own - a.window) if a.window else visible


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


def _by_sdpa(a: PagedArguments, k_cache, v_cache, block_tables, context_lens, k_scale=None, v_scale=None) -> Tensor:
    """Gather one sequence's pages, attend with torch's kernel, go on: the copy is read again while it is in cache."""
    if a.softcap or a.sinks is not None:  # torch's kernel has neither
        options: dict[str, Any] = {
            "query_starts": a.query_starts,
            "max_queries": a.max_queries,
            "window": a.window or None,
        }
        options |= {"softcap": a.softcap or None, "sinks": a.sinks, "k_scale": k_scale, "v_scale": v_scale}
        options["tree_mask"] = a.tree_mask
        return paged_attention_reference(a.q, k_cache, v_cache, block_tables, context_lens, a.scale, **options)
    out = torch.empty_like(a.q)
    starts = a.query_starts.tolist()
    for i, length in enumerate(context_lens.tolist()):
        k = gather_pages(k_cache, block_tables[i], length, k_scale, a.q.dtype)
        v = gather_pages(v_cache, block_tables[i], length, v_scale, a.q.dtype)
        queries = a.q[starts[i] : starts[i + 1]]
        n = len(queries)
        # The query heads of one KV head become rows of one small problem: no copy of k and v per query head.
        rows = queries.transpose(0, 1).reshape(1, a.kv_heads, a.group * n, a.head_dim)
        mask = None
        if n > 1 or (a.window and length > a.window):
            mask = _visible(a, n, length, a.q.device, starts[i]).repeat(a.group, 1)
        result = scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=a.scale)
        out[starts[i] : starts[i + 1]] = result.view(a.heads, n, a.head_dim).transpose(0, 1)
    return out


def _by_loops(a: PagedArguments, k_cache, v_cache, block_tables, context_lens, k_scale=None, v_scale=None) -> Tensor:
    """Each key is read from its page, once for all query heads that share it."""
    kernels = cpu.kernels()
    if kernels is None or a.q.device.type != "cpu":
        raise RuntimeError("backend 'loops' needs tensors on the CPU and a C++ compiler; use 'sdpa'")
    pages = cpu.Pages.of(k_cache, v_cache, k_scale, v_scale)
    sequences = cpu.Sequences.of(a.query_starts, context_lens, block_tables, a.tree_mask)
    out = kernels.attend(
        pages, sequences, cpu.Scoring.of(a.scale, a.softcap, a.window, a.sinks), a.q.float().contiguous()
    )
    return out.to(a.q.dtype)
