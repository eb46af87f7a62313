"""What paged attention accepts, checked in one place. Needs torch only."""

import math
from dataclasses import dataclass

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PagedArguments:
    """Sizes of attention over pages, after checking."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    head_dim: int
    num_blocks: int
    block_size: int
    scale: float
    int8: bool

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


def check_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> PagedArguments:
    """Check the arguments of `paged_attention`.

    Block numbers and lengths are checked where that is free, on a CPU; on a GPU it would stop the stream.
    Raises TypeError for what is not a tensor or has the wrong dtype, ValueError for all else.
    """
    tensors = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_tables": block_tables,
        "context_lens": context_lens,
    }
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
    if q.dim() not in (3, 4):
        raise ValueError(f"q must be [batch, heads, head_dim] or [batch, heads, q_len, head_dim], got {list(q.shape)}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q has dtype {q.dtype}; supported: float16, bfloat16, float32")
    batch, heads, head_dim = q.shape[0], q.shape[1], q.shape[-1]
    q_len = q.shape[2] if q.dim() == 4 else 1
    if min(q.shape) < 1:
        raise ValueError(f"q must not be empty, got shape {list(q.shape)}")
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
    for name, tensor, dim in (("block_tables", block_tables, 2), ("context_lens", context_lens, 1)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.dim() != dim or tensor.shape[0] != batch:
            shape = "[batch, max_blocks]" if dim == 2 else "[batch]"
            raise ValueError(f"{name} must be {shape} with batch {batch}, got {list(tensor.shape)}")
    if q.device.type == "cpu":
        _check_tables(block_tables, context_lens, num_blocks, block_size, q_len)
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale!r}")
    return PagedArguments(batch, heads, kv_heads, q_len, head_dim, num_blocks, block_size, float(scale), int8)


def _check_tables(block_tables, context_lens, num_blocks: int, block_size: int, q_len: int) -> None:
    capacity = block_tables.shape[1] * block_size
    if (context_lens < q_len).any() or (context_lens > capacity).any():
        raise ValueError(
            f"context_lens must be {q_len} (the queries) to {capacity} (the tables), got {context_lens.tolist()}"
        )
    pages = torch.arange(block_tables.shape[1]) * block_size < context_lens[:, None]
    used = block_tables[pages]
    if ((used < 0) | (used >= num_blocks)).any():
        raise ValueError(f"block_tables names a block outside 0 to {num_blocks - 1}")
