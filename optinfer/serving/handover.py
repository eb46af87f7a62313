"""Blocks that travel: one engine computes prompts, another goes on from its keys and values.

Prompts are bound by arithmetic and single tokens by memory, so serving systems give them to different machines
("disaggregation"). What is handed over is the prompt's full blocks. The receiver puts them where a cached prefix would be: its
next request that begins so finds them, and computes only what is left, at most one block.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optinfer.serving.engine import Engine

_HANDOVER = ("handover", 0)  # the id of the sequence that holds the blocks while they are copied


@dataclass(frozen=True)
class Blocks:
    """The full blocks of a prompt.

    Attributes:
        token_ids: as many as the blocks hold.
        tensors: keys and values, and their scales if the pages are int8: [layers, blocks, block_size, kv_heads(, head_dim)].
        salt: of the request.
    """

    token_ids: list[int]
    tensors: list[Tensor]
    salt: str = ""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def take_blocks(engine: "Engine", token_ids: list[int], salt: str = "") -> Blocks:
    """A copy of the blocks that an engine has of a prompt, from its beginning; none if it has none."""
    manager, pool = engine.manager, engine.runner.pool
    cached = manager.num_cached_tokens([*token_ids, 0], salt=salt)  # one more: a hit never covers the last token
    if not cached:
        return Blocks([], [], salt)
    found = manager.allocate(_HANDOVER, [*token_ids[:cached], 0], salt=salt, commit=False)
    try:
        table = torch.tensor(found.block_table[: cached // manager.block_size], device=pool.device)
        tensors = [pages[:, table].cpu() for pages in _pages(pool)]
    finally:
        manager.free(_HANDOVER)
    return Blocks(list(token_ids[:cached]), tensors, salt)


def give_blocks(engine: "Engine", blocks: Blocks) -> int:
    """Put blocks into an idle engine's pages as a cached prefix; returns how many tokens they hold.

    Raises:
        ValueError: they do not fit this engine's pages (other shape, dtype or block size).
        OutOfBlocks: there is no room for them.
    """
    if not blocks.token_ids:
        return 0
    manager, pool = engine.manager, engine.runner.pool
    pages = _pages(pool)
    theirs = [(t.dtype, t.shape[:1], t.shape[2:]) for t in blocks.tensors]
    ours = [(t.dtype, t.shape[:1], t.shape[2:]) for t in pages]
    if theirs != ours:
        raise ValueError(f"blocks of {theirs[0]} do not fit pages of {ours[0]}")
    # Not committed before they are written: nobody may find a block that is still empty.
    table = manager.allocate(_HANDOVER, blocks.token_ids, salt=blocks.salt, commit=False).block_table
    try:
        target = torch.tensor(table, device=pool.device)
        for own, tensor in zip(pages, blocks.tensors):
            own[:, target] = tensor.to(pool.device)
        manager.commit(_HANDOVER, len(blocks.token_ids))
    finally:
        manager.free(_HANDOVER)
    return len(blocks.token_ids)


def _pages(pool: Any) -> list[Tensor]:
    return [t for t in (pool.keys, pool.values, pool.key_scales, pool.value_scales) if t is not None]
