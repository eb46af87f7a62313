# ruff: noqa: E501 (the hints are prose)
"""Exercises on the KV cache: bytes, blocks, block tables, copy-on-write, prefix hashes, eviction, paged attention."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from optinfer.course.exercise import Case, Draw, Exercise, Wrong, case, slow_case
from optinfer.course.exercises import today


# --------------------------------------------------------------------------------------------------- bytes
def kv_bytes_per_token(layers: int, hidden_size: int, heads: int, kv_heads: int, itemsize: int) -> int:
    """Bytes that one token keeps in the KV cache.

    hidden_size: heads * head dimension; kv_heads: heads that keep keys and values; itemsize: bytes of a number
    """
    return 2 * layers * kv_heads * (hidden_size // heads) * itemsize


def _bytes_cases(draw: Draw) -> Iterator[Case]:
    yield case("Llama-2-7B in FP16", 32, 4096, 32, 32, 2)
    yield case("Llama-3-8B: 8 of 32 heads keep a cache", 32, 4096, 32, 8, 2)
    yield case("SmolLM2-135M in bf16", 30, 576, 9, 3, 2)
    yield case("a 70B model, 8-bit cache", 80, 8192, 64, 8, 1)


BYTES = Exercise(
    id="kv_cache.bytes_per_token",
    title="What a token costs",
    difficulty=1,
    minutes=5,
    spec="""\
For every token, every layer keeps a key and a value for each key/value head, of `hidden_size / heads` numbers each.""",
    answer=kv_bytes_per_token,
    cases=_bytes_cases,
    reference=lambda layers, hidden_size, heads, kv_heads, itemsize: (
        sum(itemsize for _ in range(layers * kv_heads) for _ in ("k", "v")) * (hidden_size // heads)
    ),
    hints=(
        "Keys *and* values; which heads keep them?",
        "2 × layers × kv_heads × head dimension × bytes, with head dimension = hidden_size / heads.",
        "`2 * layers * kv_heads * (hidden_size // heads) * itemsize`",
    ),
    wrong=(
        Wrong("keys without values", "Both are kept: a factor of 2.", ("2 * layers", "layers")),
        Wrong(
            "as if every query head kept a cache",
            "With GQA only kv_heads heads do, and each is hidden_size / heads numbers wide.",
            ("kv_heads * (", "heads * ("),
        ),
        Wrong("one layer only", "Each layer has its own keys and values.", ("2 * layers", "2")),
        Wrong("bits for bytes", "itemsize is in bytes already.", ("* itemsize", "* itemsize * 8")),
    ),
)


def wasted_slots(lengths: list[int], max_length: int, block_size: int) -> tuple[int, int]:
    """Slots (room for one token) that are reserved but hold nothing.

    lengths: tokens that each sequence holds
    returns: (contiguous, paged): when every sequence reserves max_length at once; when it takes blocks as it grows
    """
    contiguous = sum(max_length - n for n in lengths)
    paged = sum(-n % block_size for n in lengths)
    return contiguous, paged


def _waste_reference(lengths: list[int], max_length: int, block_size: int) -> tuple[int, int]:
    held = sum(lengths)
    return len(lengths) * max_length - held, sum(math.ceil(n / block_size) for n in lengths) * block_size - held


def _waste_cases(draw: Draw) -> Iterator[Case]:
    yield case("three sequences", [5, 16, 33], 64, 16)
    yield case("full blocks waste nothing", [32, 16, 48], 128, 16)
    yield case("blocks of one", [3, 7], 10, 1)
    yield case("20 random lengths", [draw.random.randrange(1, 2049) for _ in range(20)], 2048, 16)
    yield case("nobody there", [], 2048, 16)


WASTE = Exercise(
    id="kv_cache.waste",
    title="What paging saves",
    difficulty=1,
    minutes=10,
    spec="""\
