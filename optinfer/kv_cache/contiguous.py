"""What paging replaced: one contiguous piece of memory per request, reserved when the request arrives.

The piece must be long enough for the whole answer, whose length nobody knows yet. Three guesses, as in the
PagedAttention paper (section 6.1): the longest the model can do, the next power of two, and an oracle that
knows. `simulate` runs one trace through any of them, or through pages, and counts every slot as in the
paper's Figure 2.
"""

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import erf, exp, log, sqrt
from typing import Literal, Protocol, get_args

from optinfer.kv_cache.block_manager import BlockManager, OutOfBlocks, _positive

# ShareGPT's mean lengths in tokens, as the paper's Figure 11 is quoted; we could not check them against its text.
# The spread is ours: log-normal, clipped.
SHAREGPT_PROMPT_MEAN, SHAREGPT_OUTPUT_MEAN = 161.31, 337.99
MAX_MODEL_LEN = 2048  # OPT's context, the model of the paper's experiments


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of `prompt_len` tokens that will be answered with `output_len` tokens (known only afterwards)."""

    prompt_len: int
    output_len: int

    @property
    def length(self) -> int:
        return self.prompt_len + self.output_len


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the slots of the pool are, at one moment. The four kinds and `total` are counts of token slots.

    used: hold a token's keys and values.
    reserved: kept for tokens of a running request that will come later.
    internal: belong to a running request and will never be used.
    external: free, yet too few or too scattered for the request that waits. Zero if nobody waits.
    """

    used: float
    reserved: float
    internal: float
    external: float
    total: int

    @property
    def effective(self) -> float:
        """Share of the pool that holds tokens."""
        return self.used / self.total

    @property
    def wasted(self) -> float:
        """Share of the pool that is not free for use and holds no token."""
        return (self.reserved + self.internal + self.external) / self.total


