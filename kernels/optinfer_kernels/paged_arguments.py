"""What paged attention accepts, checked in one place. Needs torch only."""

import math
from dataclasses import dataclass

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PagedArguments:
    """Attention over pages, after checking: sizes, and the packed form of what was given.

    Attributes:
        q: [tokens, heads, head_dim], the queries of all sequences in a row.
        query_starts: int [batch + 1]; sequence i has the queries ``query_starts[i] : query_starts[i + 1]``.
        max_queries: most queries of one sequence, or more.
        window: tokens that a query sees, itself included; 0: all before it.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0: as they are.
        sinks: float32 [heads], scores of a key with value zero that every query sees; or None.
        tree_mask: bool [tokens, max_queries], which of its sequence's queries each sees, of those up to itself; None: all.
    """

    q: torch.Tensor
    query_starts: torch.Tensor
    max_queries: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    num_blocks: int
    block_size: int
    scale: float
    int8: bool
    window: int
    softcap: float
    sinks: torch.Tensor | None
    tree_mask: torch.Tensor | None
    _shape: torch.Size

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def unpack(self, out: torch.Tensor) -> torch.Tensor:
        """A result [tokens, heads, head_dim] in the shape in which the queries were given."""
        if len(self._shape) == 3:
            return out
        batch, heads, q_len, head_dim = self._shape
        return out.view(batch, q_len, heads, head_dim).transpose(1, 2)


def check_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float | None = None,
    *,
    query_starts: torch.Tensor | None = None,
    max_queries: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> PagedArguments:
    """Check the arguments of `paged_attention`, and bring the queries into packed form.

    Block numbers and lengths are checked where that is free, on a CPU; on a GPU it would stop the stream.
    Raises TypeError for what is not a tensor or has the wrong dtype, ValueError for all else.
    """
    _check_tensors(q, k_cache, v_cache, block_tables, context_lens, query_starts, sinks, tree_mask)
    _check_queries(q, packed=query_starts is not None)
    heads, head_dim = q.shape[1], q.shape[-1]
    num_blocks, block_size, kv_heads, int8 = _check_caches(q, k_cache, v_cache, k_scale, v_scale)
    batch = q.shape[0] if query_starts is None else query_starts.shape[0] - 1
    _check_numbers(batch, block_tables, context_lens, query_starts)
    packed, starts, max_queries = _packed(q, query_starts, max_queries)
    if q.device.type == "cpu":
        _check_tables(block_tables, context_lens, starts, num_blocks, block_size, packed.shape[0], max_queries)
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    _check_scores(heads, scale, window, softcap, sinks)
    _check_tree_mask(tree_mask, packed.shape[0], max_queries, window)
    return PagedArguments(
        q=packed, query_starts=starts, max_queries=max_queries, batch=batch, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, num_blocks=num_blocks, block_size=block_size, scale=float(scale), int8=int8,
        window=window or 0, softcap=float(softcap or 0), sinks=None if sinks is None else sinks.detach().float(),
        tree_mask=tree_mask, _shape=q.shape,
    )  # fmt: skip


def _check_tensors(q, k_cache, v_cache, block_tables, context_lens, query_starts, sinks, tree_mask) -> None:
    """All of them tensors on one device; the last three may be None."""
    tensors = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_tables": block_tables,
        "context_lens": context_lens,
    }
    optional = {"query_starts": query_starts, "sinks": sinks, "tree_mask": tree_mask}
    for name, tensor in (tensors | {name: one for name, one in optional.items() if one is not None}).items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")


def _check_queries(q: torch.Tensor, packed: bool) -> None:
    if q.dim() not in (3, 4) or (packed and q.dim() != 3):
        shapes = (
            "[batch, heads, head_dim] or [batch, heads, q_len, head_dim]; with query_starts [tokens, heads, head_dim]"
        )
        raise ValueError(f"q must be {shapes}, got {list(q.shape)}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q has dtype {q.dtype}; supported: float16, bfloat16, float32")
    if min(q.shape) < 1:
        raise ValueError(f"q must not be empty, got shape {list(q.shape)}")