Before paging, a server reserved room for the longest possible answer. With pages, a sequence has whole blocks and wastes at
most part of its last one. Count the empty slots of both.""",
    answer=wasted_slots,
    cases=_waste_cases,
    reference=_waste_reference,
    hints=(
        "How many slots are empty in the last block of 33 tokens, with blocks of 16?",
        "Contiguous: max_length minus length. Paged: what is missing to the next multiple of block_size, 0 if there is nothing missing.",
        "`-n % block_size` is what is missing to the next multiple.",
    ),
    wrong=(
        Wrong(
            "an empty block for a full one",
            "A length that fills its blocks exactly wastes nothing: block_size - n % block_size says a whole block.",
            ("-n % block_size", "block_size - n % block_size"),
        ),
        Wrong(
            "filled slots instead of empty ones",
            "n % block_size is how much the last block holds.",
            ("-n % block_size", "n % block_size"),
        ),
        Wrong(
            "waste counted in blocks",
            "Count slots, not blocks.",
            ("sum(-n % block_size for n in lengths)", "sum(n % block_size > 0 for n in lengths)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- tables
def slot_mapping(block_table: list[int], block_size: int, start: int, end: int) -> list[int]:
    """Physical slots of the tokens start … end - 1 of a sequence.

    block_table: physical block of each logical block
    returns: for each token, physical block * block_size + offset in the block
    """
    return [block_table[i // block_size] * block_size + i % block_size for i in range(start, end)]


def _slots_reference(block_table: list[int], block_size: int, start: int, end: int) -> list[int]:
    every = [block * block_size + offset for block in block_table for offset in range(block_size)]
    return every[start:end]


def _slots_cases(draw: Draw) -> Iterator[Case]:
    table = draw.random.sample(range(50), 6)
    yield case("six tokens in blocks of 4", [7, 2], 4, 0, 6)
    yield case("one new token", [3, 9, 5], 16, 40, 41)
    yield case("across a border", [3, 9, 5], 4, 3, 9)
    yield case("random blocks of 5", table, 5, 7, 29)
    yield case("nothing", [1], 16, 4, 4)


SLOTS = Exercise(
    id="kv_cache.slot_mapping",
    title="From position to slot",
    difficulty=1,
    minutes=5,
    spec="""\
The block table is a page table: logical block `i // block_size` of a sequence lies in physical block
`block_table[i // block_size]`. Where do the tokens from `start` up to, not including, `end` lie?""",
    answer=slot_mapping,
    cases=_slots_cases,
    reference=_slots_reference,
    hints=(
        "A position is a logical block and an offset in it.",
        "Physical block times block_size, plus the offset.",
        "`[block_table[i // block_size] * block_size + i % block_size for i in range(start, end)]`",
    ),
    wrong=(
        Wrong(
            "the table was not asked",
            "Logical and physical positions differ: look the block up.",
            ("block_table[i // block_size]", "(i // block_size)"),
        ),
        Wrong("only blocks, no offsets", "Each token has its own slot in the block.", (" + i % block_size", "")),
        Wrong(
            "offset counted from start",
            "The offset is that of the token's position, not of its place among the new ones.",
            ("i % block_size", "(i - start) % block_size"),
        ),
    ),
)


def allocate(free: list[int], num_tokens: int, block_size: int) -> tuple[list[int], list[int]] | None:
    """Blocks for a new sequence: all or nothing.

    free: free blocks; take them from the front
    returns: (its block table, what is still free), or None if there are not enough
    """
    needed = -(-num_tokens // block_size)
    if needed > len(free):
        return None
    return free[:needed], free[needed:]


def _allocate_reference(free: list[int], num_tokens: int, block_size: int) -> tuple[list[int], list[int]] | None:
    left, table = list(free), []
    while len(table) * block_size < num_tokens:
        if not left:
            return None
        table.append(left.pop(0))
    return table, left


def _allocate_cases(draw: Draw) -> Iterator[Case]:
    yield case("20 tokens in blocks of 16", [4, 1, 7], 20, 16)
    yield case("exactly two blocks", [4, 1, 7], 32, 16)
    yield case("one block too few", [4, 1], 33, 16)
    yield case("all that is left", [4, 1], 32, 16)
    yield case("no tokens", [3], 0, 16)
    yield case("random", draw.random.sample(range(99), 20), draw.random.randrange(1, 60), 4)


ALLOCATE = Exercise(
    id="kv_cache.allocate",
    title="All or nothing",
    difficulty=2,
    minutes=10,
    prerequisites=("kv_cache.slot_mapping",),
    spec="""\
