"""The memory manager of a paged KV cache: which physical block holds which tokens of which sequence.

A block is `block_size` token slots. A sequence owns a *block table*: the physical block of its tokens 0..15,
of its tokens 16..31, and so on, in any order (PagedAttention, Kwon et al. 2023, section 4). The manager never
sees a key or a value; it hands out block numbers, and `PagedCache` and the engine keep the tensors.

The whole design is four facts about a block:

- its reference count is the number of tables it stands in. At zero it is in the free queue, otherwise not;
- only a block with one owner is ever written. A shared one is copied first (copy-on-write);
- a full block whose tokens are final carries a content hash, chained over all tokens before it. Another
  sequence with the same prefix finds it by that hash, even after its owners are gone, until it is reused;
- the free queue starts with blocks nobody could want (never used, or no hash), then the least recently used
  hashed ones, the tail of a sequence before its head.

Every public method checks everything before it changes anything: a refused call leaves no trace.
"""

import hashlib
import operator
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

from optinfer.kv_cache.events import (
    BlockCached,
    BlockCopied,
    BlockForgotten,
    BlockHit,
    BlockReleased,
    BlockTaken,
    Event,
    SeqId,
    SequenceAllocated,
    SequenceForked,
    SequenceFreed,
    SequenceTruncated,
    State,
    TokensAppended,
    TokensCommitted,
)

TOKEN_LIMIT = 2**31  # token ids are hashed as 32-bit integers


class OutOfBlocks(RuntimeError):
    """The request needs more blocks than may be handed out now. Nothing was changed."""

    def __init__(self, needed: int, available: int):
        super().__init__(f"needs {needed} new blocks, {available} available")
        self.needed, self.available = needed, available


class UnknownSequence(KeyError, ValueError):
    """No live sequence has this id: never allocated, or freed already."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr


class DuplicateSequence(ValueError):
    """A live sequence has this id already."""


class IntegrityError(RuntimeError):
    """The manager's own books do not balance: a bug, never the caller's fault."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """`num_cached_tokens` leading tokens are in the cache already: compute only the rest."""

    block_table: list[int]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The caller must copy keys and values of block `source` to `target` before the next write."""

    source: int
    target: int


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]
    table: list[int]
    chain: list[bytes]  # hashes of the leading blocks that are full and final; chain[i] covers blocks 0..i
    root: bytes  # what the first block chains to; depends on the salt


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """SHA-256 over the parent's hash and the tokens: equal only if this block and all before it are equal."""
    return hashlib.sha256(parent + array("i", token_ids).tobytes()).digest()


