"""Speculation inside the engine: who drafts for a whole batch, and when drafting pays.

The engine samples at every drafted position as if there were no draft, and keeps going while the sample equals the
draft. For a draft that is one certain token this is rejection sampling (accepted with probability p(draft), otherwise a
draw from the rest), and the output is the same, token for token, as without speculation. So all drafting is greedy.
"""

import copy
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from optinfer.kv_cache import BlockManager, OutOfBlocks
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.paged_batch import Chunk
from optinfer.serving.request import Sequence
from optinfer.speculative import Draft, ModelDraft, PromptLookupDraft
from optinfer.speculative.sampler import Sampler

GREEDY = Sampler(None, greedy=True)
PRIOR = 0.5  # acceptance assumed of a sequence nothing is known about


@dataclass
class _Drafter:
    """One sequence's drafters, asked in turn, and from which position on the target's hidden states are known."""

    members: list[Draft]
    first_hidden: int | None = None


class SequenceDrafts:
    """Drafters per sequence (prompt lookup, a trained head, a chain of several), asked one after the other.

    A drafter that reads hidden states sees a sequence from the first token that this engine computed for it: after a hit
    in the prefix cache that is not the first token of the prompt.
    """

    def __init__(self, draft: Draft, target: Any):
        self.draft, self.target = draft, target
        self.needs_hidden = draft.needs_hidden
        for member in draft.members:
            member.bind(target)  # what is made once per target is then shared by all copies
        self._drafters: dict[Hashable, _Drafter] = {}

    def propose(self, sequences: list[Sequence], num_tokens: int) -> dict[Sequence, list[int]]:
        found = {}
        for sequence in sequences:
            drafter = self._of(sequence)
            ids = torch.tensor([sequence.token_ids], device=self.target.device)
            for member in drafter.members:
                if member.needs_hidden and drafter.first_hidden is None:
                    continue
                text = ids[:, drafter.first_hidden :] if member.needs_hidden else ids
                most = min(num_tokens, member.max_tokens or num_tokens)
                if tokens := member.propose(text, most, GREEDY).tokens.tolist():
                    found[sequence] = tokens
                    break
        return found

    def observe(self, sequence: Sequence, start: int, hidden: torch.Tensor) -> None:
        """The target's final hidden states [tokens, hidden_size] of the sequence's tokens from `start` on."""
        drafter = self._of(sequence)
        if drafter.first_hidden is None:
            drafter.first_hidden = start
        for member in drafter.members:
            if member.needs_hidden:
                member.observe(hidden[None])

    def forget(self, sequence: Sequence) -> None:
        self._drafters.pop(sequence.seq_id, None)

    def _of(self, sequence: Sequence) -> _Drafter:
        drafter = self._drafters.get(sequence.seq_id)
        if drafter is None:
            drafter = self._drafters[sequence.seq_id] = _Drafter([copy.copy(m) for m in self.draft.members])
            for member in drafter.members:
                member.bind(self.target)
        return drafter


class BatchedModelDrafts:
    """A draft model for the whole batch, with pages of its own: one pass per drafted token, whatever the batch."""

    needs_hidden = False

    def __init__(self, model: Any, num_blocks: int, block_size: int, max_length: int):
        self.runner = ModelRunner(model, num_blocks, block_size, max_length=max_length)
        self._new_manager = functools.partial(BlockManager, num_blocks, block_size, record_events=False)
        self._start_again()

    def _start_again(self) -> None:
        self.manager = self._new_manager()
        self._computed: dict[Hashable, int] = {}  # per sequence: tokens whose keys and values are in the pages

    def propose(self, sequences: list[Sequence], num_tokens: int) -> dict[Sequence, list[int]]:
        if not self.runner.is_current():
            self.runner.renew()
            self._start_again()
        drafts: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences if self._follow(sequence)}
        for _ in range(num_tokens):
            drafting = [s for s in drafts if len(drafts[s]) == 0 or self._append(s, drafts[s][-1])]
            if not drafting:
                break
            logits = self.runner.run([self._chunk(s) for s in drafting], [1] * len(drafting))
            for sequence, token in zip(drafting, logits.argmax(-1).tolist()):
                drafts[sequence].append(token)
        return {sequence: tokens for sequence, tokens in drafts.items() if tokens}

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


class StepCost:
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
    """Asks the drafter, and only for sequences where a draft is expected to pay.

    A draft of g tokens, a share `a` of them right, saves a*g times what a token costs now, T(S)/S for S sequences,
    and costs g * per_token. So it pays where a > S * per_token / T(S): the part of the step that grows with the number
    of tokens. At batch 1 that is little; for a large batch it approaches 1 and speculation turns itself off.
    """

    def __init__(self, drafts: Any, num_tokens: int, adaptive: bool, clock: Callable[[], float]):
        self.drafts, self.num_tokens, self.adaptive, self.clock = drafts, num_tokens, adaptive, clock
        self.cost = StepCost()
        self._seconds_per_draft = 0.0

    def propose(self, sequences: list[Sequence]) -> dict[Sequence, list[int]]:
        chosen = []
        needed = self.break_even(len(sequences))
        for sequence in sequences:
            if not self.adaptive or sequence.acceptance > needed:
                chosen.append(sequence)
            else:  # forget slowly what did not pay: texts change
                sequence.acceptance += 0.02 * (PRIOR - sequence.acceptance)
        if not chosen:
            return {}
        start = self.clock()
        found = self.drafts.propose(chosen, self.num_tokens)
        if num_drafted := sum(map(len, found.values())):
            per_draft = (self.clock() - start) / num_drafted
            self._seconds_per_draft += 0.1 * (per_draft - self._seconds_per_draft)
        # Never beyond the end of the request: those tokens could not be kept.
        room = {s: s.request.params.max_tokens - len(s.token_ids) + s.num_prompt_tokens - 1 for s in found}
        return {s: tokens[: room[s]] for s, tokens in found.items() if room[s] > 0}

    def break_even(self, num_sequences: int) -> float:
        """The acceptance from which drafting pays at this batch size; 0 while the cost of steps is not known."""
        if self.cost.coefficients is None:
            return 0.0
        fixed, per_token = self.cost.coefficients
        step = fixed + per_token * num_sequences
        return num_sequences * (per_token + self._seconds_per_draft) / step if step > 0 else 0.0

    def observe(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        sequence.acceptance += 0.2 * (accepted / drafted - sequence.acceptance)

    def observe_hidden(self, sequence: Sequence, start: int, hidden: torch.Tensor) -> None:
        self.drafts.observe(sequence, start, hidden)

    def forget(self, sequence: Sequence) -> None:
        self.drafts.forget(sequence)


def make_drafts(draft: str | Draft, model: Any, num_blocks: int, block_size: int, max_length: int) -> Any:
    """The batch's drafter for what a user passes as `draft`.

    Raises ValueError: an unknown name, or a drafter that cannot draft for this model.
    """
    if draft == "prompt_lookup":
        draft = PromptLookupDraft(min_ngram=2)  # a full batch has no idle arithmetic for long shots
    if not isinstance(draft, Draft):
        raise ValueError(f"draft must be None, 'prompt_lookup' or an optinfer.speculative drafter, got {draft!r}")
    if isinstance(draft, ModelDraft):
        draft.bind(model)
        return BatchedModelDrafts(draft.model, num_blocks, block_size, max_length)
    return SequenceDrafts(draft, model)
