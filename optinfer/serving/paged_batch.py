"""One step's batch: tokens of many sequences packed in a row, and attention that finds their keys and values in pages.

transformers models run as they are. A step calls ``model(input_ids=[1, T], position_ids=[1, T], paged=batch)`` with the
attention implementation registered here. Whatever family it is, each layer hands us its fresh queries, keys and values;
we write keys and values to their slots, and attend. On a CPU chunks of few tokens are attended page by page where they
lie (`cpu_kernels`); for others each sequence's pages are gathered first.

Within a layer every write comes before any read. So a block that is scheduled in this step is as good as computed:
another sequence of the same step may share it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from optinfer.serving import cpu_kernels

IMPLEMENTATION = "optinfer_serving"
_FEW_QUERIES = 16  # up to here two plain matrix products, or one pass over the pages, beat SDPA on a CPU


class KVPool:
    """Keys and values of all layers: one tensor [num_blocks, kv_heads, block_size, head_dim] per layer for each.

    With the head before the slot, a gathered sequence is contiguous per head, as matrix products want it.

    `kernels`: what computes on these tensors on a CPU besides torch; None: torch alone.
    """

    def __init__(self, config: Any, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        self.kv_heads, self.head_dim = _kv_shape(config)
        self.num_layers, self.num_blocks, self.block_size = config.num_hidden_layers, num_blocks, block_size
        shape = (self.num_layers, num_blocks, self.kv_heads, block_size, self.head_dim)
        self._gathered = {name: torch.empty(0, dtype=dtype, device=device) for name in ("keys", "values")}
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.kernels = cpu_kernels.of(self.keys)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @staticmethod
    def bytes_per_token(config: Any, itemsize: int) -> int:
        kv_heads, head_dim = _kv_shape(config)
        return 2 * config.num_hidden_layers * kv_heads * head_dim * itemsize

    def gather(self, name: str, layer: int, rows: Tensor) -> Tensor:
        """Rows [n] of a layer's (block, head) pairs -> [n, block_size, head_dim], until the next call.

        The result's memory is kept: fresh megabytes for every layer would cost more in page faults than the copy.
        """
        pool = getattr(self, name)[layer].view(self.num_blocks * self.kv_heads, -1)
        if pool.device.type != "cpu":  # other devices have an allocator that keeps memory
            return torch.index_select(pool, 0, rows)
        if self._gathered[name].numel() < rows.numel() * pool.shape[1]:
            self._gathered[name] = pool.new_empty(2 * rows.numel() * pool.shape[1])
        out = self._gathered[name][: rows.numel() * pool.shape[1]].view(-1, pool.shape[1])
        return torch.index_select(pool, 0, rows, out=out)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, all layers at once: `(source, target)` pairs (copy-on-write)."""
        if copies:
            sources, targets = (torch.tensor(side, device=self.keys.device) for side in zip(*copies))
            for pool in (self.keys, self.values):
                pool[:, targets] = pool[:, sources]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `len(token_ids)` tokens of one sequence, the first at position `start`."""

    token_ids: list[int]
    start: int
    block_table: list[int]


@dataclass
class _Group:
    """Chunks with equally many queries, attended together: rows `first` to `last` of the packed batch."""

    first: int
    last: int
    num_queries: int
    starts: Tensor  # [chunks]: position of each chunk's first query
    kv_len: int  # keys per chunk after padding to whole blocks of the longest
    gather_rows: Tensor | None  # [chunks * kv_heads * blocks] rows of the pool; None: nothing but fresh keys
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by sliding window

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [chunks, 1, 1, queries, keys]: each query sees itself and what came before it."""
        if window not in self.masks:
            device = self.starts.device
            query = self.starts[:, None, None] + torch.arange(self.num_queries, device=device)[:, None]
            key = torch.arange(self.kv_len, device=device)
            hidden = key > query
            if window is not None:
                hidden |= key <= query - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self.masks[window] = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]
        return self.masks[window]


@dataclass
class _Walk:
    """The first `len(position)` rows of the packed batch, chunks of few queries, attended without a copy of pages."""

    tables: Tensor  # [chunks, blocks]
    sequence: Tensor  # [rows]: line of `tables`
    position: Tensor  # [rows]


