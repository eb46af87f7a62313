"""One pool of pages for layers that keep different things: a block table for each group of layers.

Layers of one kind (see `layers`) are cut into groups of equally many layers. A page holds `block_size` tokens of one group, so
that all pages have the same size and any group can take any free one (vLLM's hybrid cache manager has the same groups, but
fills the smaller ones up). A full group's table grows for ever. A windowed group's stops growing and goes round, the newest
page over the oldest, as in Mistral's rolling buffer (arXiv:2310.06825, section 2). A group of linear layers takes the pages of
its state once. A layer that reads another layer's keys and values has no pages of its own.

Pages are not shared between sequences here: a page that is written over holds nobody's prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd

from optinfer.kv_cache.block_manager import BlockManager, DuplicateSequence, OutOfBlocks, UnknownSequence, _positive
from optinfer.kv_cache.events import SeqId
from optinfer.kv_cache.layers import LayerCache

__all__ = ["LayerGroup", "LayerGroupManager", "layer_groups"]


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose tokens lie together in pages.

    Attributes:
        cache: what each of its layers keeps.
        layers: their numbers in the model, in the order in which a page holds them.
    """

    cache: LayerCache
    layers: tuple[int, ...]

    @property
    def bytes_per_token(self) -> int:
        return len(self.layers) * self.cache.bytes_per_token()

    @property
    def state_bytes(self) -> int:
        return len(self.layers) * self.cache.nbytes(0)


def layer_groups(cache: Sequence[LayerCache]) -> tuple[LayerGroup, ...]:
    """Groups of as many layers as divide every kind's number of layers.

    Args:
        cache: what each layer keeps, first layer first, as `cache_layers` finds it.

    Raises ValueError: no layer keeps tokens, or layers keep tokens of different sizes: no one page fits both.
    """
    kinds: dict[LayerCache, list[int]] = {}
    for index, layer in enumerate(cache):
        if layer.kind != "shared":
            kinds.setdefault(layer, []).append(index)
    sizes = {layer.numbers_per_token for layer in kinds if layer.numbers_per_token}
    if len(sizes) != 1:
        found = ", ".join(map(str, sorted(sizes))) or "none"
        raise ValueError(f"cache must hold tokens of one size per layer, found {found} (numbers per token and layer)")
    size = gcd(*map(len, kinds.values()))
    return tuple(
        LayerGroup(layer, tuple(indices[start : start + size]))
        for layer, indices in kinds.items()
        for start in range(0, len(indices), size)
    )


class LayerGroupManager:
    """Hands out the pages of one pool to the layer groups of all sequences.

    Args:
        groups: of the model, see `layer_groups`.
        num_blocks, block_size: of the pool, as of a `BlockManager`.
        chunk: most tokens of a sequence that are computed at once. While a chunk is written, its first token still needs the
            window before it, so a windowed group goes round over that many tokens more.

    Raises ValueError, TypeError: a size below 1, or not an integer.
    """

    def __init__(self, groups: Sequence[LayerGroup], num_blocks: int, block_size: int = 16, chunk: int = 1):
        self.groups = tuple(groups)
        self.chunk = _positive("chunk", chunk)
        # A sequence of this manager has no content: what is tracked is whole pages, by (sequence, group).
        self._pages = BlockManager(num_blocks, block_size, prefix_caching=False, record_events=False)
        self._lengths: dict[SeqId, int] = {}
        page_bytes = max(group.bytes_per_token for group in self.groups) * self.block_size
        self._state_pages = [ceil(group.state_bytes / page_bytes) for group in self.groups]

    @property
    def num_blocks(self) -> int:
        return self._pages.num_blocks

    @property
    def block_size(self) -> int:
        return self._pages.block_size

    @property
    def num_free_blocks(self) -> int:
        return self._pages.num_free_blocks

    @property
    def sequence_ids(self) -> list[SeqId]:
        return list(self._lengths)

    def num_tokens(self, seq_id: SeqId) -> int:
        return self._length(seq_id)

    def num_pages(self, group: int, length: int) -> int:
        """Pages that a group has for a sequence of `length` tokens."""
        if not self.groups[group].bytes_per_token:
            return self._state_pages[group]
        pages, window = ceil(length / self.block_size), self.groups[group].cache.window
        if window is None:
            return pages
        # A token may be written over when it lies outside the window of the newest chunk's first token.
        return min(pages, ceil((window + self.chunk - 1) / self.block_size))

    def allocate(self, seq_id: SeqId, num_tokens: int) -> None:
        """Start a sequence with its first tokens, 1 to `chunk` of them.

        Raises: OutOfBlocks, DuplicateSequence, ValueError, TypeError; nothing has changed then.
        """
        if seq_id in self._lengths:
            raise DuplicateSequence(f"seq_id {seq_id!r} is allocated already")
        self._grow(seq_id, 0, self._check_chunk(num_tokens))

    def append(self, seq_id: SeqId, num_tokens: int) -> None:
        """Make room for 1 to `chunk` more tokens.

        Raises: OutOfBlocks, UnknownSequence, ValueError, TypeError; nothing has changed then.
        """
        length = self._length(seq_id)
        self._grow(seq_id, length, length + self._check_chunk(num_tokens))

    def free(self, seq_id: SeqId) -> None:
        """End a sequence. Raises UnknownSequence."""
        self._length(seq_id)
        del self._lengths[seq_id]
        for group in range(len(self.groups)):
            self._pages.free((seq_id, group))

    def pages(self, seq_id: SeqId, group: int) -> list[int]:
        """The pages that a group holds for a sequence, each once."""
        self._length(seq_id)
        return self._pages.block_table((seq_id, group))

    def block_table(self, seq_id: SeqId, group: int) -> list[int]:
        """The page of tokens 0 to block_size - 1, of the next ones, and so on, as `paged_attention` reads it with the window. A
        windowed group names its pages again and again: what was written over lies outside the window.
        """
        pages = self.pages(seq_id, group)
        return [pages[i % len(pages)] for i in range(ceil(self._length(seq_id) / self.block_size))]

    def place(self, layer: int) -> tuple[int, int]:
        """(group, place in the group's pages) of a layer. Raises ValueError: it has no pages of its own."""
        for number, group in enumerate(self.groups):
            if layer in group.layers:
                return number, group.layers.index(layer)
        raise ValueError(f"layer {layer} has no pages of its own")

    def check_integrity(self) -> None:
        """Recount all pages. Raises IntegrityError."""
        self._pages.check_integrity()

    def _grow(self, seq_id: SeqId, length: int, new_length: int) -> None:
        held = [self.num_pages(g, length) if length else 0 for g in range(len(self.groups))]
        wanted = [self.num_pages(g, new_length) for g in range(len(self.groups))]
        if (needed := sum(wanted) - sum(held)) > self.num_free_blocks:
            raise OutOfBlocks(needed, self.num_free_blocks)
        for group, (old, new) in enumerate(zip(held, wanted)):
            if new > old:
                grow = self._pages.append if old else self._pages.allocate
                grow((seq_id, group), [0] * ((new - old) * self.block_size))
        self._lengths[seq_id] = new_length

    def _length(self, seq_id: SeqId) -> int:
        if seq_id not in self._lengths:
            raise UnknownSequence(f"seq_id {seq_id!r} is not allocated (or was freed already)")
        return self._lengths[seq_id]

    def _check_chunk(self, num_tokens: int) -> int:
        if _positive("num_tokens", num_tokens) > self.chunk:
            raise ValueError(f"num_tokens must be 1 to {self.chunk} (chunk), got {num_tokens}")
        return num_tokens
