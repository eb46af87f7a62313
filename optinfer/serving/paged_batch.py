"""One step's batch: tokens of many sequences packed in a row, and where their keys and values live.

transformers models run as they are. A step calls ``model(input_ids=[1, T], position_ids=[1, T])`` with the attention
implementation registered here. Whatever family it is, each layer hands us its fresh queries, keys and values; we write keys
and values to their slots, and attend over the pages where they lie.

Within a layer every write comes before any read. So a block that is scheduled in this step is as good as computed:
another sequence of the same step may share it.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from optinfer import cpu
from optinfer.attention.needs import attention_implementation, read_needs
from optinfer.kv_cache.attention import Backend, choose_backend, paged_attention
from optinfer.kv_cache.pool import KVPool
from optinfer.speculative.draft_tree import DraftTree
from optinfer.upload import upload

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

IMPLEMENTATION = "optinfer_serving"


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `len(token_ids)` tokens of one sequence, the first at position `start`. The last ones may be the nodes of a tree:
    each then has a place of its own in the pages, and stands in the text by its depth."""

    token_ids: list[int]
    start: int
    block_table: list[int]
    tree: DraftTree | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def positions(self) -> np.ndarray:
        """In the text, [tokens]."""
        positions = np.arange(self.start, self.end)
        if self.tree is not None:
            newest = self.end - len(self.tree) - 1
            positions[-len(self.tree) :] = newest + np.array(self.tree.depths)
        return positions