A new sequence of `num_tokens` needs enough whole blocks. If there are too few, it gets none (a half-admitted sequence could
never run, and would keep others from running): return None. Leave the list that came in as it was.""",
    answer=allocate,
    cases=_allocate_cases,
    reference=_allocate_reference,
    hints=(
        "How many blocks do 33 tokens need? And 32?",
        "Round up. Compare with what is free before taking anything.",
        "`needed = -(-num_tokens // block_size)`; None if more than len(free); else `free[:needed], free[needed:]`",
    ),
    wrong=(
        Wrong(
            "rounded down",
            "33 tokens need three blocks of 16: round up.",
            ("-(-num_tokens // block_size)", "num_tokens // block_size"),
        ),
        Wrong(
            "always one block more",
            "A length that fills its blocks exactly needs no further one yet.",
            ("-(-num_tokens // block_size)", "num_tokens // block_size + 1"),
        ),
        Wrong(
            "part of what was asked for",
            "All or nothing: too few blocks means None.",
            ("if needed > len(free):\n        return None", ""),
        ),
        Wrong(
            "the last block cannot be taken",
            "Needing as many as there are is fine.",
            ("needed > len(free)", "needed >= len(free)"),
        ),
        Wrong(
            "tokens compared with blocks",
            "One block holds block_size tokens.",
            ("if needed > len(free)", "if num_tokens > len(free)"),
        ),
    ),
)


def make_writable(
    tables: dict[str, list[int]], ref_count: dict[int, int], free: list[int], seq: str, position: int, block_size: int
) -> tuple[int, int] | None:
    """Prepare a write to one position of a sequence; copy its block first if others use it (copy-on-write).

    tables: block table of each sequence; free: free blocks, take from the front
    ref_count: how many sequences use a block; free blocks are not in it
    returns: (source, target) if the caller must copy a block, else None; tables, ref_count and free are changed in place
    """
    index = position // block_size
    block = tables[seq][index]
    if ref_count[block] == 1:
        return None
    target = free.pop(0)
    ref_count[block] -= 1
    ref_count[target] = 1
    tables[seq][index] = target
    return block, target


def _write_script(
    answer: Callable[..., Any], sharing: dict[str, list[int]], writes: list[tuple[str, int]], block_size: int
) -> dict[str, Any]:
    """What came back from each write, and the state afterwards."""
    tables = {seq: list(table) for seq, table in sharing.items()}
    ref_count: dict[int, int] = {}
    for table in tables.values():
        for block in table:
            ref_count[block] = ref_count.get(block, 0) + 1
    free = list(range(100, 110))
    copies = [answer(tables, ref_count, free, seq, position, block_size) for seq, position in writes]
    return {"returned": copies, "tables": tables, "ref_count": ref_count, "free": free}


def _write_reference(sharing: dict[str, list[int]], writes: list[tuple[str, int]], block_size: int) -> dict[str, Any]:
    tables, copies, new = {seq: list(table) for seq, table in sharing.items()}, [], 100
    for seq, position in writes:
        i = position // block_size
        block = tables[seq][i]
        if sum(block in table for table in tables.values()) > 1:
            tables[seq][i] = new
            copies.append((block, new))
            new += 1
        else:
            copies.append(None)
    blocks = {b for table in sharing.values() for b in table} | set(range(100, new))
    counts = {b: sum(b in table for table in tables.values()) for b in blocks}
    return {"returned": copies, "tables": tables, "ref_count": counts, "free": list(range(new, 110))}


def _write_cases(draw: Draw) -> Iterator[Case]:
    yield case("a block of one's own", {"a": [3, 5]}, [("a", 5)], 4)
    yield case("two share their last block, one writes", {"a": [3, 5], "b": [3, 5]}, [("b", 6)], 4)
    yield case("both write: the second in place", {"a": [3, 5], "b": [3, 5]}, [("a", 6), ("b", 6)], 4)
    yield case("three share, all write", {"a": [1], "b": [1], "c": [1]}, [("c", 2), ("a", 2), ("b", 2)], 16)
    yield case("twice to the same", {"a": [8, 2], "b": [8]}, [("b", 0), ("b", 1), ("a", 1)], 16)
    yield case(
        "an earlier block is written, the last one is its own", {"a": [8, 2], "b": [8, 4]}, [("a", 3), ("b", 9)], 8
    )
    yield case("a middle block is written", {"a": [1, 2, 3], "b": [1, 2, 3]}, [("b", 5), ("b", 0), ("a", 11)], 4)
    yield case("an earlier block is shared, not the one written", {"a": [8, 2], "b": [8, 4]}, [("a", 9), ("b", 9)], 8)


COPY_ON_WRITE = Exercise(
    id="kv_cache.copy_on_write",
    title="Copy only when somebody writes",
    difficulty=3,
    minutes=20,
    prerequisites=("kv_cache.allocate",),
    spec="""\
Sampling three answers to one prompt needs the prompt's blocks only once: a fork copies the block table, not the blocks.
Before somebody writes into a block that others use too, it gets a copy of its own:

- one user: write in place, return None;
- more: take a free block, put it into this sequence's table, correct both reference counts, return (source, target).

