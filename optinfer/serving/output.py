"""From logits to what users get: tokens for sequences, text for streams, completions for finished ones.

A step's results are first decided, then applied. Deciding calls what may fail (the tokenizer, the sampler) and changes
nothing that cannot be taken back; applying is bookkeeping of our own.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optinfer.serving.detokenizer import Detokenizer
from optinfer.serving.records import EngineStats
from optinfer.serving.request import Completion, Delta, Request, RequestMetrics, Sequence
from optinfer.serving.sampler import NO_TOKEN, Draw, choose
from optinfer.serving.scheduler import ScheduledChunk, Scheduler
from optinfer.speculative.tree import accept_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BROKEN = "the model's logits are not finite numbers (NaN or infinity): its weights, or its dtype, do not bear this text"


class UnknownRequest(KeyError, ValueError):
    """No unfinished request has this id: never added, finished, or cancelled already."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Group:
    """A request under way: its unfinished continuations, and where their results go."""

    request: Request
    live: list[Sequence]
    done: list[Completion] | None  # finished continuations; None: it is streamed
    deltas: deque[Delta] = field(default_factory=deque)  # of a stream, not handed over yet


@dataclass
class Decision:
    """What a computed chunk means for its sequence: new tokens, and how it ends, if it does."""

    sequence: Sequence
    tokens: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)  # nodes of the draft tree among the tokens
    reason: str | None = None
    text: str | None = None  # all of it, at the end
    branches: list["Decision"] = field(default_factory=list)  # first tokens of continuations that branch off here


