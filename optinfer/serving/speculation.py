"""Speculation inside the engine: who drafts for a whole batch, and when drafting pays.

The engine samples at every drafted position as if there were no draft, and keeps going while the sample equals the
draft. For a draft that is one certain token this is rejection sampling (accepted with probability p(draft), otherwise a
draw from the rest), and the output is the same, token for token, as without speculation. So all drafting is greedy.

A chain is a tree of one branch. In a tree (`TreeDraft`) the engine samples behind every node, with the random number that its
depth has without drafts, and walks down while the sample has a child: again the same output, token for token.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from optinfer.kv_cache import BlockManager, OutOfBlocks
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.paged_batch import Chunk
from optinfer.serving.request import Sequence
from optinfer.speculative.by_name import DraftLike, as_draft
from optinfer.speculative.draft_length import PRIOR_SLOPE
from optinfer.speculative.draft_tree import DraftTree
from optinfer.speculative.drafters import Draft, ModelDraft, context_length, names
from optinfer.speculative.sampler import Sampler
from optinfer.upload import upload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GREEDY = Sampler(None, greedy=True)


class BatchDraft(Protocol):
    """What the engine asks of a drafter: the same as of a `Draft`, for many sequences at once."""

    name: str
    needs_hidden: bool
    max_tokens: int | None

    def evidence(self, sequence: Sequence) -> int | None:
        """As of a `Draft`: 0 where there is nothing to say, None where that is not known without drafting."""

    def propose(self, wanted: dict[Sequence, int]) -> dict[Sequence, DraftTree]:
        """For each sequence a tree of at most this depth; sequences with nothing to say are left out."""

    def observe(self, sequence: Sequence, start: int, hidden: torch.Tensor) -> None:
        """The target's final hidden states [tokens, hidden_size] of the sequence's tokens from `start` on."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence is gone, or begins again."""


def batch_drafts(
    draft: DraftLike,
    target: "PreTrainedModel",
    num_blocks: int,
    block_size: int,
    max_length: int,
    has_windows: bool = False,
) -> list[BatchDraft]:
    """Who drafts for the batch, in the order in which they are asked, for what a user passes as `draft` (see `as_draft`).

    Args:
        has_windows: a layer of the target sees a window only.

    Raises ValueError: an unknown name, or a drafter that cannot draft for this model.
    """
    members = as_draft(draft, trees=True).members
    for member in members:
        if has_windows and hasattr(member, "propose_tree"):
            raise ValueError(
                f"draft {type(member).__name__} drafts trees, and a layer of this {type(target).__name__} sees a window of "
                "the text: a node's place in the pages does not say how far back it sees. Use a drafter of chains"
            )
        member.bind(target)
    return [
        BatchedModel(name, member, num_blocks, block_size, max_length)
        if isinstance(member, ModelDraft)
        else PerSequence(name, member, target)
        for name, member in zip(names(members), members)
    ]


@dataclass
class _OfSequence:
    """One sequence's own drafter, and from which position on it was shown the target's hidden states."""

    draft: Draft
    first_hidden: int | None = None


class PerSequence:
    """A drafter that follows one text (prompt lookup, a trained head): a copy of it for every sequence.

    One that reads hidden states sees a sequence from the first token that this engine computed for it: after a hit in
    the prefix cache that is not the first token of the prompt.
    """

    def __init__(self, name: str, draft: Draft, target: "PreTrainedModel"):
        self.name, self.draft, self.target = (
            name,
            draft,
            target,
        )  # bound once: what is made per target, all copies share
        self.needs_hidden, self.max_tokens = draft.needs_hidden, draft.max_tokens
        self._own: dict[Hashable, _OfSequence] = {}

    def evidence(self, sequence: Sequence) -> int | None:
        own = self._of(sequence)
        if self.needs_hidden and own.first_hidden is None:
            return 0
        return own.draft.evidence(self._text(sequence))

    def propose(self, wanted: dict[Sequence, int]) -> dict[Sequence, DraftTree]:
        drafted = [self._of(s).draft.propose_marked(self._text(s), most, GREEDY) for s, most in wanted.items()]
        flat = iter(torch.cat(drafted).tolist() if drafted else ())  # the only wait for the device
        found = {}
        for sequence, marked in zip(wanted, drafted):
            if tree := self._of(sequence).draft.as_tree(list(itertools.islice(flat, len(marked)))):
                found[sequence] = tree
        return found

    def observe(self, sequence: Sequence, start: int, hidden: torch.Tensor) -> None:
        own = self._of(sequence)
        if own.first_hidden is None:
            own.first_hidden = start
        own.draft.observe(hidden[None])

    def forget(self, sequence: Sequence) -> None:
        self._own.pop(sequence.seq_id, None)

    def _text(self, sequence: Sequence) -> torch.Tensor:
        device = torch.device("cpu") if self.draft.on_host else self.target.device
        return upload([sequence.token_ids[self._of(sequence).first_hidden :]], device)

    def _of(self, sequence: Sequence) -> _OfSequence:
        own = self._own.get(sequence.seq_id)
        if own is None:
            own = self._own[sequence.seq_id] = _OfSequence(copy.copy(self.draft))
            own.draft.bind(self.target)
        return own