The last one to write owns the original and needs no copy. The check makes a few writes one after the other (each a
sequence and a position in it), then looks at what came back and at all three containers.""",
    answer=make_writable,
    cases=_write_cases,
    reference=_write_reference,
    run=_write_script,
    changes_input=True,
    hints=(
        "Which block is written, and how many use it?",
        "If ref_count is above 1: new block from free, count of the old one down by one, of the new one 1, table entry replaced.",
        "`block = tables[seq][position // block_size]`; return None if `ref_count[block] == 1`; else pop a target and correct counts and table.",
    ),
    wrong=(
        Wrong(
            "always a copy",
            "With one user there is nobody to protect: write in place.",
            ("if ref_count[block] == 1:", "if False:"),
        ),
        Wrong(
            "never a copy",
            "The other sequences would see this one's tokens.",
            ("if ref_count[block] == 1:", "if True:"),
        ),
        Wrong(
            "the old block's count stays",
            "This sequence no longer uses it: count down, or it is never freed and always copied.",
            ("    ref_count[block] -= 1\n", ""),
        ),
        Wrong(
            "everybody moves to the copy",
            "Only the writer gets the new block; the others keep the old one.",
            (
                "tables[seq][index] = target",
                "[t.__setitem__(t.index(block), target) for t in tables.values() if block in t]",
            ),
        ),
        Wrong(
            "a new list for the free blocks",
            "`free = free[1:]` gives your function a list of its own; the caller's still holds the block, and the next one takes it again. Use `free.pop(0)`.",
            ("target = free.pop(0)", "target, free = free[0], free[1:]"),
        ),
        Wrong(
            "a position taken for a block's place in the table",
            "The table has one entry for block_size positions: divide.",
            ("index = position // block_size", "index = position"),
        ),
        Wrong(
            "counting up a block that has no count yet",
            "A free block is not in ref_count: its first user sets it to 1.",
            ("ref_count[target] = 1", "ref_count[target] += 1"),
        ),
        Wrong(
            "the first block instead of the written one",
            "The position says which block of the table is meant.",
            ("index = position // block_size", "index = 0"),
        ),
        Wrong(
            "the last block instead of the written one",
            "A write may go to any block: the position says which one.",
            ("index = position // block_size", "index = len(tables[seq]) - 1"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- prefixes
def combine(parent: int, tokens: tuple[int, ...]) -> int:
    """A hash of a block: of its tokens and of everything before it."""
    return hash((parent, tokens)) % (1 << 61)


def block_hashes(tokens: list[int], block_size: int) -> list[int]:
    """Hash of every full block of a sequence, each chained to the one before.

    returns: one hash for each full block; the first has parent 0
    """
    hashes, parent = [], 0
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = combine(parent, tuple(tokens[start : start + block_size]))
        hashes.append(parent)
    return hashes


def _hashes_reference(tokens: list[int], block_size: int) -> list[int]:
    def up_to(count: int) -> int:
        if count == 0:
            return 0
        return hash((up_to(count - 1), tuple(tokens[(count - 1) * block_size : count * block_size]))) % (1 << 61)

    return [up_to(i + 1) for i in range(len(tokens) // block_size)]


def _hashes_cases(draw: Draw) -> Iterator[Case]:
    yield case("two full blocks and a rest", [1, 2, 3, 4, 5, 6, 7, 8, 9], 4)
    yield case("the same block twice", [1, 2, 1, 2, 1, 2], 2)
    yield case("shorter than a block", [1, 2, 3], 4)
    yield case("exactly one block", [4, 4, 4, 4], 4)
    yield case("random", [draw.random.randrange(1000) for _ in range(70)], 16)


BLOCK_HASHES = Exercise(
    id="kv_cache.block_hashes",
    title="A name for every prefix",
    difficulty=2,
    minutes=10,
    spec="""\
