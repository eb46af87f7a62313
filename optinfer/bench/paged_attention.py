"""Decode attention over pages: what indirection costs, and how close reading the cache comes to copying it."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from optinfer import cpu
from optinfer.bench.rows import PagedAttentionRow
from optinfer.hardware import best_seconds, default_device, default_dtype
from optinfer.kv_cache import paged_attention
from optinfer.kv_cache.attention import gather_pages

KV_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE = 8, 4, 128, 16


def run(quick: bool = False) -> list[PagedAttentionRow]:
    """One row per peer and shape: seconds, bytes of keys and values read, and bytes per second.

    `contiguous` is SDPA on keys that were never paged: the price of paging is the ratio to it.
    """
    device = default_device()
    dtype = default_dtype(device)
    shapes = [(4, 512), (1, 2048)] if quick else [(1, 2048), (16, 1024), (8, 2048)]
    if device.type == "cuda" and not quick:
        shapes += [(64, 4096), (128, 4096), (1, 131_072)]
    rows: list[PagedAttentionRow] = []
    for batch, context in shapes:
        rows += measure(batch, context, dtype, device)
    return rows


def measure(batch: int, context: int, dtype: torch.dtype, device: torch.device) -> list[PagedAttentionRow]:
    """All peers on one shape, checked against each other before any is timed."""
    blocks = -(-context // BLOCK_SIZE)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    k, v = (torch.randn(batch * blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, **options) for _ in range(2))
    tables = torch.randperm(batch * blocks, device=device).view(batch, blocks).int()
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    q = torch.randn(batch, KV_HEADS * GROUP, HEAD_DIM, **options)
    flat_k, flat_v = (torch.cat([gather_pages(cache, row, context) for row in tables]).contiguous() for cache in (k, v))
    rows_of_group = q.view(batch, KV_HEADS, GROUP, HEAD_DIM)  # the query heads of one KV head, as rows

    def contiguous() -> torch.Tensor:
        return scaled_dot_product_attention(rows_of_group, flat_k, flat_v).reshape(q.shape)

    peers = {
        "contiguous": contiguous,
        "paged: gather, then sdpa": lambda: paged_attention(q, k, v, tables, lens, backend="sdpa"),
    }
    if device.type == "cpu" and cpu.kernels() is not None:
        peers["paged: loops"] = lambda: paged_attention(q, k, v, tables, lens, backend="loops")
    if device.type == "cuda":
        peers["paged: triton"] = lambda: paged_attention(q, k, v, tables, lens, backend="triton")
    expected = contiguous().float()
    for name, peer in peers.items():
        error = (peer().float() - expected).abs().max().item()
        if error > 0.02:
            raise AssertionError(f"{name} differs from contiguous attention by {error}")
    seconds = {name: best_seconds(peer, device) for name, peer in (peers | {"copy": flat_k.clone}).items()}
    moved = dict.fromkeys(peers, k.nbytes + v.nbytes) | {"copy": 2 * flat_k.nbytes}
    return [
        PagedAttentionRow(
            peer=name,
            batch=batch,
            context=context,
            dtype=str(dtype),
            seconds=own,
            kv_bytes=moved[name],
            bytes_per_second=moved[name] / own,
            over_contiguous=own / seconds["contiguous"],
        )
        for name, own in seconds.items()
    ]