def _check_numbers(
    batch: int, block_tables: torch.Tensor, context_lens: torch.Tensor, query_starts: torch.Tensor | None
) -> None:
    """Integers, one row for each sequence."""
    for name, tensor, shape in (
        ("block_tables", block_tables, "[batch, max_blocks]"),
        ("context_lens", context_lens, "[batch]"),
        ("query_starts", query_starts, "[batch + 1]"),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        first = batch + (name == "query_starts")
        if tensor.dim() != shape.count(",") + 1 or tensor.shape[0] != first or batch < 1:
            raise ValueError(f"{name} must be {shape} with batch {batch}, got {list(tensor.shape)}")


def _packed(
    q: torch.Tensor, query_starts: torch.Tensor | None, max_queries: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Queries of all sequences in a row, where each sequence's begin, and how many one has at most."""
    if query_starts is not None:
        return q, query_starts, int(query_starts.diff().max()) if max_queries is None else max_queries
    q_len = q.shape[2] if q.dim() == 4 else 1
    starts = torch.arange(0, (q.shape[0] + 1) * q_len, q_len, device=q.device, dtype=torch.int32)
    return q if q.dim() == 3 else q.transpose(1, 2).flatten(0, 1), starts, q_len


def _check_scores(
    heads: int, scale: float, window: int | None, softcap: float | None, sinks: torch.Tensor | None
) -> None:
    """What is done to the scores before the softmax."""
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None, got {window!r}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a positive number, or None, got {softcap!r}")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must be [{heads}], one per head, got {list(sinks.shape)}")


def _check_caches(q, k_cache, v_cache, k_scale, v_scale) -> tuple[int, int, int, bool]:
    """Blocks, slots in a block, KV heads, and whether the caches hold int8."""
    heads, head_dim = q.shape[1], q.shape[-1]
    if k_cache.dim() != 4 or v_cache.shape != k_cache.shape or k_cache.shape[3] != head_dim:
        raise ValueError(
            f"k_cache and v_cache must both be [num_blocks, block_size, kv_heads, {head_dim}], "
            f"got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    num_blocks, block_size, kv_heads, _ = k_cache.shape
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads: q has {heads}, the cache {kv_heads}")
    int8 = k_cache.dtype == torch.int8
    for name, cache, scales in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        if cache.dtype != (torch.int8 if int8 else q.dtype):
            raise TypeError(f"{name}_cache has dtype {cache.dtype}; need q's {q.dtype}, or int8 for both caches")
        if (scales is not None) != int8:
            raise ValueError(f"{name}_scale is {'required with' if int8 else 'only for'} int8 caches")
        if scales is not None and (scales.shape != cache.shape[:3] or scales.dtype != torch.float32):
            raise ValueError(f"{name}_scale must be float32 {list(cache.shape[:3])}, one per token and head")
    return num_blocks, block_size, kv_heads, int8


def _check_tree_mask(tree_mask, tokens: int, max_queries: int, window: int | None) -> None:
    if tree_mask is None:
        return
    if tree_mask.dtype != torch.bool:
        raise TypeError(f"tree_mask must be bool, got {tree_mask.dtype}")
    if tree_mask.shape != (tokens, max_queries):
        raise ValueError(
            f"tree_mask must be {[tokens, max_queries]}, queries by most of one sequence, got {list(tree_mask.shape)}"
        )
    if window:
        raise ValueError(f"tree_mask and window={window} cannot be combined: a node's place is not its position")


def _check_tables(
    block_tables, context_lens, query_starts, num_blocks: int, block_size: int, tokens: int, max_queries: int
) -> None:
    queries = query_starts.diff()
    if query_starts[0] != 0 or query_starts[-1] != tokens or (queries < 1).any() or (queries > max_queries).any():
        raise ValueError(
            f"query_starts must rise from 0 to {tokens}, the queries, by 1 to {max_queries}, got {query_starts.tolist()}"
        )
    capacity = block_tables.shape[1] * block_size
    if (context_lens < queries).any() or (context_lens > capacity).any():
        raise ValueError(
            f"context_lens must be {int(queries.max())} (the queries) to {capacity} (the tables), got {context_lens.tolist()}"
        )
    pages = torch.arange(block_tables.shape[1]) * block_size < context_lens[:, None]
    used = block_tables[pages]
    if ((used < 0) | (used >= num_blocks)).any():
        raise ValueError(f"block_tables names a block outside 0 to {num_blocks - 1}")
