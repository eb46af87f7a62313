"""What a block manager did, as a list of small facts.

Every operation appends one *operation* event (what was asked) followed by the *block* events it caused, in
order. Together they are enough to rebuild every state the manager was ever in: `replay` does so without
sharing a line with the manager, which is how tests know the log is honest and how the widget can play it.
"""

from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

SeqId = Hashable


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. `to_dict` gives a JSON-ready record with the class name under "type"."""

    def to_dict(self) -> dict[str, Any]:
        return {"type": type(self).__name__, **asdict(self)}


# Operations: what was asked of the manager.


@dataclass(frozen=True, slots=True)
class SequenceAllocated(Event):
    seq_id: SeqId
    token_ids: tuple[int, ...]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokensAppended(Event):
    seq_id: SeqId
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokensCommitted(Event):
    seq_id: SeqId
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SequenceForked(Event):
    parent_id: SeqId
    child_id: SeqId


@dataclass(frozen=True, slots=True)
class SequenceTruncated(Event):
    seq_id: SeqId
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SequenceFreed(Event):
    seq_id: SeqId
    preempted: bool


# Blocks: what happened to physical memory.


@dataclass(frozen=True, slots=True)
class BlockTaken(Event):
    """`block` left the front of the free queue and joined the end of the sequence's table."""

    seq_id: SeqId
    block: int


@dataclass(frozen=True, slots=True)
class BlockHit(Event):
    """`block` already holds the right tokens, free or in use: the table gets one more pointer to it."""

    seq_id: SeqId
    block: int


@dataclass(frozen=True, slots=True)
class BlockCopied(Event):
    """Copy-on-write: the sequence's last table entry moved from the shared `source` to a fresh `target`."""

    seq_id: SeqId
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class BlockReleased(Event):
    """The sequence's last table entry is dropped; at `ref_count` 0 the block returns to the free queue."""

    seq_id: SeqId
    block: int
    ref_count: int


@dataclass(frozen=True, slots=True)
class BlockCached(Event):
    """A full block's content hash (hex) entered the prefix cache."""

    block: int
    hash: str


@dataclass(frozen=True, slots=True)
class BlockForgotten(Event):
    """A block's hash left the prefix cache: evicted for reuse, or its only owner writes over it."""

    block: int
    hash: str
    evicted: bool


@dataclass
class State:
    """A manager's whole observable state, in plain containers that compare with `==`."""

    tokens: dict[SeqId, list[int]] = field(default_factory=dict)
    tables: dict[SeqId, list[int]] = field(default_factory=dict)
    ref_counts: list[int] = field(default_factory=list)
    hashes: list[str | None] = field(default_factory=list)
    free_queue: list[int] = field(default_factory=list)  # next to be reused first


def replay(events: Iterable[Event], num_blocks: int) -> State:
    """Rebuild the state that `events` lead to, starting from `num_blocks` free blocks.

    Raises ValueError if the log contradicts itself.
    """
    s = State(ref_counts=[0] * num_blocks, hashes=[None] * num_blocks, free_queue=list(range(num_blocks)))
    unhashed: list[int] = []  # blocks that the current operation freed and that hold nothing worth keeping

    def settle() -> None:
        # Freed blocks without a hash go to the front as a group, the tail of the sequence first.
        s.free_queue[:0] = unhashed
        unhashed.clear()

    def take(block: int) -> None:
        if not s.free_queue or s.free_queue[0] != block or s.hashes[block] is not None:
            raise ValueError(f"block {block} was taken but is not an empty block at the front of the queue")
        s.free_queue.pop(0)
        s.ref_counts[block] = 1

    for event in events:
        match event:
            case SequenceAllocated(seq_id, token_ids, _):
                settle()
                s.tokens[seq_id], s.tables[seq_id] = list(token_ids), []
            case TokensAppended(seq_id, token_ids):
                settle()
                s.tokens[seq_id].extend(token_ids)
            case TokensCommitted():
                settle()
            case SequenceForked(parent_id, child_id):
                settle()
                s.tokens[child_id] = list(s.tokens[parent_id])
                s.tables[child_id] = list(s.tables[parent_id])
                for block in s.tables[child_id]:
                    s.ref_counts[block] += 1
            case SequenceTruncated(seq_id, num_tokens):
                settle()
                del s.tokens[seq_id][num_tokens:]
            case SequenceFreed(seq_id, _):
                settle()
                del s.tokens[seq_id]
            case BlockTaken(seq_id, block):
                take(block)
                s.tables[seq_id].append(block)
            case BlockHit(seq_id, block):
                if s.ref_counts[block] == 0:
                    s.free_queue.remove(block)
                s.ref_counts[block] += 1
                s.tables[seq_id].append(block)
            case BlockCopied(seq_id, source, target):
                take(target)
                s.ref_counts[source] -= 1
                s.tables[seq_id][-1] = target
            case BlockReleased(seq_id, block, ref_count):
                s.ref_counts[block] -= 1
                if s.ref_counts[block] != ref_count or s.tables[seq_id].pop() != block:
                    raise ValueError(f"{event} does not match the state before it")
                if ref_count == 0:
                    (unhashed if s.hashes[block] is None else s.free_queue).append(block)
                if not s.tables[seq_id] and seq_id not in s.tokens:
                    del s.tables[seq_id]
            case BlockCached(block, hash):
                s.hashes[block] = hash
            case BlockForgotten(block, hash, _):
                if s.hashes[block] != hash:
                    raise ValueError(f"{event} does not match the state before it")
                s.hashes[block] = None
            case _:
                raise ValueError(f"unknown event {event!r}")
    settle()
    return s