Keys and values depend on all tokens before them, so a block may be reused only by a sequence with the same *prefix*. Hash
each block together with the hash of the one before: `combine(parent, tuple(tokens of the block))`, with parent 0 for the
first.
Only full blocks get a hash; the last, growing one has none yet.""",
    answer=block_hashes,
    cases=_hashes_cases,
    reference=_hashes_reference,
    given=(combine,),
    hints=(
        "The same four tokens at two places: same cache content, or not?",
        "Walk over the full blocks; each hash becomes the parent of the next.",
        "`parent = combine(parent, tuple(tokens[start : start + block_size]))`, append, for starts of full blocks only.",
    ),
    wrong=(
        Wrong(
            "hashes that know nothing of the prefix",
            "The same tokens after another beginning have other keys and values: chain the hashes.",
            ("combine(parent, tuple", "combine(0, tuple"),
        ),
        Wrong(
            "the partial block hashed too",
            "A block that still grows has no final content.",
            ("len(tokens) - block_size + 1", "len(tokens)"),
        ),
        Wrong(
            "the last full block forgotten",
            "A length that is a multiple of the block size has no partial block.",
            ("len(tokens) - block_size + 1", "len(tokens) - block_size"),
        ),
    ),
)


def cached_tokens(hashes: list[int], known: set[int], num_tokens: int, block_size: int) -> int:
    """How many leading tokens of a prompt need not be computed.

    hashes: of the prompt's full blocks; known: hashes in the cache; num_tokens: the prompt's length
    returns: tokens in cached blocks; at least the last token must be computed, in whole blocks
    """
    usable = (num_tokens - 1) // block_size
    hits = 0
    for value in hashes[: max(usable, 0)]:
        if value not in known:
            break
        hits += 1
    return hits * block_size


def _cached_reference(hashes: list[int], known: set[int], num_tokens: int, block_size: int) -> int:
    best = 0
    for n in range(1, len(hashes) + 1):
        if all(h in known for h in hashes[:n]) and n * block_size < num_tokens:
            best = n * block_size
    return best


def _cached_cases(draw: Draw) -> Iterator[Case]:
    yield case("two of three blocks known", [11, 12, 13], {11, 12, 99}, 50, 16)
    yield case("a hole in the middle", [11, 12, 13], {11, 13}, 50, 16)
    yield case("everything known, the prompt ends with a block", [11, 12], {11, 12}, 32, 16)
    yield case("everything known, one token more", [11, 12], {11, 12}, 33, 16)
    yield case("nothing known", [11, 12], set(), 40, 16)
    yield case("only a later block", [11, 12], {12}, 40, 16)
    yield case("no full block", [], {1}, 3, 16)


CACHED_TOKENS = Exercise(
    id="kv_cache.prefix_hit",
    title="Don't compute it twice",
    difficulty=3,
    minutes=15,
    prerequisites=("kv_cache.block_hashes",),
    spec="""\
A prompt comes in. Its leading blocks whose hashes are known are already in memory. How many tokens can be skipped? A hit
ends at the first unknown block. And the last token must be computed in any case: without it there are no logits, and
nothing to sample from. So a prompt that is known completely gives back its last block.""",
    answer=cached_tokens,
    cases=_cached_cases,
    reference=_cached_reference,
    hints=(
        "What would the model compute if all tokens were cached?",
        "At most (num_tokens - 1) // block_size blocks may be used; count known ones from the front until the first miss.",
        "`for value in hashes[: (num_tokens - 1) // block_size]: if value not in known: break; hits += 1`",
    ),
    wrong=(
        Wrong(
            "the whole prompt taken from the cache",
            "Zero tokens to compute means no logits: engines have crashed on this. Keep at least the last token.",
            ("(num_tokens - 1) // block_size", "num_tokens // block_size"),
        ),
        Wrong(
            "going on after a miss",
            "A later block's keys depend on the missing one; its hash would not even match. Stop at the first miss.",
            ("break", "continue"),
        ),
        Wrong("blocks instead of tokens", "Each hit saves block_size tokens.", ("hits * block_size", "hits")),
        Wrong(
            "only the last token given back",
            "Reuse goes by whole blocks: a prompt of 32 that is known completely computes its last block of 16 again, not one token.",
            ("hashes[: max(usable, 0)]", "hashes"),
            ("return hits * block_size", "return min(hits * block_size, max(num_tokens - 1, 0))"),
        ),
        Wrong(
            "always one block fewer",
            "Only a prompt that ends exactly with a block must give one back.",
            ("(num_tokens - 1) // block_size", "len(hashes) - 1"),
        ),
    ),
)


class FreeQueue:
    """Free blocks in the order in which they will be reused; freed blocks keep their content until then."""

    def __init__(self, blocks: list[int]) -> None:
        """All of these blocks are free, the first will be taken first."""
        # given
        self.queue = list(blocks)

    def release(self, block_table: list[int]) -> None:
        """A sequence is over. Its blocks come last in the queue, its tail before its head: a prompt's head is shared most."""
        self.queue += reversed(block_table)

    def take(self) -> int:
        """The block to be overwritten next: that which has been free longest."""
        return self.queue.pop(0)

    def hit(self, block: int) -> None:
        """A prefix hit: somebody uses this free block again, as it is."""
        self.queue.remove(block)


def _queue_script(answer: type, blocks: list[int], script: list[tuple[str, Any]]) -> dict[str, Any]:
    """What `take` returned, and what is left in the order of taking."""
    queue, taken = answer(list(blocks)), []
    for verb, value in script:
        if verb == "take":
            taken.append(queue.take())
        elif verb == "release":
            queue.release(list(value))
        else:
            queue.hit(value)
    return {"taken": taken, "queue": list(queue.queue)}