class Output:
    """Requests under way, and their results.

    Args:
        scheduler: is told when a sequence branches off or ends.
        tokenizer: for results as text; None: token ids only.
        eos: the token ids that end a text.
        max_model_len: longest prompt plus output.
        stats: totals to count in.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: "PreTrainedTokenizerBase | None",
        eos: frozenset[int],
        max_model_len: int,
        stats: EngineStats,
    ):
        self.scheduler, self.tokenizer, self.stats = scheduler, tokenizer, stats
        self._eos, self._max_model_len = eos, max_model_len
        self.groups: dict[str, Group] = {}

    def add(self, request: Request, done: list[Completion] | None) -> Group:
        """Begin a request; its completions will be appended to `done`, or it is streamed.

        Raises ValueError: the id is taken.
        """
        if request.request_id in self.groups:
            raise ValueError(f"request_id {request.request_id!r} is taken by an unfinished request")
        watched = done is None or bool(request.params.stop)
        live = []
        for index in range(request.params.n):
            text = Detokenizer(self.tokenizer, request.params.stop) if watched and self.tokenizer is not None else None
            metrics = RequestMetrics(request.arrival, prompt_tokens=len(request.prompt_token_ids))
            live.append(Sequence(request, index, list(request.prompt_token_ids), metrics, text))
        live[0].forked = request.params.n == 1
        group = self.groups[request.request_id] = Group(request, live, done)
        self.stats.prompt_tokens += len(request.prompt_token_ids)
        self.scheduler.add(live[0])
        return group

    def cancel(self, request_id: str, now: float) -> list[Sequence]:
        """End a request; returns the continuations that it still had.

        Raises UnknownRequest.
        """
        if request_id not in self.groups:
            raise UnknownRequest(f"request {request_id!r} is unknown, finished or cancelled already")
        live = list(self.groups[request_id].live)
        decisions = [Decision(s, reason="cancelled", text=self._whole_text(s, s.output_ids)) for s in live]
        for decision in decisions:
            self._emit(decision, now)
        return live

    # ------------------------------------------------------------ deciding

    def decide(self, chunks: list[ScheduledChunk], logits: Tensor) -> list[Decision]:
        """What each chunk's rows of the logits mean. If it raises, nothing has changed."""
        draws, row = [], 0
        for chunk in chunks:
            if chunk.samples:
                offsets = (0, *chunk.drafts.depths)
                draws += [self._draw(chunk.sequence, row + i, offset) for i, offset in enumerate(offsets)]
                draws += [self._draw(child, row, 0) for child in self._branching(chunk.sequence)]
            row += chunk.num_logits
        chosen = iter(choose(logits, draws))
        with _all_or_nothing(group.live for group in self.groups.values()):
            return [self._decide(chunk, chosen) for chunk in chunks]

    @staticmethod
    def _draw(sequence: Sequence, row: int, offset: int) -> Draw:
        params = sequence.request.params
        if params.temperature == 0:
            return Draw(row, params)
        return Draw(row, params, sequence.uniform(len(sequence.token_ids) - sequence.num_prompt_tokens + offset))

    def _branching(self, sequence: Sequence) -> list[Sequence]:
        """The prompt is computed: the continuations that branch off from it now."""
        if sequence.forked:
            return []
        return [child for child in self.groups[sequence.request.request_id].live if child is not sequence]

    def _decide(self, chunk: ScheduledChunk, chosen: Iterator[int]) -> Decision:
        if not chunk.samples:
            return Decision(chunk.sequence)
        # The token behind the newest one and behind each draft, as if all drafts on the way there were right.
        says = [next(chosen) for _ in range(chunk.num_logits)]
        path, last = accept_path(chunk.drafts, says)
        decision = self._end(Decision(chunk.sequence, [*(chunk.drafts.tokens[node] for node in path), last]))
        decision.path = path[: len(decision.tokens)]
        decision.branches = [self._end(Decision(child, [next(chosen)])) for child in self._branching(chunk.sequence)]
        return decision

    def _end(self, decision: Decision) -> Decision:
        """Cut the tokens behind the first that ends the sequence, and say how it ends."""
        sequence, params = decision.sequence, decision.sequence.request.params
        room = min(
            params.max_tokens + sequence.num_prompt_tokens - len(sequence.token_ids),
            self._max_model_len - len(sequence.token_ids),
        )
        kept: list[int] = []
        for token in decision.tokens:
            if token == NO_TOKEN:
                decision.reason = "error"
                break
            kept.append(token)
            found = sequence.text is not None and sequence.text.push(token)
            if found or token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
                decision.reason = "stop"
                break
            if len(kept) == room:
                decision.reason = "length"
                break
        decision.tokens = kept
        if decision.reason is not None:
            decision.text = self._whole_text(sequence, sequence.output_ids + kept)
        return decision

    def _whole_text(self, sequence: Sequence, output: list[int]) -> str | None:
        if self.tokenizer is None:
            return None
        if sequence.text is not None:
            return sequence.text.finish()
        text: Any = self.tokenizer.decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text  # of one list of ids it is one string

    # ------------------------------------------------------------ applying

    def apply(self, decision: Decision, now: float) -> list[Sequence]:
        """Give decided tokens to their sequences; returns those that are finished with them."""
        sequence, finished = decision.sequence, []
        if decision.tokens or decision.reason is not None:
            sequence.forked = True
            for branch in decision.branches:
                child = branch.sequence
                child.forked = True
                child.metrics.first_scheduled = sequence.metrics.first_scheduled
                child.metrics.cached_tokens = sequence.metrics.cached_tokens
                self.scheduler.fork(sequence, child)
            for part in (*decision.branches, decision):
                self._emit(part, now)
                if part.reason is not None:
                    finished.append(part.sequence)
        return finished

    def _emit(self, decision: Decision, now: float) -> None:
        sequence, reason = decision.sequence, decision.reason
        group = self.groups[sequence.request.request_id]
        sequence.token_ids.extend(decision.tokens)
        self.stats.output_tokens += len(decision.tokens)
        if decision.tokens and sequence.metrics.first_token is None:
            sequence.metrics.first_token = now
        error = BROKEN if reason == "error" else None
        if reason is not None:
            self._finish(group, decision, now, error)
        if group.done is None:
            piece = None if sequence.text is None else sequence.text.take(final=reason is not None)
            group.deltas.append(Delta(sequence.index, piece, decision.tokens, reason, error))

    def _finish(self, group: Group, decision: Decision, now: float, error: str | None) -> None:
        sequence, reason = decision.sequence, str(decision.reason)
        self.scheduler.remove(sequence)
        group.live.remove(sequence)
        if not group.live:
            del self.groups[group.request.request_id]
        output = sequence.output_ids
        sequence.metrics.finished = now
        sequence.metrics.output_tokens = len(output)
        counted = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
        setattr(self.stats, counted, getattr(self.stats, counted) + 1)
        if group.done is not None:
            group.done.append(
                Completion(
                    group.request.request_id, sequence.index, decision.text, output, reason, sequence.metrics, error
                )
            )


@contextmanager
def _all_or_nothing(sequences: Iterable[list[Sequence]]) -> Iterator[None]:
    """Texts get back what they were if the block raises."""
    states = [(s.text, s.text.snapshot()) for live in sequences for s in live if s.text is not None]
    try:
        yield
    except BaseException:
        for text, state in states:
            text.restore(state)
        raise


def end_of_sequence(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> frozenset[int]:
    """The ids that `model.generate` stops at."""
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, (list, tuple)) else [ids])
    return frozenset()