class BatchedModel:
    """A draft model for the whole batch, with pages of its own: one pass per drafted token, whatever the batch."""

    needs_hidden = False

    def __init__(self, name: str, draft: ModelDraft, num_blocks: int, block_size: int, max_length: int):
        self.name, self.max_tokens, self._min_confidence = name, draft.max_tokens, draft.min_confidence
        self._max_length = min(max_length, context_length(draft.model))
        self.runner = ModelRunner(draft.model, num_blocks, block_size, max_length=self._max_length)
        self._new_manager = functools.partial(BlockManager, num_blocks, block_size, record_events=False)
        self._start_again()

    def _start_again(self) -> None:
        self.manager = self._new_manager()
        self._computed: dict[Hashable, int] = {}  # per sequence: tokens whose keys and values are in the pages

    def evidence(self, sequence: Sequence) -> int | None:
        return None

    def propose(self, wanted: dict[Sequence, int]) -> dict[Sequence, DraftTree]:
        if not self.runner.is_current():
            self.runner.renew()
            self._start_again()
        room = {s: min(most, self._max_length - len(s.token_ids) + 1) for s, most in wanted.items()}
        drafts: dict[Sequence, list[int]] = {s: [] for s in wanted if room[s] > 0 and self._follow(s)}
        survival = dict.fromkeys(drafts, 1.0)
        for k in range(max(room.values(), default=0)):
            drafting = [s for s in drafts if len(drafts[s]) == k < room[s]]
            drafting = [s for s in drafting if k == 0 or self._append(s, drafts[s][-1])]
            if not drafting:
                break
            logits = self.runner.run([self._chunk(s) for s in drafting], [1] * len(drafting))
            tokens = logits.argmax(-1).tolist()
            sure = logits.float().softmax(-1).amax(-1).tolist() if self._min_confidence else [1.0] * len(tokens)
            for sequence, token, chance in zip(drafting, tokens, sure):
                survival[sequence] *= chance
                if survival[sequence] >= self._min_confidence:
                    drafts[sequence].append(token)
        return {sequence: DraftTree.chain(tokens) for sequence, tokens in drafts.items() if tokens}

    def observe(self, sequence: Sequence, start: int, hidden: torch.Tensor) -> None:
        """It has its own."""

    def forget(self, sequence: Sequence) -> None:
        if self._computed.pop(sequence.seq_id, None) is not None:
            self.manager.free(sequence.seq_id)

    def _follow(self, sequence: Sequence) -> bool:
        """Bring the draft's pages to the sequence's text: drop what was rejected, add what is new."""
        seq_id, tokens = sequence.seq_id, sequence.token_ids
        try:
            if seq_id not in self._computed:
                self._computed[seq_id] = self.manager.allocate(seq_id, tokens, commit=False).num_cached_tokens
                return True
            held = self.manager.token_ids(seq_id)
            same = next((i for i, (a, b) in enumerate(zip(held, tokens)) if a != b), min(len(held), len(tokens)))
            if same < len(held):
                self.manager.truncate(seq_id, same)
            self._computed[seq_id] = min(self._computed[seq_id], same, len(tokens) - 1)
            if same < len(tokens):
                self.manager.append(seq_id, tokens[same:], commit=False)
            self.manager.commit(seq_id, max(1, self._computed[seq_id]))
            return True
        except OutOfBlocks:
            self.forget(sequence)
            return False

    def _append(self, sequence: Sequence, token: int) -> bool:
        try:
            self.manager.append(sequence.seq_id, [token], commit=False)
            return True
        except OutOfBlocks:
            return False

    def _chunk(self, sequence: Sequence) -> Chunk:
        tokens = self.manager.token_ids(sequence.seq_id)
        start = self._computed[sequence.seq_id]
        self._computed[sequence.seq_id] = len(tokens)
        return Chunk(tokens[start:], start, self.manager.block_table(sequence.seq_id))