def _queue_reference(blocks: list[int], script: list[tuple[str, Any]]) -> dict[str, Any]:
    order, clock, taken = {block: i for i, block in enumerate(blocks)}, len(blocks), []
    for verb, value in script:
        if verb == "take":
            block = min(order, key=order.__getitem__)
            del order[block]
            taken.append(block)
        elif verb == "release":
            for block in value[::-1]:
                order[block] = clock = clock + 1
        else:
            del order[value]
    return {"taken": taken, "queue": sorted(order, key=order.__getitem__)}


def _queue_cases(draw: Draw) -> Iterator[Case]:
    yield case("take three", [0, 1, 2, 3], [("take", 0)] * 3)
    yield case(
        "release and take again", [0, 1, 2], [("take", 0), ("take", 0), ("release", [0, 1]), ("take", 0), ("take", 0)]
    )
    yield case("a hit in the middle", [4, 5, 6, 7], [("hit", 6), ("take", 0), ("take", 0), ("take", 0)])
    yield case(
        "two sequences end",
        [9],
        [("release", [1, 2, 3]), ("release", [4, 5]), ("take", 0), ("take", 0), ("hit", 4), ("take", 0)],
    )
    blocks = draw.random.sample(range(40), 12)
    yield case(
        "random",
        blocks[:4],
        [("take", 0), ("release", blocks[4:9]), ("hit", blocks[6]), ("take", 0), ("release", blocks[9:]), ("take", 0)],
    )