class PagedBatch:
    """The packed tokens of a step, in the chunks' order. All tensors are int64 on the pool's device.

    Args:
        chunks: what to compute; `num_logits[i]` of chunk i's last tokens get logits.
        pool: where keys and values live.
        backend: of `paged_attention`.
        table_width: blocks per sequence in `block_tables`, at least as many as the longest needs.
        windows: of each layer, for models whose layers do not say; None: no window.

    Attributes:
        input_ids, position_ids: [1, T].
        slots: [T], where each token's keys and values go.
        query_starts: [sequences + 1], rows of the first query of each sequence, and their end.
        context_lens: [sequences], tokens of each sequence, this step's included.
        tree_mask: bool [T, max_queries], who sees whom among a chunk's tokens; None where no chunk has a tree.
        block_tables: [sequences, table_width].
        logit_rows: rows whose logits are wanted.
        spans: per chunk its rows as (first, end).
        max_queries: most tokens of one chunk.

    Raises ValueError: a block table names a block that the pool lacks; a tree, and a layer that sees a window.
    """

    def __init__(
        self,
        chunks: list[Chunk],
        num_logits: list[int],
        pool: KVPool,
        backend: Backend = "auto",
        table_width: int | None = None,
        windows: Sequence[int | None] = (),
    ):
        self.pool, self.windows = pool, windows
        self.backend = choose_backend(pool.device) if backend == "auto" else backend
        size = pool.block_size
        lengths = np.array([len(chunk.token_ids) for chunk in chunks])
        ends = np.cumsum(lengths)
        tables = np.zeros((len(chunks), table_width or max(-(-c.end // size) for c in chunks)), dtype=np.int64)
        for row, chunk in zip(tables, chunks):
            used = -(-chunk.end // size)
            row[:used] = chunk.block_table[:used]
        if tables.min() < 0 or tables.max() >= pool.num_blocks:
            raise ValueError(f"a block table names a block outside 0 to {pool.num_blocks - 1}")
        places = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        has_trees = any(chunk.tree is not None for chunk in chunks)
        positions = np.concatenate([chunk.positions for chunk in chunks]) if has_trees else places
        sequence = np.repeat(np.arange(len(chunks)), lengths)
        parts = {
            "input_ids": np.concatenate([chunk.token_ids for chunk in chunks]),
            "position_ids": positions,
            "slots": tables[sequence, places // size] * size + places % size,
            "query_starts": np.concatenate([[0], ends]),
            "context_lens": np.array([chunk.end for chunk in chunks]),
            "block_tables": tables.ravel(),
            "logit_rows": np.concatenate([np.arange(end - n, end) for end, n in zip(ends, num_logits)]),
        }
        self.spans = [(int(end - length), int(end)) for end, length in zip(ends, lengths)]
        self.max_queries = int(lengths.max())
        self.num_tokens = int(ends[-1])
        self.highest_token, self.highest_position = int(parts["input_ids"].max()), int(positions.max())
        self._load(parts, tables.shape)
        self.tree_mask = self._who_sees_whom(chunks) if has_trees else None
        self._sequences: cpu.Sequences | None = None

    def _load(self, parts: dict[str, np.ndarray], table_shape: tuple[int, ...]) -> None:
        """All numbers travel to the device in one copy that nobody waits for."""
        packed = np.concatenate([part.astype(np.int64, copy=False) for part in parts.values()])
        self.packed = upload(packed, self.pool.device)
        views = dict(zip(parts, self.packed.split([len(part) for part in parts.values()])))
        self.input_ids, self.position_ids = views["input_ids"][None], views["position_ids"][None]
        self.slots, self.logit_rows = views["slots"], views["logit_rows"]
        self.query_starts, self.context_lens = views["query_starts"], views["context_lens"]
        self.block_tables = views["block_tables"].view(table_shape)

    def _who_sees_whom(self, chunks: list[Chunk]) -> Tensor:
        if any(self.windows):
            raise ValueError("a draft tree cannot be checked by layers that see a window of the text")
        before = np.tri(self.max_queries, dtype=bool)
        masks = [before[: len(chunk.token_ids)].copy() for chunk in chunks]
        for chunk, mask in zip(chunks, masks):
            if chunk.tree is not None:
                n, nodes = len(mask), len(chunk.tree) + 1
                mask[n - nodes :, n - nodes : n] = chunk.tree.mask().numpy()
        return upload(np.concatenate(masks), self.pool.device)

    def take_over(self, other: "PagedBatch") -> None:
        """Take over another batch's content, of the same shapes, into this one's tensors."""
        self.packed.copy_(other.packed, non_blocking=True)

    # ------------------------------------------------------------ called by every layer of the model

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [T, heads, D], k and v [T, kv_heads, D] of the packed tokens -> [T, heads, D]."""
        pool = self.pool
        expected = (self.num_tokens, pool.kv_heads, pool.head_dim)
        if k.shape != expected or v.shape != expected or q.shape[-1] != pool.head_dim:
            raise ValueError(
                f"layer {layer} has keys {list(k.shape)} and values {list(v.shape)}, the pool takes {list(expected)}"
            )
        kernels = cpu.kernels() if self.backend == "loops" else None
        if kernels is not None:
            pages = pool.cpu_pages(layer)
            kernels.write(pages, k.float().contiguous(), v.float().contiguous(), self.slots)
            scoring = cpu.Scoring.of(scale, softcap or 0.0, window or 0, sinks)
            return kernels.attend(pages, self.sequences, scoring, q.float().contiguous()).to(q.dtype)
        pool.write(layer, self.slots, k, v)
        return paged_attention(
            q, *pool.layer(layer), self.block_tables, self.context_lens, scale, self.backend,
            query_starts=self.query_starts, max_queries=self.max_queries, window=window, softcap=softcap, sinks=sinks,
            tree_mask=self.tree_mask, **pool.scales(layer),
        )  # fmt: skip

    @property
    def sequences(self) -> cpu.Sequences:
        """What the C++ kernels need to know of the batch."""
        if self._sequences is None:
            self._sequences = cpu.Sequences.of(self.query_starts, self.context_lens, self.block_tables, self.tree_mask)
        return self._sequences


_current: contextvars.ContextVar[PagedBatch] = contextvars.ContextVar("optinfer_paged_batch")


@contextlib.contextmanager
def attending(batch: PagedBatch, configs: "list[PreTrainedConfig]") -> Iterator[None]:
    """While this lasts, the layers of the model with these configs attend over the batch's pages."""
    token = _current.set(batch)
    try:
        with attention_implementation(configs, IMPLEMENTATION):
            yield
    finally:
        _current.reset(token)


def _attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    batch = _current.get()
    needs = read_needs(module, kwargs, is_causal)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    windows = (needs["window"], batch.windows[module.layer_idx] if batch.windows else None)
    window = min((w for w in windows if w is not None), default=None)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [1, heads, T, D] -> [T, heads, D]
    return batch.attend(module.layer_idx, q, k, v, scale, window, needs["softcap"], needs["sinks"])[None], None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)  # the batch knows who sees whom