class RunningFit:
    """How long a step takes: seconds = fixed + per_token * tokens, fitted to recent steps (older ones fade)."""

    def __init__(self, fade: float = 0.97):
        self.fade = fade
        self._sums = [0.0] * 5  # of 1, x, y, x*x, x*y
        self.steps = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        terms = (1.0, num_tokens, seconds, num_tokens * num_tokens, num_tokens * seconds)
        self._sums = [self.fade * old + new for old, new in zip(self._sums, terms)]
        self.steps += 1

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """(fixed, per_token), None while steps of different sizes are too few."""
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        if self.steps < 8 or spread < 1e-3 * n * n:
            return None
        per_token = max(0.0, (n * xy - x * y) / spread)
        return max(0.0, (y - per_token * x) / n), per_token


class Speculator:
    """Asks the drafters in turn, each only where its draft is expected to pay.

    How far a sequence's drafts can be trusted is counted as for a single text, see `Acceptance`; what they cost depends
    on the batch. A step over S sequences takes T(S), so a token costs T(S)/S now, and a drafted one what it adds to the
    step and what drafting it takes. At batch 1 that is little; in a large batch it approaches the price of a token, and
    speculation turns itself off.
    """

    def __init__(
        self,
        drafts: list[BatchDraft],
        num_tokens: int,
        adaptive: bool,
        max_length: int,
        clock: Callable[[], float],
    ):
        self.drafts, self.num_tokens, self.adaptive, self.clock = drafts, num_tokens, adaptive, clock
        self.needs_hidden = any(draft.needs_hidden for draft in drafts)
        self.cost = RunningFit()
        self._max_length = max_length
        self._draft_seconds = {draft.name: 0.0 for draft in drafts}  # per drafted token
        self._breadth = {draft.name: 1.0 for draft in drafts}  # tokens per level of its newest trees; 1 of chains
        self._asked: dict[Sequence, tuple[str, int | None]] = {}  # whose draft is checked now, and its evidence

    def propose(self, sequences: list[Sequence]) -> dict[Sequence, DraftTree]:
        found: dict[Sequence, DraftTree] = {}
        self._asked = {}
        for draft in self.drafts:
            start = self.clock()
            price = self.price(len(sequences), draft.name) * self._breadth[draft.name]
            wanted, evidence = {}, {}
            for sequence in sequences:
                if sequence not in found and (shown := draft.evidence(sequence)) != 0:
                    most = min(self.num_tokens, self._room(sequence), draft.max_tokens or self.num_tokens)
                    if most > 0 and self.adaptive:
                        most = sequence.acceptance.best_length(most, draft.name, shown, price)
                    if most > 0:
                        wanted[sequence], evidence[sequence] = most, shown
            said = draft.propose(wanted) if wanted else {}
            if num_drafted := sum(map(len, said.values())):
                seconds = (self.clock() - start) / num_drafted
                self._draft_seconds[draft.name] += 0.1 * (seconds - self._draft_seconds[draft.name])
                self._breadth[draft.name] = num_drafted / sum(max(tree.depths) for tree in said.values())
            found |= said
            self._asked |= {sequence: (draft.name, evidence[sequence]) for sequence in said}
        return found

    def price(self, num_sequences: int, drafter: str = "") -> float:
        """What a drafted token costs, in tokens that are decoded plainly: from 1 on even a right one does not pay."""
        if self.cost.coefficients is None:
            return PRIOR_SLOPE * num_sequences
        fixed, per_token = self.cost.coefficients
        step = fixed + per_token * num_sequences
        return num_sequences * (per_token + self._draft_seconds.get(drafter, 0.0)) / step if step > 0 else 0.0

    def observe(self, sequence: Sequence, tree: DraftTree, path: list[int]) -> None:
        """The nodes on the path were right; another level was tried where the last of them has children."""
        name, evidence = self._asked[sequence]
        tried = len(path) + bool(tree.children(path[-1] if path else -1))
        sequence.acceptance.record(name, evidence, tried, len(path))

    def observe_hidden(self, sequence: Sequence, start: int, hidden: torch.Tensor) -> None:
        for draft in self.drafts:
            if draft.needs_hidden:
                draft.observe(sequence, start, hidden)

    def forget(self, sequence: Sequence) -> None:
        for draft in self.drafts:
            draft.forget(sequence)

    def _room(self, sequence: Sequence) -> int:
        """Tokens that a draft may have: the target adds one, and what lies beyond the request's end is not kept."""
        length = len(sequence.token_ids)
        end = min(sequence.num_prompt_tokens + sequence.request.params.max_tokens, self._max_length)
        return end - length - 1
