"""Which tokens to compute next. Pure Python: it knows requests and blocks, but no tensors.

Every step has a budget of tokens. Running sequences come first, the oldest first; then waiting ones are admitted, first
come first served. A sequence gets as many of its missing tokens as the budget allows, so prompts are computed in chunks
beside other sequences' single tokens. When blocks run out, the youngest running sequence is preempted: its blocks are
freed and its tokens computed again later, mostly from the prefix cache.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from optinfer.kv_cache import Allocation, BlockManager, OutOfBlocks
from optinfer.serving.request import Sequence
from optinfer.speculative.draft_tree import DraftTree

Policy = Literal["continuous", "prefill_first", "static"]
POLICIES = get_args(Policy)


@dataclass(slots=True)
class ScheduledChunk:
    """Compute `num_tokens` tokens of `sequence`, starting at `start`, then a tree of `drafts` that may be rejected."""

    sequence: Sequence
    start: int
    num_tokens: int
    drafts: DraftTree = field(default_factory=DraftTree)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """The chunk reaches the sequence's newest token, so its logits choose the next one."""
        return self.end == len(self.sequence.token_ids)

    @property
    def num_logits(self) -> int:
        return 1 + len(self.drafts)


@dataclass
class Schedule:
    """One step's work."""

    chunks: list[ScheduledChunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source, target) blocks, before anything is written
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens + len(chunk.drafts) for chunk in self.chunks)