class BlockManager:
    """Hands out the blocks of a paged KV cache.

    Args:
        num_blocks: physical blocks in the pool, at least 1.
        block_size: token slots per block (vLLM's default is 16), at least 1.
        prefix_caching: let sequences that start alike share blocks, also one after the other.
        watermark: share of the pool, 0 <= watermark < 1, that `allocate` leaves free so that sequences
            already running can grow for a while before one of them has to be preempted.
        vocab_size: upper bound (exclusive) for token ids; by default any 32-bit id.
        record_events: keep `events`. Turn off in a server that runs for days: the log only grows.

    Cost: each operation is O(tokens and blocks of the sequence it names), whatever the size of the pool.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        prefix_caching: bool = True,
        *,
        watermark: float = 0.0,
        vocab_size: int | None = None,
        record_events: bool = True,
    ):
        self.num_blocks = _positive("num_blocks", num_blocks)
        self.block_size = _positive("block_size", block_size)
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark must be in [0, 1), got {watermark!r}")
        self.prefix_caching = bool(prefix_caching)
        self.watermark_blocks = int(watermark * self.num_blocks)
        self._token_limit = TOKEN_LIMIT if vocab_size is None else _positive("vocab_size", vocab_size)
        self._record = record_events

        self.events: list[Event] = []
        self._sequences: dict[SeqId, _Sequence] = {}
        self._ref_counts = [0] * self.num_blocks
        # A doubly linked list with a dict on top: both ends and any middle element in O(1).
        self._free_queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        self._hashes: list[bytes | None] = [None] * self.num_blocks
        # hash -> blocks with that content. Two sequences that run side by side may compute the same block
        # twice; tables are append-only, so both copies stay and either is a hit.
        self._cached: dict[bytes, OrderedDict[int, None]] = {}

    # ---------------------------------------------------------------- operations

    def allocate(self, seq_id: SeqId, token_ids: Iterable[int], *, salt: str = "", commit: bool = True) -> Allocation:
        """Start a sequence with its prompt, sharing every leading full block that is cached already.

        A hit covers at most all tokens but the last: its logits are needed, so it must be computed.

        Args:
            seq_id: any hashable that no live sequence uses.
            token_ids: the prompt, at least one token.
            salt: sequences share blocks only within the same salt (one per tenant, adapter or image).
            commit: the new tokens are about to be computed and are final, so their full blocks become hits
                at once. Pass False for a prompt computed in chunks, and `commit` each chunk as it is done.

        Raises: OutOfBlocks, DuplicateSequence, ValueError, TypeError.
        """
        self._check_new(seq_id)
        tokens = self._check_tokens(token_ids)
        root = _root_hash(salt)
        hits, chain = self._find_hits(tokens, root)
        num_new = ceil(len(tokens) / self.block_size) - len(hits)
        hits_in_queue = sum(self._ref_counts[block] == 0 for block in hits)
        self._require(num_new, self.num_free_blocks - hits_in_queue - self.watermark_blocks)

        num_cached = len(hits) * self.block_size
        self._log(SequenceAllocated, seq_id, tuple(tokens), num_cached)
        seq = self._sequences[seq_id] = _Sequence(tokens, [], chain, root)
        for block in hits:  # before any new block is taken, so that none of them is evicted
            self._hit(seq_id, seq, block)
        for _ in range(num_new):
            self._grow(seq_id, seq)
        if commit:
            self._extend_chain(seq, len(tokens))
        return Allocation(list(seq.table), num_cached)

    def append(self, seq_id: SeqId, token_ids: Iterable[int], *, commit: bool = True) -> list[BlockCopy]:
        """Make room for more tokens; returns the block copies to do first (copy-on-write, at most one).

        Pass `commit=False` for tokens that may be rejected (speculation): they take blocks but become no
        prefix hits until `commit`. Raises: OutOfBlocks, UnknownSequence, ValueError, TypeError.
        """
        seq = self._get(seq_id)
        tokens = self._check_tokens(token_ids)
        partial = len(seq.tokens) % self.block_size > 0
        shared = partial and self._ref_counts[seq.table[-1]] > 1
        num_new = ceil((len(seq.tokens) + len(tokens)) / self.block_size) - len(seq.table)
        self._require(num_new + shared, self.num_free_blocks)

        self._log(TokensAppended, seq_id, tuple(tokens))
        copies = []
        if shared:
            copies.append(self._copy_on_write(seq_id, seq))
        elif partial:
            self._forget(seq.table[-1])  # a truncated block may still be cached; its end is overwritten now
        for _ in range(num_new):
            self._grow(seq_id, seq)
        seq.tokens.extend(tokens)
        if commit:
            self._extend_chain(seq, len(seq.tokens))
        return copies

    def commit(self, seq_id: SeqId, num_tokens: int | None = None) -> None:
        """Declare the first `num_tokens` (default: all) computed and final: their full blocks become hits."""
        seq = self._get(seq_id)
        num_tokens = len(seq.tokens) if num_tokens is None else self._check_length(seq, num_tokens)
        self._log(TokensCommitted, seq_id, num_tokens)
        self._extend_chain(seq, num_tokens)

    def fork(self, parent_id: SeqId, child_id: SeqId) -> None:
        """Give `child_id` the same tokens. Takes no block: the first to write in a shared one copies it."""
        parent = self._get(parent_id)
        self._check_new(child_id)
        self._log(SequenceForked, parent_id, child_id)
        for block in parent.table:
            self._ref_counts[block] += 1
        self._sequences[child_id] = _Sequence(list(parent.tokens), list(parent.table), list(parent.chain), parent.root)

    def truncate(self, seq_id: SeqId, num_tokens: int) -> None:
        """Keep the first `num_tokens` (1 up to the present length), release the blocks behind them."""
        seq = self._get(seq_id)
        num_tokens = self._check_length(seq, num_tokens)
        self._log(SequenceTruncated, seq_id, num_tokens)
        del seq.tokens[num_tokens:], seq.chain[num_tokens // self.block_size :]
        self._release(seq_id, seq, keep=ceil(num_tokens / self.block_size))

    def free(self, seq_id: SeqId) -> None:
        """End a sequence. Its hashed blocks stay prefix hits until they are reused."""
        self._end(seq_id, preempted=False)

    def preempt(self, seq_id: SeqId) -> list[int]:
        """Take a sequence's memory away and return its tokens, to be allocated and computed again later."""
        tokens = self._get(seq_id).tokens
        self._end(seq_id, preempted=True)
        return tokens

    # ---------------------------------------------------------------- questions

    @property
    def num_free_blocks(self) -> int:
        """Blocks with no owner, prefix hits among them: they are free until someone needs them."""
        return len(self._free_queue)

    @property
    def sequence_ids(self) -> list[SeqId]:
        return list(self._sequences)

    def block_table(self, seq_id: SeqId) -> list[int]:
        return list(self._get(seq_id).table)

    def token_ids(self, seq_id: SeqId) -> list[int]:
        return list(self._get(seq_id).tokens)

    def num_tokens(self, seq_id: SeqId) -> int:
        return len(self._get(seq_id).tokens)

    def slots(self, seq_id: SeqId, start: int = 0, stop: int | None = None) -> list[int]:
        """Physical slot (block * block_size + offset) of tokens start..stop-1: vLLM's slot mapping."""
        seq, size = self._get(seq_id), self.block_size
        stop = len(seq.tokens) if stop is None else stop
        if not 0 <= start <= stop <= len(seq.tokens):
            raise ValueError(f"need 0 <= start <= stop <= {len(seq.tokens)}, got {start} and {stop}")
        return [seq.table[i // size] * size + i % size for i in range(start, stop)]

    def ref_count(self, block: int) -> int:
        """Number of tables that hold `block`."""
        return self._ref_counts[self._check_block(block)]

    def block_hash(self, block: int) -> str | None:
        """Content hash (hex) of a block in the prefix cache, else None."""
        digest = self._hashes[self._check_block(block)]
        return None if digest is None else digest.hex()

    def free_blocks(self) -> list[int]:
        """The free queue, next to be reused first."""
        return list(self._free_queue)

    def num_cached_tokens(self, token_ids: Iterable[int], *, salt: str = "") -> int:
        """How many leading tokens `allocate` would find in the prefix cache now."""
        root = _root_hash(salt)
        return len(self._find_hits(self._check_tokens(token_ids), root)[0]) * self.block_size

    def snapshot(self) -> State:
        """The whole state in plain containers, comparable with what `replay` makes of the log."""
        return State(
            tokens={seq_id: list(seq.tokens) for seq_id, seq in self._sequences.items()},
            tables={seq_id: list(seq.table) for seq_id, seq in self._sequences.items()},
            ref_counts=list(self._ref_counts),
            hashes=[None if digest is None else digest.hex() for digest in self._hashes],
            free_queue=list(self._free_queue),
        )

    def check_integrity(self) -> None:
        """Recount everything from the block tables. O(pool + all tokens). Raises IntegrityError."""

        def check(ok: bool, message: str) -> None:
            if not ok:
                raise IntegrityError(message)

        owners: Counter[int] = Counter()
        for seq_id, seq in self._sequences.items():
            owners.update(seq.table)
            check(len(seq.table) == ceil(len(seq.tokens) / self.block_size), f"{seq_id!r}: wrong table length")
            check(len(set(seq.table)) == len(seq.table), f"{seq_id!r}: a block stands twice in one table")
            parent = seq.root
            for i, digest in enumerate(seq.chain):
                span = seq.tokens[i * self.block_size : (i + 1) * self.block_size]
                check(len(span) == self.block_size, f"{seq_id!r}: block {i} is hashed but not full")
                parent = hash_block(parent, span)
                check(digest == parent, f"{seq_id!r}: hash chain broken at block {i}")
                check(self._hashes[seq.table[i]] == digest, f"{seq_id!r}: block {i} holds other tokens")
        for block, count in enumerate(self._ref_counts):
            check(count == owners[block], f"block {block}: count {count}, but {owners[block]} owners")
            check((count == 0) == (block in self._free_queue), f"block {block}: leaked, or free while in use")
            content = self._hashes[block]
            known = content is not None and block in self._cached.get(content, ())
            check(known == (content is not None), f"block {block}: hash not in the prefix cache")
        num_hashed = sum(digest is not None for digest in self._hashes)
        check(sum(map(len, self._cached.values())) == num_hashed, "the prefix cache lists a stale block")
        hashed = [self._hashes[block] is not None for block in self._free_queue]
        check(hashed == sorted(hashed), "a prefix hit is queued for reuse before a worthless block")

    def __repr__(self) -> str:
        return (
            f"BlockManager({self.num_blocks} blocks of {self.block_size}: {self.num_free_blocks} free, "
            f"{sum(digest is not None for digest in self._hashes)} hashed, {len(self._sequences)} sequences)"
        )

    # ---------------------------------------------------------------- blocks

    def _take(self) -> int:
        """The block at the front of the free queue, its old content forgotten."""
        block = next(iter(self._free_queue))
        self._forget(block, evicted=True)
        del self._free_queue[block]
        self._ref_counts[block] = 1
        return block

    def _grow(self, seq_id: SeqId, seq: _Sequence) -> None:
        seq.table.append(self._take())
        self._log(BlockTaken, seq_id, seq.table[-1])

    def _hit(self, seq_id: SeqId, seq: _Sequence, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._free_queue[block]
        self._ref_counts[block] += 1
        seq.table.append(block)
        self._log(BlockHit, seq_id, block)

    def _copy_on_write(self, seq_id: SeqId, seq: _Sequence) -> BlockCopy:
        copy = BlockCopy(source=seq.table[-1], target=self._take())
        self._ref_counts[copy.source] -= 1  # never to zero: it was shared
        seq.table[-1] = copy.target
        self._log(BlockCopied, seq_id, copy.source, copy.target)
        return copy

    def _release(self, seq_id: SeqId, seq: _Sequence, keep: int) -> None:
        """Drop the table entries from `keep` on, last first. Blocks without a hash are reused soonest."""
        unhashed = []
        while len(seq.table) > keep:
            block = seq.table.pop()
            self._ref_counts[block] -= 1
            self._log(BlockReleased, seq_id, block, self._ref_counts[block])
            if self._ref_counts[block] == 0:
                self._free_queue[block] = None
                if self._hashes[block] is None:
                    unhashed.append(block)
        for block in reversed(unhashed):
            self._free_queue.move_to_end(block, last=False)

    def _end(self, seq_id: SeqId, preempted: bool) -> None:
        seq = self._get(seq_id)
        self._log(SequenceFreed, seq_id, preempted)
        del self._sequences[seq_id]
        self._release(seq_id, seq, keep=0)

    # ---------------------------------------------------------------- prefix cache

    def _find_hits(self, tokens: list[int], root: bytes) -> tuple[list[int], list[bytes]]:
        """The longest run of leading full blocks in the cache, and their hashes."""
        hits: list[int] = []
        chain: list[bytes] = []
        if self.prefix_caching:
            size = self.block_size
            for start in range(0, (len(tokens) - 1) // size * size, size):  # never the last token
                digest = hash_block(chain[-1] if chain else root, tokens[start : start + size])
                if digest not in self._cached:
                    break
                hits.append(next(iter(self._cached[digest])))
                chain.append(digest)
        return hits, chain

    def _extend_chain(self, seq: _Sequence, num_tokens: int) -> None:
        """Hash the full blocks among the first `num_tokens` that have no hash yet."""
        if not self.prefix_caching:
            return
        for i in range(len(seq.chain), num_tokens // self.block_size):
            span = seq.tokens[i * self.block_size : (i + 1) * self.block_size]
            digest = hash_block(seq.chain[-1] if seq.chain else seq.root, span)
            seq.chain.append(digest)
            block = seq.table[i]
            if self._hashes[block] is None:  # a fork may have been here first
                self._hashes[block] = digest
                self._cached.setdefault(digest, OrderedDict())[block] = None
                self._log(BlockCached, block, digest.hex())

    def _forget(self, block: int, evicted: bool = False) -> None:
        """Remove a block from the prefix cache, if it is there."""
        digest = self._hashes[block]
        if digest is None:
            return
        self._hashes[block] = None
        del self._cached[digest][block]
        if not self._cached[digest]:
            del self._cached[digest]
        self._log(BlockForgotten, block, digest.hex(), evicted)

    # ---------------------------------------------------------------- checks

    def _get(self, seq_id: SeqId) -> _Sequence:
        if seq_id not in self._sequences:
            raise UnknownSequence(f"seq_id {seq_id!r} is not allocated (or was freed already)")
        return self._sequences[seq_id]

    def _check_new(self, seq_id: SeqId) -> None:
        if seq_id in self._sequences:
            raise DuplicateSequence(f"seq_id {seq_id!r} is allocated already")

    def _check_tokens(self, token_ids: Iterable[int]) -> list[int]:
        tokens = [_index("token_ids", token) for token in token_ids]
        if not tokens:
            raise ValueError("token_ids is empty; at least one token is needed")
        for extreme in (min(tokens), max(tokens)):
            if not 0 <= extreme < self._token_limit:
                raise ValueError(f"token_ids holds {extreme}; allowed are 0 to {self._token_limit - 1}")
        return tokens

    def _check_length(self, seq: _Sequence, num_tokens: int) -> int:
        num_tokens = _index("num_tokens", num_tokens)
        if not 1 <= num_tokens <= len(seq.tokens):
            raise ValueError(f"num_tokens must be 1 to {len(seq.tokens)}, got {num_tokens}")
        return num_tokens

    def _check_block(self, block: int) -> int:
        if not 0 <= _index("block", block) < self.num_blocks:
            raise ValueError(f"block must be 0 to {self.num_blocks - 1}, got {block}")
        return block

    def _require(self, needed: int, available: int) -> None:
        if needed > available:
            raise OutOfBlocks(needed, max(0, available))

    def _log(self, event: Callable[..., Event], *fields: Any) -> None:
        if self._record:
            self.events.append(event(*fields))


def _index(name: str, value: int) -> int:
    """`value` as a plain int; NumPy and torch integers pass, floats and strings do not."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be integers, got {value!r}") from None


def _positive(name: str, value: int) -> int:
    value = _index(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _root_hash(salt: str) -> bytes:
    if not isinstance(salt, str):
        raise TypeError(f"salt must be a string, got {salt!r}")
    return hashlib.sha256(salt.encode()).digest()
