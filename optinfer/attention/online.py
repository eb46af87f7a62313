"""Flash attention in plain torch: tile by tile, counting every byte it would move to and from a GPU's memory.

The same algorithm as the Triton kernel, one line per step, for reading, tracing and counting. Not fast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from optinfer.attention.traffic import HbmCounter
from optinfer_kernels.attention_arguments import DTYPES, AttentionArguments, check_attention


@dataclass(frozen=True)
class TileStep:
    """One tile of the walk, as `on_step` sees it; tensors are [batch, heads, rows, ...]."""

    rows: range
    cols: range
    logits: torch.Tensor
    weights: torch.Tensor  # exp(logits - running_max)
    running_max: torch.Tensor
    running_sum: torch.Tensor
    accumulator: torch.Tensor
    rescale: torch.Tensor  # what the earlier sums were multiplied by


def online_softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
    counter: HbmCounter | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    on_step: Callable[[TileStep], None] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · scale) v, never holding more than block_m x block_n scores per head.

    Shapes and options as in `attention_reference`. `counter` counts what a GPU would load and store, taking on-chip
    memory for free and caches for nothing: q once, a K and a V tile per step, the output once. `on_step` is called
    after each tile. Sums are kept in fp32 (fp64 for fp64 inputs).
    """
    a = check_attention(q, k, v, causal, scale, window, softcap, dtypes=(*DTYPES, torch.float64))
    for name, value in (("block_m", block_m), ("block_n", block_n)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    counter = counter or HbmCounter()
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=sums, device=q.device)

    for rows in tiles(a.q_len, block_m):
        q_tile = counter.load(q[:, :, rows.start : rows.stop]).to(sums)
        m = torch.full((*q_tile.shape[:3], 1), -torch.inf, dtype=sums, device=q.device)
        l = torch.zeros_like(m)
        acc = torch.zeros_like(q_tile)
        for cols in visible_tiles(rows, a, block_n):
            k_tile = counter.load(k[:, :, cols.start : cols.stop].repeat_interleave(a.group, 1)).to(sums)
            v_tile = counter.load(v[:, :, cols.start : cols.stop].repeat_interleave(a.group, 1)).to(sums)
            logits = q_tile @ k_tile.mT * a.scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~visible(rows, cols, a, q.device), -torch.inf)

            m_new = torch.maximum(m, logits.amax(-1, keepdim=True))
            origin = m_new.masked_fill(m_new == -torch.inf, 0.0)  # a row that saw nothing yet: no inf - inf
            weights = torch.exp(logits - origin)
            rescale = torch.exp(m - origin)
            l = l * rescale + weights.sum(-1, keepdim=True)
            acc = acc * rescale + weights @ v_tile
            m = m_new
            if on_step:
                on_step(TileStep(rows, cols, logits, weights, m, l, acc, rescale))

        out[:, :, rows.start : rows.stop] = counter.store((acc / l.masked_fill(l == 0, 1.0)).to(q.dtype))
        lse[:, :, rows.start : rows.stop] = (m + l.log()).squeeze(-1)
    return (out, lse) if return_lse else out


def tiles(length: int, block: int) -> list[range]:
    """0..length cut into runs of `block`; the last may be shorter."""
    return [range(start, min(start + block, length)) for start in range(0, length, block)]


def visible_tiles(rows: range, a: AttentionArguments, block_n: int) -> list[range]:
    """The key tiles that at least one of these rows may see. Skipping the rest halves causal attention."""
    first, last = 0, a.kv_len
    if a.causal:
        last = min(a.kv_len, max(rows.stop + a.shift, 0))
    if a.window is not None:
        first = max(rows.start + a.shift - a.window + 1, 0) // block_n * block_n
    return [range(start, min(start + block_n, last)) for start in range(first, last, block_n)]


def visible(rows: range, cols: range, a: AttentionArguments, device=None) -> torch.Tensor:
    """[rows, cols] bool: which keys of this tile each query may see."""
    position = torch.tensor(rows, device=device)[:, None] + a.shift
    key = torch.tensor(cols, device=device)
    mask = torch.ones(len(rows), len(cols), dtype=torch.bool, device=device)
    if a.causal:
        mask &= key <= position
    if a.window is not None:
        mask &= key > position - a.window
    return mask