class PagedBatch:
    """The packed tokens of a step and where their keys and values live.

    `logit_rows` are the packed rows of each chunk's last `num_logits[i]` tokens, and `spans[i]` all rows of chunk i as
    (first, end), both in the caller's order.

    Args:
        pad_blocks: attend all chunks, which have equally many tokens, as one group over this many blocks each.
    """

    def __init__(self, chunks: list[Chunk], num_logits: list[int], pool: KVPool, pad_blocks: int | None = None):
        self.pool = pool
        device = pool.keys.device
        order = sorted(range(len(chunks)), key=lambda i: (len(chunks[i].token_ids), _num_blocks(chunks[i], pool)))
        packed = [chunks[i] for i in order]

        tokens = [token for chunk in packed for token in chunk.token_ids]
        lengths = np.array([len(chunk.token_ids) for chunk in packed])
        starts = np.array([chunk.start for chunk in packed])
        ends = np.cumsum(lengths)
        offsets = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        positions = offsets + np.repeat(starts, lengths)
        blocks = np.concatenate(
            [
                np.asarray(c.block_table)[np.arange(c.start, c.start + len(c.token_ids)) // pool.block_size]
                for c in packed
            ]
        )
        heads = np.arange(pool.kv_heads)
        rows = (blocks[:, None] * pool.kv_heads + heads) * pool.block_size + (positions % pool.block_size)[:, None]

        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = torch.from_numpy(positions).to(device)[None]
        self.write_rows = torch.from_numpy(rows.ravel()).to(device)  # [T * kv_heads] rows of the pool [..., head_dim]
        num_short = 0
        if pool.kernels is not None and pad_blocks is None:
            num_short = int((lengths <= _FEW_QUERIES).sum())  # the order puts them first
        self.walk = self._walk(packed[:num_short]) if num_short else None
        cuts = _split(packed, num_short, pool) if pad_blocks is None else [(0, len(packed))]
        self.groups = [self._group(packed[a:b], int(ends[a] - lengths[a]), pad_blocks) for a, b in cuts]
        self.spans = [(0, 0)] * len(chunks)
        for i, length, end in zip(order, lengths.tolist(), ends.tolist()):
            self.spans[i] = end - length, end
        logit_rows = [row for (_, end), n in zip(self.spans, num_logits) for row in range(end - n, end)]
        self.logit_rows = torch.tensor(logit_rows, device=device, dtype=torch.long)

    def load(self, other: "PagedBatch") -> None:
        """Take over another batch's content into this one's tensors; both were padded to the same shapes."""
        if other is self:
            return
        for name in ("input_ids", "position_ids", "write_rows", "logit_rows"):
            getattr(self, name).copy_(getattr(other, name))
        for mine, theirs in zip(self.groups, other.groups):
            mine.starts.copy_(theirs.starts)
            if mine.gather_rows is not None and theirs.gather_rows is not None:
                mine.gather_rows.copy_(theirs.gather_rows)
        self.forget_masks()

    def forget_masks(self) -> None:
        for group in self.groups:
            group.masks.clear()

    def _walk(self, chunks: list[Chunk]) -> _Walk:
        lengths = [len(chunk.token_ids) for chunk in chunks]
        tables = _tables(chunks, max(_num_blocks(chunk, self.pool) for chunk in chunks), self.pool)
        sequence = np.repeat(np.arange(len(chunks)), lengths)
        position = self.position_ids[0, : len(sequence)]
        return _Walk(torch.from_numpy(tables), torch.from_numpy(sequence), position)

    def _group(self, chunks: list[Chunk], first: int, pad_blocks: int | None) -> _Group:
        pool, device = self.pool, self.pool.keys.device
        num_queries = len(chunks[0].token_ids)
        starts = torch.tensor([chunk.start for chunk in chunks], device=device)
        last = first + num_queries * len(chunks)
        if num_queries > 1 and all(chunk.start == 0 for chunk in chunks):
            return _Group(first, last, num_queries, starts, num_queries, None)
        num_blocks = pad_blocks or max(_num_blocks(chunk, pool) for chunk in chunks)
        tables = _tables(chunks, num_blocks, pool)  # padding reads block 0, masked out
        rows = tables[:, None] * pool.kv_heads + np.arange(pool.kv_heads)[:, None]
        gather = torch.from_numpy(rows.ravel()).to(device)
        return _Group(first, last, num_queries, starts, num_blocks * pool.block_size, gather)

    # ------------------------------------------------------------ called by every layer of the model

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q [T, heads, D], k and v [T, kv_heads, D] of the packed tokens -> [T, heads, D]."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        head_dim = k.shape[-1]
        kernels, walk = self.pool.kernels, self.walk
        for pages, x in ((keys, k), (values, v)):
            if kernels is not None:
                kernels.write(pages, x, self.write_rows)
            else:
                pages.view(-1, head_dim).index_copy_(0, self.write_rows, x.reshape(-1, head_dim))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if kernels is not None and walk is not None:
            short = slice(0, len(walk.position))
            where = (walk.tables, walk.sequence, walk.position)
            kernels.attend(out[short], q[short], keys, values, *where, scale, window, softcap)
        for group in self.groups:
            span = slice(group.first, group.last)
            n = len(group.starts)
            q_group = q[span].unflatten(0, (n, -1)).transpose(1, 2)  # [n, heads, queries, D]
            if group.gather_rows is None:
                k_group = k[span].unflatten(0, (n, -1)).transpose(1, 2)
                v_group = v[span].unflatten(0, (n, -1)).transpose(1, 2)
            else:
                k_group = self._gather("keys", layer, group, n)
                v_group = self._gather("values", layer, group, n)
            result = _attention(group, q_group, k_group, v_group, scale, window, softcap)
            out[span].unflatten(0, (n, -1)).copy_(result.transpose(1, 2))
        return out

    def _gather(self, name: str, layer: int, group: _Group, n: int) -> Tensor:
        """The pages of `n` sequences as [n, kv_heads, kv_len, D]."""
        assert group.gather_rows is not None
        pages = self.pool.gather(name, layer, group.gather_rows)
        return pages.view(n, self.pool.kv_heads, group.kv_len, self.pool.head_dim)


def _attention(
    group: _Group, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """q [n, heads, queries, D], k and v [n, kv_heads, keys, D] -> [n, heads, queries, D]."""
    fits = window is None or group.kv_len <= window
    if softcap is None and group.num_queries > _FEW_QUERIES:
        if group.gather_rows is None and fits:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        mask = group.mask(None if fits else window, q.dtype)[:, 0]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    # The query heads that share a KV head become rows of one small product: K and V are read once per group.
    n, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    rows = (q * scale).reshape(n, kv_heads, -1, head_dim)
    scores = torch.matmul(rows, k.transpose(2, 3)).view(n, kv_heads, -1, queries, group.kv_len)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + group.mask(None if fits else window, q.dtype)
    weights = torch.softmax(scores, dim=-1).view(n, kv_heads, -1, group.kv_len)
    return torch.matmul(weights, v).view(n, heads, queries, head_dim)


def _kv_shape(config: Any) -> tuple[int, int]:
    """(KV heads, head dimension) of a decoder."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _num_blocks(chunk: Chunk, pool: KVPool) -> int:
    """Blocks that hold the keys this chunk attends to."""
    return -(-(chunk.start + len(chunk.token_ids)) // pool.block_size)


def _tables(chunks: list[Chunk], num_blocks: int, pool: KVPool) -> np.ndarray:
    """[chunks, num_blocks]: the blocks that each chunk attends to, then zeros."""
    tables = np.zeros((len(chunks), num_blocks), dtype=np.int64)
    for row, chunk in zip(tables, chunks):
        used = _num_blocks(chunk, pool)
        row[:used] = chunk.block_table[:used]
    return tables


def _split(chunks: list[Chunk], begin: int, pool: KVPool) -> list[tuple[int, int]]:
    """Cut the sorted chunks from `begin` on into groups: equally many queries, and less than half of the keys padding."""
    if begin == len(chunks):
        return []
    cuts = [begin]
    for i in range(begin + 1, len(chunks)):
        first, here = chunks[cuts[-1]], chunks[i]
        same_queries = len(first.token_ids) == len(here.token_ids)
        both_fresh = (first.start == 0) == (here.start == 0) or len(here.token_ids) == 1
        if not same_queries or not both_fresh or _num_blocks(here, pool) > 2 * _num_blocks(first, pool):
            cuts.append(i)
    return list(zip(cuts, [*cuts[1:], len(chunks)]))


def _attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: PagedBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if paged is None:
        raise ValueError(f"attention {IMPLEMENTATION!r} works only inside an engine's step")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [1, heads, T, D] -> [T, heads, D]
    return paged.attend(module.layer_idx, q, k, v, scale, sliding_window, softcap)[None], None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)  # the batch knows who sees whom