def sharegpt_like(num_requests: int, seed: int = 0) -> list[Request]:
    """Requests with the mean lengths of ShareGPT conversations; the same list for the same seed."""
    _positive("num_requests", num_requests)
    rng = random.Random(seed)

    def length(mean: float, sigma: float) -> int:
        mu = _clipped_lognormal_mu(mean, sigma)
        return min(MAX_MODEL_LEN // 2, max(4, round(rng.lognormvariate(mu, sigma))))

    return [Request(length(SHAREGPT_PROMPT_MEAN, 1.2), length(SHAREGPT_OUTPUT_MEAN, 0.9)) for _ in range(num_requests)]


class Allocator(Protocol):
    """What `simulate` needs to know of a memory manager."""

    total: int

    def admit(self, seq_id: int, request: Request) -> bool:
        """Make room for the prompt (and whatever else the policy wants); False if it does not fit now."""
        ...

    def grow(self, seq_id: int) -> bool:
        """Make room for one more token; False if there is none."""
        ...

    def free(self, seq_id: int) -> None: ...

    def usage(self, waiting: bool) -> Usage: ...


Policy = Literal["max", "pow2", "oracle"]


class ContiguousAllocator:
    """First fit: a request gets the first hole that is long enough for what the policy reserves.

    Args:
        total: token slots in the pool.
        policy: "max" reserves `max_model_len`, "pow2" the prompt and the output's next power of two,
            "oracle" the exact length.
    """

    POLICIES = get_args(Policy)

    def __init__(self, total: int, policy: Policy = "max", max_model_len: int = MAX_MODEL_LEN):
        if policy not in self.POLICIES:
            raise ValueError(f"policy must be one of {', '.join(self.POLICIES)}, got {policy!r}")
        self.total, self.policy = _positive("total", total), policy
        self.max_model_len = _positive("max_model_len", max_model_len)
        self._pieces: dict[int, tuple[int, int]] = {}  # seq_id -> (start, length), ordered by start
        self._requests: dict[int, Request] = {}
        self._lengths: dict[int, int] = {}

    def reservation(self, request: Request) -> int:
        """Slots reserved for a request when it arrives."""
        if request.length > self.max_model_len:
            raise ValueError(f"request of {request.length} tokens exceeds max_model_len {self.max_model_len}")
        if self.policy == "max":
            return self.max_model_len
        if self.policy == "pow2":
            return min(self.max_model_len, request.prompt_len + (1 << (request.output_len - 1).bit_length()))
        return request.length

    def admit(self, seq_id: int, request: Request) -> bool:
        if seq_id in self._pieces:
            raise ValueError(f"seq_id {seq_id!r} is allocated already")
        need, start = self.reservation(request), 0
        for piece_start, length in [*self._pieces.values(), (self.total, 0)]:
            if piece_start - start >= need:
                pieces = {**self._pieces, seq_id: (start, need)}
                self._pieces = dict(sorted(pieces.items(), key=lambda item: item[1]))
                self._requests[seq_id], self._lengths[seq_id] = request, request.prompt_len
                return True
            start = piece_start + length
        return False

    def grow(self, seq_id: int) -> bool:
        self._lengths[seq_id] += 1
        return True

    def free(self, seq_id: int) -> None:
        del self._pieces[seq_id], self._requests[seq_id], self._lengths[seq_id]

    def pieces(self) -> dict[int, tuple[int, int]]:
        """seq_id -> (first slot, number of slots)."""
        return dict(self._pieces)

    def usage(self, waiting: bool) -> Usage:
        used = sum(self._lengths.values())
        final = sum(request.length for request in self._requests.values())
        taken = sum(length for _, length in self._pieces.values())
        return Usage(used, final - used, taken - final, (self.total - taken) * waiting, self.total)


class PagedAllocator:
    """The same questions, answered by a `BlockManager`."""

    def __init__(self, total: int, block_size: int = 16):
        self.manager = BlockManager(total // block_size, block_size, prefix_caching=False, record_events=False)
        self.total = self.manager.num_blocks * block_size

    def admit(self, seq_id: int, request: Request) -> bool:
        try:
            self.manager.allocate(seq_id, [0] * request.prompt_len)
        except OutOfBlocks:
            return False
        return True

    def grow(self, seq_id: int) -> bool:
        try:
            self.manager.append(seq_id, [0])
        except OutOfBlocks:
            return False
        return True

    def free(self, seq_id: int) -> None:
        self.manager.free(seq_id)

    def usage(self, waiting: bool) -> Usage:
        m = self.manager
        used = sum(m.num_tokens(seq_id) for seq_id in m.sequence_ids)
        free = m.num_free_blocks * m.block_size
        return Usage(used, 0, self.total - free - used, free * waiting, self.total)


@dataclass(frozen=True, slots=True)
class Simulation:
    """Averages over the steps in which somebody waited: the pool is under pressure, waste costs throughput."""

    usage: Usage
    batch: float  # requests running at once
    preemptions: int
    steps: int


def simulate(requests: Iterable[Request], allocator: Allocator) -> Simulation:
    """Serve a queue: admit in order while memory lasts, then one token for everybody, until all are done.

    Out of memory preempts the request that came last; it starts over at the head of the queue with its tokens
    so far as prompt.
    """
    waiting = deque(enumerate(requests))
    running: dict[int, tuple[Request, int]] = {}  # seq_id -> (request as admitted, tokens generated since)
    sums, batch, preemptions, pressed = [0.0] * 4, 0, 0, 0
    while waiting or running:
        while waiting and allocator.admit(*waiting[0]):
            seq_id, request = waiting.popleft()
            running[seq_id] = (request, 0)
        if not running:
            raise ValueError(f"{waiting[0][1]} does not fit in an empty pool of {allocator.total} slots")
        if waiting:
            usage = allocator.usage(waiting=True)
            kinds = usage.used, usage.reserved, usage.internal, usage.external
            sums = [a + b for a, b in zip(sums, kinds)]
            batch, pressed = batch + len(running), pressed + 1
        for seq_id in list(running):
            while seq_id in running and not allocator.grow(seq_id):
                victim = next(reversed(running))
                request, done = running.pop(victim)
                allocator.free(victim)
                waiting.appendleft((victim, Request(request.prompt_len + done, request.output_len - done)))
                preemptions += 1
            if seq_id in running:
                request, done = running[seq_id]
                running[seq_id] = (request, done + 1)
                if done + 1 == request.output_len:
                    allocator.free(seq_id)
                    del running[seq_id]
    steps = max(1, pressed)
    used, reserved, internal, external = (value / steps for value in sums)
    average = Usage(used, reserved, internal, external, allocator.total)
    return Simulation(average, batch / steps, preemptions, pressed)


def parallel_sampling_saving(requests: Iterable[Request], num_samples: int, block_size: int = 16) -> float:
    """Share of blocks saved when `num_samples` answers share their prompt's blocks.

    (blocks without sharing - blocks with) / blocks without, over all decoding steps; paper, section 6.3.
    """
    needed = taken = 0
    for request in requests:
        pages = -(-request.length // block_size) * num_samples
        m = BlockManager(pages, block_size, prefix_caching=False, record_events=False)
        m.allocate(0, [0] * request.prompt_len)
        for sample in range(1, num_samples):
            m.fork(0, sample)
        for step in range(request.output_len):
            for sample in range(num_samples):
                m.append(sample, [sample])
            needed += num_samples * -(-(request.prompt_len + step + 1) // block_size)
            taken += m.num_blocks - m.num_free_blocks
    return 1 - taken / needed


def shared_prefix_saving(requests: Iterable[Request], prefix_len: int, block_size: int = 16) -> float:
    """Share of blocks saved when all requests begin with one system prompt and run at once; paper, section 6.4.

    (blocks without sharing - blocks with) / blocks without, when every answer has been written.
    """
    _positive("prefix_len", prefix_len)
    taken = {}
    requests = list(requests)
    pages = sum(-(-(prefix_len + r.length) // block_size) for r in requests)
    for prefix_caching in (False, True):
        m = BlockManager(pages, block_size, prefix_caching, record_events=False)
        for i, request in enumerate(requests):
            own = i + 1  # a token id that no other request uses: nothing but the prefix can be shared
            m.allocate(i, [0] * prefix_len + [own] * request.prompt_len)
            m.append(i, [own] * request.output_len)
        taken[prefix_caching] = m.num_blocks - m.num_free_blocks
    return 1 - taken[True] / taken[False]


@cache
def _clipped_lognormal_mu(mean: float, sigma: float) -> float:
    """mu for which a log-normal, clipped to half the context, has this mean."""

    def clipped_mean(mu: float) -> float:
        top = log(MAX_MODEL_LEN // 2)
        below = 0.5 * (1 + erf((top - mu) / sigma / sqrt(2)))
        part = exp(mu + sigma**2 / 2) * 0.5 * (1 + erf((top - mu - sigma**2) / sigma / sqrt(2)))
        return part + (1 - below) * (MAX_MODEL_LEN // 2)

    low, high = 0.0, log(MAX_MODEL_LEN)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if clipped_mean(middle) < mean else (low, middle)
    return low