EVICTION = Exercise(
    id="kv_cache.eviction",
    title="Which block goes first?",
    difficulty=3,
    minutes=15,
    prerequisites=("kv_cache.prefix_hit",),
    spec="""\
A freed block may be hit again as long as nobody overwrote it. So overwrite the one that has been free longest (LRU). And
when a sequence ends, its *tail* should go before its *head*: others may share the beginning of the prompt, hardly its end.

The check calls your methods in some order, then compares what `take` returned and what `queue` holds.""",
    answer=FreeQueue,
    cases=_queue_cases,
    reference=_queue_reference,
    run=_queue_script,
    hints=(
        "Take from one end, add at the other. In which order does a table's tail come before its head?",
        "release: append the reversed block table. take: pop from the front. hit: remove from wherever it is.",
        "`self.queue += reversed(block_table)`, `return self.queue.pop(0)`, `self.queue.remove(block)`",
    ),
    wrong=(
        Wrong(
            "the head goes before the tail",
            "The beginning of a prompt is shared by many, its end by nobody: reverse the table.",
            ("reversed(block_table)", "block_table"),
        ),
        Wrong(
            "the latest freed is taken first",
            "A stack overwrites what was just freed and is likeliest to be hit; take the oldest.",
            ("self.queue.pop(0)", "self.queue.pop()"),
        ),
        Wrong(
            "freed blocks jump the queue",
            "They were used last, so they are overwritten last: append.",
            ("self.queue += reversed(block_table)", "self.queue[:0] = reversed(block_table)"),
        ),
        Wrong(
            "a block that was hit stays free",
            "Somebody uses it now: it must not be handed out again.",
            ("self.queue.remove(block)", "pass"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- attention
def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: list[int], length: int) -> Tensor:
    """Attention of one new token over a sequence that lies in scattered blocks.

    q: float32 [heads, dim]
    k_cache, v_cache: float32 [blocks, block_size, kv_heads, dim]; query heads h // (heads // kv_heads) share a head
    block_table: blocks of the sequence; length: its tokens (the rest of the last block is garbage)
    returns: float32 [heads, dim]
    """
    k, v = (cache[block_table].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
    group = q.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,lhd->hl", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), v)


def _paged_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: list[int], length: int) -> Tensor:
    size, group = k_cache.shape[1], len(q) // k_cache.shape[2]
    out = torch.zeros_like(q, dtype=torch.float64)
    for h in range(len(q)):
        k = torch.stack([k_cache[block_table[i // size], i % size, h // group] for i in range(length)]).double()
        v = torch.stack([v_cache[block_table[i // size], i % size, h // group] for i in range(length)]).double()
        out[h] = (k @ q[h].double() / q.shape[1] ** 0.5).softmax(0) @ v
    return out.float()


def _paged_cases(draw: Draw) -> Iterator[Case]:
    for label, heads, kv_heads, dim, size, blocks, length in (
        ("full blocks in order", 2, 2, 4, 4, [0, 1], 8),
        ("scattered blocks, a partial last one", 4, 2, 8, 4, [5, 0, 3], 10),
        ("9 query heads, 3 key heads", 9, 3, 4, 16, [7, 2], 20),
        ("one token", 3, 1, 4, 16, [4], 1),
        ("more blocks in the table than needed", 2, 1, 8, 4, [6, 1, 2], 5),
    ):
        shape = (8, size, kv_heads, dim)
        yield case(label, draw.normal(heads, dim), draw.normal(*shape), draw.normal(*shape), blocks, length)


PAGED = Exercise(
    id="kv_cache.paged_attention",
    title="Attention over scattered pages",
    difficulty=3,
    minutes=20,
    prerequisites=("kv_cache.slot_mapping", "attention.grouped_heads"),
    spec="""\
Gather the sequence's keys and values through its block table, in order, cut off what lies beyond `length`, and attend as
usual (scale 1/sqrt(dim), grouped heads). One new token sees everything, so there is no mask. A kernel does the same without
ever making the gathered copy.""",
    answer=paged_attention,
    cases=_paged_cases,
    reference=_paged_reference,
    hints=(
        "What is the shape of `k_cache[block_table]`?",
        "[blocks of the sequence, block_size, kv_heads, dim]: flatten the first two dimensions, keep `length` tokens.",
        "`k = k_cache[block_table].flatten(0, 1)[:length]`, v likewise; repeat_interleave the heads; two einsums with a softmax between.",
    ),
    wrong=(
        Wrong(
            "the rest of the last block attended to",
            "Its slots hold garbage of whoever was there before: cut at length.",
            ("[:length]", ""),
        ),
        Wrong(
            "the table was not asked",
            "The sequence's blocks are anywhere in the cache.",
            ("cache[block_table]", "cache[: len(block_table)]"),
        ),
        Wrong(
            "0 1 0 1 instead of 0 0 1 1",
            "Neighboring query heads share a head: repeat_interleave.",
            (
                "k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)",
                "k.repeat(1, group, 1), v.repeat(1, group, 1)",
            ),
        ),
        Wrong("no scale", "Divide the scores by sqrt(dim).", (" / math.sqrt(q.shape[-1])", "")),
    ),
)


class PagedStore:
    """Keys and values of one sequence in one layer, in blocks taken from a pool as it grows."""

    def __init__(self, free: list[int], block_size: int, kv_heads: int, dim: int) -> None:
        """free: blocks that may be taken, from the front."""
        # given
        self.free, self.block_size = free, block_size
        self.k = torch.zeros(max(free) + 1, block_size, kv_heads, dim)
        self.v = torch.zeros_like(self.k)
        self.block_table: list[int] = []
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Keep new keys and values, [kv_heads, new tokens, dim]; take blocks when they are needed, no earlier."""
        for i in range(k.shape[1]):
            if self.length % self.block_size == 0:
                self.block_table.append(self.free.pop(0))
            block, offset = self.block_table[-1], self.length % self.block_size
            self.k[block, offset], self.v[block, offset] = k[:, i], v[:, i]
            self.length += 1

    def gather(self) -> tuple[Tensor, Tensor]:
        """All keys and values so far, [kv_heads, length, dim]."""
        k, v = (pool[self.block_table].flatten(0, 1)[: self.length] for pool in (self.k, self.v))
        return k.transpose(0, 1), v.transpose(0, 1)


def _shuffled_blocks() -> list[int]:
    return [(37 * i + 11) % 64 for i in range(64)]


def _run_store(answer: type, pieces: Any, block_size: int, *more: int) -> dict[str, Any]:
    """Pieces [2, kv_heads, tokens, dim] (keys, values) through a store; or a prompt, and the store as the model's cache."""
    if isinstance(pieces, str):
        return _store_in_model(answer, pieces, block_size, *more)
    kv_heads, dim = pieces[0].shape[1], pieces[0].shape[3]
    store = answer(_shuffled_blocks(), block_size, kv_heads, dim)
    for k, v in pieces:
        store.append(k, v)
    k, v = store.gather()
    return {"keys": k, "values": v, "block_table": list(store.block_table), "free blocks": len(store.free)}


def _run_store_reference(*args: Any) -> dict[str, Any]:
    if isinstance(args[0], str):
        return _store_reference(*args)
    pieces, block_size = args
    k, v = torch.cat(pieces, dim=2)
    blocks = -(-k.shape[1] // block_size)
    return {"keys": k, "values": v, "block_table": _shuffled_blocks()[:blocks], "free blocks": 64 - blocks}


def _store_in_model(answer: type, prompt: str, new_tokens: int, block_size: int) -> dict[str, Any]:
    """The model's text with the answer as its KV cache, the first layer's table and what it left free."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    from optinfer.course.exercises.real_model import default_model, greedy

    class Layer(CacheLayerMixin):
        is_sliding = False

        def __init__(self) -> None:
            super().__init__()
            self.store = answer(_shuffled_blocks(), block_size, 3, 64)
            self.seen = 0

        def lazy_initialization(self, *_: Any) -> None:
            self.is_initialized = True

        def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.store.append(k[0], v[0])
            self.seen += k.shape[2]
            keys, values = self.store.gather()
            return keys[None], values[None]

        def get_mask_sizes(self, query: Any) -> tuple[int, int]:
            return self.seen + (query if isinstance(query, int) else len(query)), 0

        def get_seq_length(self) -> int:
            return self.seen

        def get_max_cache_shape(self) -> int:
            return -1

        get_max_length = get_max_cache_shape

    model, tokenizer = default_model()
    cache = Cache(layers=[Layer() for _ in range(model.config.num_hidden_layers)])
    text = greedy(model, tokenizer, prompt, new_tokens, past_key_values=cache)
    first = cache.layers[0].store
    return {"text": text, "block_table": list(first.block_table), "free blocks": len(first.free)}


def _store_reference(prompt: str, new_tokens: int, block_size: int) -> dict[str, Any]:
    from optinfer.course.exercises.real_model import chat, default_model, plain_text

    _, tokenizer = default_model()
    text = plain_text(prompt, new_tokens)
    made = len(tokenizer(text, add_special_tokens=False).input_ids)
    blocks = -(-(chat(tokenizer, prompt).shape[1] + made - 1) // block_size)
    return {"text": text, "block_table": _shuffled_blocks()[:blocks], "free blocks": 64 - blocks}


def _store_cases(draw: Draw) -> Iterator[Case]:
    def pieces(kv_heads: int, dim: int, *lengths: int) -> list[Tensor]:
        return [draw.normal(2, kv_heads, n, dim) for n in lengths]

    yield case("a prompt of 6 in blocks of 4", pieces(2, 3, 6), 4)
    yield case("a prompt of 5, then four single tokens, blocks of 4", pieces(3, 2, 5, 1, 1, 1, 1), 4)
    yield case("a prompt that fills its blocks", pieces(1, 4, 8), 4)
    yield case("a prompt in three chunks of 7, 16 and 2, blocks of 5", pieces(2, 4, 7, 16, 2), 5)
    yield slow_case("the real model, blocks of 16", "What is a GPU?", 10, 16)
    yield slow_case("the real model, blocks of 7", "Name three colors of the rainbow.", 8, 7)


STORE = Exercise(
    id="kv_cache.in_the_model",
    title="Your pages, the model's memory",
    difficulty=4,
    minutes=30,
    prerequisites=("kv_cache.paged_attention", "kv_cache.allocate"),
    spec="""\
Write the cache of one layer: `append` puts new keys and values into blocks, `gather` brings them back in order. A block is
taken only when a token needs it. The check appends small tensors in pieces; then it plugs one store into each of the 30
layers of the real model, with the free blocks shuffled, lets it talk, and compares the text with what it says with its own
cache.""",
    answer=PagedStore,
    cases=_store_cases,
    reference=_run_store_reference,
    run=_run_store,
    model=True,
    limit=60,
    hints=(
        "When does a token need a new block?",
        "When the length so far is a multiple of block_size. The token goes to offset length % block_size of the last block.",
        "append: loop over the tokens; gather: `self.k[self.block_table].flatten(0, 1)[: self.length].transpose(0, 1)`.",
    ),
    wrong=(
        Wrong(
            "a block for every call",
            "A decoding step brings one token: it belongs into the last block while that has room.",
            ("if self.length % self.block_size == 0:", "if i == 0 or self.length % self.block_size == 0:"),
        ),
        Wrong(
            "empty slots returned too",
            "What lies behind the last token are zeros, and the model attends to them: cut at length.",
            ("[: self.length]", ""),
        ),
        Wrong(
            "tokens and heads in the wrong order",
            "The blocks hold [token, head, dim]; the model wants [head, token, dim]: transpose what comes out.",
            ("return k.transpose(0, 1), v.transpose(0, 1)", "return k, v"),
        ),
        Wrong(
            "blocks in the order of their numbers",
            "The table says which block comes first, not the number.",
            ("pool[self.block_table]", "pool[sorted(self.block_table)]"),
        ),
    ),
)

EXERCISES = (
    BYTES,
    WASTE,
    SLOTS,
    ALLOCATE,
    COPY_ON_WRITE,
    BLOCK_HASHES,
    CACHED_TOKENS,
    EVICTION,
    PAGED,
    STORE,
    *today.KV_CACHE,
)
