"""The tensors behind the pages, as a cache that any transformers model accepts.

    cache = PagedCache.for_model(model, num_blocks=256)
    model.generate(**inputs, past_key_values=cache)

One `BlockManager` decides for all layers of the `KVPool` which block holds what. The model's own attention knows nothing
of pages, so every step gathers the pages of each sequence into one contiguous tensor for it. That copy is what
`paged_attention` and the serving engine avoid; here it buys that any model runs unchanged, token for token.
"""

from collections import Counter
from itertools import count
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from optinfer.kv_cache.block_manager import BlockManager, OutOfBlocks
from optinfer.kv_cache.pool import KVPool

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class PagedLayer(CacheLayerMixin):
    """One layer's view of the pool. `update` writes the new keys and values to their slots and returns all of them."""

    is_croppable = True

    def __init__(self, cache: "PagedCache", index: int):
        super().__init__()
        self.cache, self.index = cache, index
        self.length = 0  # tokens per sequence seen by this layer
        self.keys, self.values = cache.pool.layer(index)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pool is allocated once, at its full size."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """New [batch, kv_heads, new, head_dim] in, all [batch, kv_heads, length, head_dim] out."""
        batch, _, new, _ = key_states.shape
        self.cache._make_room(batch, self.length + new)  # the first layer of a step does the work for all
        self.length += new
        slots, blocks = self.cache._places(self.length - new, self.length)
        k, v = (states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states))
        self.cache.pool.write(self.index, slots, k, v)
        return self.cache.pool.gather(self.index, blocks, self.length, key_states.dtype)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1  # bounded by free blocks, not per sequence


class PagedCache(Cache):
    """A transformers `Cache` in pages: pass it to `generate` or to a model as `past_key_values`.

    Row i of the batch is one sequence of `manager`. Beams, samples and batch selection fork and free sequences,
    so rows share blocks until they differ (copy-on-write). Speculation's `crop` releases whole blocks.

    Args:
        config: a transformers configuration whose layers all use full attention.
        num_blocks: blocks in the pool, for all sequences together; the memory is allocated here, once.
        block_size: token slots per block.
        dtype: of the stored keys and values: float32, float16, bfloat16, or int8 (one scale per token and head).
        device: where the pools live.

    Raises OutOfBlocks (from `update`, before anything is written) when the pool is exhausted.
    """

    def __init__(
        self,
        config: "PreTrainedConfig",
        num_blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        text_config = config.get_text_config()
        kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"config has layers of kind {', '.join(sorted(kinds))}; only full_attention is paged")
        # Tokens never reach a transformers cache, only their keys and values: no prefix caching here.
        self.manager = BlockManager(num_blocks, block_size, prefix_caching=False)
        self.pool = KVPool.for_config(config, num_blocks, block_size, dtype=dtype, device=device)
        self._rows: list[int] = []  # the sequence of each batch row
        self._new_id = count()
        self._known_places: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        super().__init__(layers=[PagedLayer(self, index) for index in range(self.pool.num_layers)])

    @classmethod
    def for_model(
        cls, model: "PreTrainedModel", num_blocks: int, block_size: int = 16, dtype: torch.dtype | None = None
    ) -> "PagedCache":
        """A cache with the model's shape, device and (by default) dtype."""
        return cls(model.config, num_blocks, block_size, dtype or model.dtype, model.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, scales included."""
        return self.pool.nbytes

    @property
    def block_tables(self) -> list[list[int]]:
        """The block table of each batch row."""
        return [self.manager.block_table(row) for row in self._rows]

    # ---- what generate asks for

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every row (transformers counts them negative)."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.15 and 5.17 pass a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must not be positive, got {tokens_to_remove}")
        keep = self.get_seq_length() + tokens_to_remove
        if keep < 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} of {self.get_seq_length()} tokens")
        if keep == 0:
            return self.reset()
        if tokens_to_remove:
            for row in self._rows:
                self.manager.truncate(row, keep)
            self._set_length(keep)

    def reset(self) -> None:
        """Free all blocks; the pool stays allocated."""
        self._replace_rows([])
        self._set_length(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was: beams share all blocks they have in common."""
        self._replace_rows([self._rows[i] for i in beam_idx.tolist()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace_rows([row for row in self._rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace_rows([self._rows[i] for i in torch.arange(len(self._rows))[indices.cpu()].tolist()])

    # ---- pages

    def _make_room(self, batch: int, length: int) -> None:
        """Grow every row to `length` tokens, all or none, and do the copies that this takes."""
        if self._rows and len(self._rows) != batch:
            raise ValueError(f"the cache holds {len(self._rows)} sequences, the batch has {batch}; reset() it first")
        m = self.manager
        old = m.num_tokens(self._rows[0]) if self._rows else 0  # the rows of a batch are equally long
        if length <= old:
            return  # an earlier layer of this step was here
        new_blocks = ceil(length / m.block_size) - ceil(old / m.block_size)
        last = [m.block_table(row)[-1] for row in self._rows] if old % m.block_size else []
        copies = sum(rows - 1 for rows in Counter(last).values())  # all but the last writer of a shared block
        if (needed := batch * new_blocks + copies) > m.num_free_blocks:
            raise OutOfBlocks(needed, m.num_free_blocks)
        tokens = [0] * (length - old)
        if not self._rows:
            self._rows = [next(self._new_id) for _ in range(batch)]
            for row in self._rows:
                m.allocate(row, tokens)
        else:
            for row in self._rows:
                self.pool.copy_blocks([(copy.source, copy.target) for copy in m.append(row, tokens)])
        self._known_places = None

    def _places(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Slots of the tokens from `start` on [batch * new], and all block tables [batch, n]; the same for every layer."""
        if self._known_places is None or self._known_places[0] != (start, length):
            size, device = self.manager.block_size, self.pool.device
            blocks = torch.tensor(self.block_tables, device=device)
            token = torch.arange(start, length, device=device)
            slots = blocks[:, token // size] * size + token % size
            self._known_places = (start, length), (slots.flatten(), blocks)
        return self._known_places[1]

    def _replace_rows(self, parents: list[int]) -> None:
        children = [next(self._new_id) for _ in parents]
        for parent, child in zip(parents, children):
            self.manager.fork(parent, child)
        for row in self._rows:
            self.manager.free(row)
        self._rows, self._known_places = children, None

    def _set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length
        self._known_places = None