class Scheduler:
    """Holds all sequences that are not finished, and decides each step's work.

    Args:
        manager: the block manager of the pool.
        max_batched_tokens: token budget of one step.
        max_num_seqs: most sequences that run at once.
        policy: "continuous" mixes prompts and decoding in one step; "prefill_first" computes waiting prompts in steps
            of their own, and decoding waits; "static" admits a new batch only when the last one is finished.
        chunked_prefill: a prompt may be spread over steps. Off, it is computed in one step, whatever the budget.
    """

    def __init__(
        self,
        manager: BlockManager,
        max_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        policy: Policy = "continuous",
        chunked_prefill: bool = True,
    ):
        for name, value in (("max_batched_tokens", max_batched_tokens), ("max_num_seqs", max_num_seqs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.manager = manager
        self.max_batched_tokens, self.max_num_seqs = max_batched_tokens, max_num_seqs
        self.policy, self.chunked_prefill = policy, chunked_prefill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence and free its blocks. One that has not branched off yet has none."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.manager.free(sequence.seq_id)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def restart(self, manager: BlockManager) -> None:
        """Begin again with empty blocks: everything that ran is computed again, in its old order."""
        self.manager = manager
        for sequence in reversed(self.running):
            sequence.num_computed = 0
            self.waiting.appendleft(sequence)
        self.running.clear()

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` run on from the parent's computed tokens; the blocks are shared until one of them writes."""
        self.manager.fork(parent.seq_id, child.seq_id)
        child.num_computed = child.high_water = parent.num_computed
        self.running.insert(self.running.index(parent) + child.index, child)

    # ------------------------------------------------------------ one step

    def schedule(self, propose: Callable[[list[Sequence]], dict[Sequence, DraftTree]] | None = None) -> Schedule:
        """Choose the next step's chunks and reserve their blocks.

        Args:
            propose: asked once per step for drafts of the decoding sequences.
        """
        step = Schedule()
        budget = self.max_batched_tokens
        if self.policy == "prefill_first":
            budget = self._admit(step, budget)
            if step.chunks:
                return step
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        drafts = propose(decoding) if propose and decoding else {}
        budget = self._continue_running(step, budget, drafts)
        may_admit = self.policy == "continuous" or not self.running
        if may_admit and not step.preempted:  # memory is short: the preempted come back first
            self._admit(step, budget)
        return step

    def _continue_running(self, step: Schedule, budget: int, drafts: dict[Sequence, DraftTree]) -> int:
        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence not in self.running:  # preempted for an older one
                continue
            chunk = ScheduledChunk(sequence, sequence.num_computed, min(sequence.num_uncomputed, budget))
            if chunk.samples:
                chunk.drafts = drafts.get(sequence, chunk.drafts).first(budget - chunk.num_tokens)
            if self._reserve(step, chunk):
                step.chunks.append(chunk)
                budget -= chunk.num_tokens + len(chunk.drafts)
        return budget

    def _reserve(self, step: Schedule, chunk: ScheduledChunk) -> bool:
        """Make room for the chunk's tokens; False if its own sequence had to go."""
        sequence, manager = chunk.sequence, self.manager
        while True:
            try:
                missing = sequence.token_ids[manager.num_tokens(sequence.seq_id) :]
                # First the tokens that are final, then the look-ahead slots: drafts never enter the prefix cache.
                if missing:
                    self._copy(step, manager.append(sequence.seq_id, missing, commit=False))
                if chunk.drafts:
                    try:
                        self._copy(step, manager.append(sequence.seq_id, chunk.drafts.tokens, commit=False))
                    except OutOfBlocks:  # nobody is preempted for a guess
                        chunk.drafts = DraftTree()
                manager.commit(sequence.seq_id, chunk.end)
                return True
            except OutOfBlocks:
                victim = self.running[-1]
                self._preempt(step, victim)
                if victim is sequence:
                    return False

    @staticmethod
    def _copy(step: Schedule, copies: list) -> None:
        step.copies.extend((copy.source, copy.target) for copy in copies)

    def _preempt(self, step: Schedule, victim: Sequence) -> None:
        self.running.remove(victim)
        self.manager.preempt(victim.seq_id)
        victim.num_computed = 0
        victim.metrics.preemptions += 1
        self.waiting.appendleft(victim)
        step.preempted.append(victim)

    def _admit(self, step: Schedule, budget: int) -> int:
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            if sum(map(_num_places, self.running)) + _num_places(sequence) > self.max_num_seqs:
                break
            if not self.chunked_prefill and step.chunks and self._num_missing(sequence) > budget:
                break  # waits for a step of its own
            try:
                found = self._allocate(sequence)
            except OutOfBlocks:
                break
            self.waiting.popleft()
            self.running.append(sequence)
            # The cache decides here how much is left to compute; only then are tokens counted.
            sequence.num_computed = found.num_cached_tokens
            num_tokens = sequence.num_uncomputed
            if self.chunked_prefill:
                num_tokens = min(num_tokens, budget)
            chunk = ScheduledChunk(sequence, sequence.num_computed, num_tokens)
            self.manager.commit(sequence.seq_id, chunk.end)
            step.chunks.append(chunk)
            budget = max(0, budget - num_tokens)
        return budget

    def _allocate(self, sequence: Sequence) -> Allocation:
        salt = sequence.request.salt
        return self.manager.allocate(sequence.seq_id, sequence.token_ids, salt=salt, commit=False)

    def _num_missing(self, sequence: Sequence) -> int:
        cached = self.manager.num_cached_tokens(sequence.token_ids, salt=sequence.request.salt)
        return len(sequence.token_ids) - cached

    # ------------------------------------------------------------ after the step

    def settle(self, chunk: ScheduledChunk, path: list[int]) -> list[tuple[int, int]]:
        """The chunk is computed and its drafts on the path were right: forget the others.

        Returns: (source, target) slots of accepted drafts that lie behind forgotten ones. Their keys and values must be moved,
            all of a step at once: a target may be another's source, and no two targets are the same as long as nobody's blocks
            were freed meanwhile.
        """
        sequence = chunk.sequence
        computed = chunk.end + len(path)
        moves = []
        if chunk.drafts:
            moves = self._close_ranks(chunk, path)
            self.manager.commit(sequence.seq_id, computed)  # what was accepted is final now
        sequence.metrics.recomputed_tokens += max(0, min(computed, sequence.high_water) - chunk.start)
        sequence.num_computed = computed
        sequence.high_water = max(sequence.high_water, computed)
        return moves

    def _close_ranks(self, chunk: ScheduledChunk, path: list[int]) -> list[tuple[int, int]]:
        """Of the drafts keep those on the path, next to each other."""
        seq_id, manager = chunk.sequence.seq_id, self.manager
        in_place = next((i for i, node in enumerate(path) if node != i), len(path))  # all of a chain's
        lie = manager.slots(seq_id, chunk.end)
        manager.truncate(seq_id, chunk.end + in_place)
        if moved := path[in_place:]:  # there is room: as much was released just now
            manager.append(seq_id, [chunk.drafts.tokens[node] for node in moved], commit=False)
        belong = manager.slots(seq_id, chunk.end + in_place)
        return [(lie[node], slot) for node, slot in zip(moved, belong)]


def _num_places(sequence: Sequence) -> int:
    """A prompt that will be forked needs room for all of its continuations."""
    return 1 if sequence.forked else sequence.request.params.n
