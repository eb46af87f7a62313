"""The engine: requests in, tokens out. One step is schedule -> run -> postprocess."""

import functools
import math
import operator
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optinfer.kv_cache import BlockManager, IntegrityError, num_blocks_for
from optinfer.serving.detokenizer import Detokenizer
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.paged_batch import Chunk
from optinfer.serving.request import (
    Completion,
    Delta,
    Request,
    RequestMetrics,
    SamplingParams,
    Sequence,
)
from optinfer.serving.sampler import greedy, sample
from optinfer.serving.scheduler import Schedule, ScheduledChunk, Scheduler
from optinfer.serving.speculation import Speculator, make_drafts

_DEFAULT_KV_BYTES = 2**29


class UnknownRequest(KeyError, ValueError):
    """No unfinished request has this id: never added, finished, or cancelled already."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(slots=True)
class StepRecord:
    """One line of the engine's log. `chunks`: what each sequence computed, as dicts with request_id, index, kind
    ("prefill" or "decode"), start, num_tokens, drafted, accepted, emitted."""

    step: int
    start: float
    seconds: float
    chunks: list[dict[str, Any]]
    preempted: list[tuple[str, int]]
    finished: list[tuple[str, int]]
    waiting: int
    running: int
    used_blocks: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class EngineStats:
    """Totals since the engine was made."""

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    peak_used_blocks: int = 0


@dataclass
class _Group:
    """A request under way: its unfinished continuations, and the pieces of its stream not handed over yet."""

    request: Request
    live: list[Sequence]
    deltas: deque[Delta] | None = None  # None: nobody streams it


class Engine:
    """Serves one transformers model to many requests at once.

    Args:
        model: a decoder from transformers, quantized or not. Its q/k/v and gate/up projections are merged in place
            (same parameters, same results); in bf16 on a CPU a repacked copy of the weights is kept instead, so it costs
            their memory once more. `fuse=False`: neither.
        tokenizer: for prompts and results as text; None: token ids only.
        num_blocks: pages of the KV cache. Default: half a GiB of them.
        block_size: tokens per page.
        draft: None, "prompt_lookup", or a drafter of `optinfer.speculative` (`QuantizedDraft("int8")`, …).
        num_draft_tokens: tokens drafted per step and sequence.
        adaptive_drafts: draft only where the measured cost of a step says that it pays.
        max_batched_tokens, max_num_seqs, policy, chunked_prefill: see `Scheduler`.
        prefix_caching: requests that begin alike share pages.
        max_model_len: longest prompt plus output; default: what the model's config allows.
        fuse, head, attention_backend, kv_dtype, cuda_graphs, compile: see `ModelRunner`.
        clock: seconds, for metrics and the log.

    Raises ValueError for a model or parameters it cannot work with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        draft: Any = None,
        *,
        num_draft_tokens: int = 4,
        adaptive_drafts: bool = True,
        max_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        policy: str = "continuous",
        chunked_prefill: bool = True,
        prefix_caching: bool = True,
        max_model_len: int | None = None,
        fuse: bool = True,
        head: str | None = None,
        attention_backend: str = "auto",
        kv_dtype: torch.dtype | None = None,
        cuda_graphs: bool | None = None,
        compile: bool = False,
        log: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        config = model.config.get_text_config()
        self.model, self.tokenizer, self.clock = model, tokenizer, clock
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.max_model_len: int = max_model_len or getattr(config, "max_position_embeddings", None) or 2**31
        if num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens must be at least 1, got {num_draft_tokens}")
        if num_blocks is None:
            num_blocks = max(1, num_blocks_for(_DEFAULT_KV_BYTES, config, kv_dtype or model.dtype, block_size))
        self._new_manager = functools.partial(BlockManager, num_blocks, block_size, prefix_caching, record_events=False)
        self.scheduler = Scheduler(self._new_manager(), max_batched_tokens, max_num_seqs, policy, chunked_prefill)
        self.runner = ModelRunner(
            model, num_blocks, block_size, fuse, head, attention_backend, kv_dtype, cuda_graphs, compile, max_num_seqs,
            min(self.max_model_len, num_blocks * block_size),
        )  # fmt: skip
        self.speculator = None
        if draft is not None:
            drafts = make_drafts(draft, model, num_blocks, block_size)
            self.speculator = Speculator(drafts, num_draft_tokens, adaptive_drafts, clock)
            self.runner.keep_hidden = drafts.needs_hidden

        self.stats = EngineStats()
        self.log: list[StepRecord] = []
        self._keep_log = log
        self._eos = _end_of_sequence(model, tokenizer)
        self._groups: dict[str, _Group] = {}
        self._done: list[Completion] = []  # finished, not yet returned by a step
        self._next_id = 0

    # ------------------------------------------------------------ requests

    def add_request(
        self,
        prompt: str | Iterable[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        arrival: float | None = None,
    ) -> str:
        """Queue a request; `step` works on it. Returns its id.

        Raises:
            ValueError, TypeError: the prompt is empty, too long for the context or for the pages, holds an unknown
                token, or the id is taken. The message says which; the engine is unchanged.
        """
        request = self._make_request(prompt, params, request_id, arrival)
        self._enqueue(request)
        return request.request_id

    def cancel(self, request_id: str) -> None:
        """End a request now; its continuations are reported with finish_reason "cancelled" by the next step, or by the
        stream that it belongs to.

        Raises UnknownRequest: there is no such request, or not any more.
        """
        if request_id not in self._groups:
            raise UnknownRequest(f"request {request_id!r} is unknown, finished or cancelled already")
        group = self._groups[request_id]
        for sequence in list(group.live):
            self._finish(sequence, "cancelled", self.clock())
            if group.deltas is not None:
                group.deltas.append(Delta(sequence.index, "" if self.tokenizer else None, [], "cancelled"))

    @property
    def has_work(self) -> bool:
        """A step would compute something or hand something over."""
        return self.scheduler.has_work or bool(self._done)

    @property
    def manager(self) -> BlockManager:
        return self.scheduler.manager

    # ------------------------------------------------------------ the loop

    def step(self) -> list[Completion]:
        """Compute one batch; returns the continuations that finished since the last step.

        If the model raises (out of memory, an interrupt), no request is lost: all are computed again from their tokens.
        """
        self._advance()
        done, self._done = self._done, []
        return done

    def _advance(self) -> None:
        if not self.scheduler.has_work:
            return
        start = self.clock()
        try:
            schedule = self.scheduler.schedule(self.speculator.propose if self.speculator else None)
            logits = self._run(schedule)
            likeliest = greedy(logits)
        except BaseException:
            self._recover()
            raise
        self._postprocess(schedule, logits, likeliest, start)

    def _run(self, schedule: Schedule) -> Tensor:
        chunks = []
        for c in schedule.chunks:
            tokens = c.sequence.token_ids[c.start : c.end] + c.drafts
            chunks.append(Chunk(tokens, c.start, self.manager.block_table(c.sequence.seq_id)))
        return self.runner.run(chunks, [c.num_logits for c in schedule.chunks], schedule.copies)

    def _postprocess(self, schedule: Schedule, logits: Tensor, likeliest: list[int], start: float) -> None:
        now = self.clock()
        for sequence in schedule.preempted:
            self.stats.preemptions += 1
            self._forget_drafts(sequence)
        lines: list[dict[str, Any]] = []
        finished: list[tuple[str, int]] = []
        row = 0
        for i, chunk in enumerate(schedule.chunks):
            rows = slice(row, row + chunk.num_logits)
            row = rows.stop
            lines.append(self._apply(chunk, logits[rows], likeliest[rows], start, now, finished))
            if self.speculator and self.speculator.drafts.needs_hidden and chunk.sequence.metrics.finished is None:
                final = lines[-1]["num_tokens"] + lines[-1]["accepted"]
                self.speculator.observe_hidden(chunk.sequence, chunk.start, self.runner.hidden[i][:final])

        stats, manager = self.stats, self.manager
        used = manager.num_blocks - manager.num_free_blocks
        stats.steps += 1
        stats.computed_tokens += schedule.num_tokens
        stats.peak_used_blocks = max(stats.peak_used_blocks, used)
        if self.speculator:
            self.speculator.cost.observe(schedule.num_tokens, now - start)
        if self._keep_log:
            preempted = [sequence.seq_id for sequence in schedule.preempted]
            waiting, running = len(self.scheduler.waiting), len(self.scheduler.running)
            self.log.append(
                StepRecord(stats.steps, start, now - start, lines, preempted, finished, waiting, running, used)
            )

    def _apply(
        self, chunk: ScheduledChunk, logits: Tensor, likeliest: list[int], start: float, now: float, finished: list
    ) -> dict[str, Any]:
        """Give a computed chunk's result to its sequence; returns the chunk's line of the log."""
        sequence, samples = chunk.sequence, chunk.samples
        kind = "decode" if sequence.is_decoding else "prefill"
        if sequence.metrics.first_scheduled is None:
            sequence.metrics.first_scheduled = start
            sequence.metrics.cached_tokens = chunk.start
            self.stats.cached_tokens += chunk.start

        kept, accepted = [], 0
        if samples:
            chosen = self._choose(sequence, logits, likeliest)
            while accepted < len(chunk.drafts) and chunk.drafts[accepted] == chosen[accepted]:
                accepted += 1
            kept = self._until_end(sequence, chosen[: accepted + 1])
            accepted = min(accepted, len(kept))
        self.scheduler.settle(chunk, accepted)
        if chunk.drafts:
            self._count_drafts(sequence, len(chunk.drafts), accepted)
        if samples and not sequence.forked:
            self._fork(sequence, logits, now, finished)
        if kept:
            self._emit(sequence, kept, now, finished)
        return {
            "request_id": sequence.request.request_id,
            "index": sequence.index,
            "kind": kind,
            "start": chunk.start,
            "num_tokens": chunk.num_tokens,
            "drafted": len(chunk.drafts),
            "accepted": accepted,
            "emitted": len(kept),
        }

    def _choose(self, sequence: Sequence, logits: Tensor, likeliest: list[int]) -> list[int]:
        """The token after each of the chunk's last positions, as if each draft before it were right."""
        params = sequence.request.params
        if params.temperature == 0:
            return likeliest
        first = len(sequence.token_ids) - sequence.num_prompt_tokens
        return sample(logits, params, [sequence.uniform(first + i) for i in range(logits.shape[0])])

    def _fork(self, parent: Sequence, logits: Tensor, now: float, finished: list) -> None:
        """The prompt is computed: its other continuations branch off, share its blocks, and draw their first token."""
        parent.forked = True
        for child in [s for s in self._groups[parent.request.request_id].live if s is not parent]:
            child.forked = True
            for name in ("first_scheduled", "cached_tokens"):
                setattr(child.metrics, name, getattr(parent.metrics, name))
            self.scheduler.fork(parent, child)
            self._emit(child, self._choose(child, logits, []), now, finished)

    def _until_end(self, sequence: Sequence, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends the sequence, that one included."""
        params = sequence.request.params
        room = params.max_tokens - (len(sequence.token_ids) - sequence.num_prompt_tokens)
        room = min(room, self.max_model_len - len(sequence.token_ids))
        for i, token in enumerate(tokens[:room]):
            if self._is_end(token, params):
                return tokens[: i + 1]
        return tokens[:room]

    def _is_end(self, token: int, params: SamplingParams) -> bool:
        return token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)

    def _emit(self, sequence: Sequence, tokens: list[int], now: float, finished: list) -> None:
        """Append new tokens; finish the sequence if they end it."""
        params, text = sequence.request.params, sequence.text
        reason = None
        taken = []
        for token in tokens:
            taken.append(token)
            if text is not None and text.push(token):
                reason = "stop"
                break
        sequence.token_ids.extend(taken)
        self.stats.output_tokens += len(taken)
        if sequence.metrics.first_token is None:
            sequence.metrics.first_token = now
        num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
        if reason is None and self._is_end(taken[-1], params):
            reason = "stop"
        if reason is None and (num_output == params.max_tokens or len(sequence.token_ids) >= self.max_model_len):
            reason = "length"
        deltas = self._groups[sequence.request.request_id].deltas
        if reason is not None:
            self._finish(sequence, reason, now)
            finished.append(sequence.seq_id)
        if deltas is not None:
            if reason is not None and text is not None:
                text.finish()
            piece = None if text is None else text.take(final=reason is not None)
            deltas.append(Delta(sequence.index, piece, taken, reason))

    def _finish(self, sequence: Sequence, reason: str, now: float) -> None:
        self.scheduler.remove(sequence)
        self._forget_drafts(sequence)
        group = self._groups[sequence.request.request_id]
        group.live.remove(sequence)
        if not group.live:
            del self._groups[sequence.request.request_id]
        output = sequence.output_ids
        sequence.metrics.finished = now
        sequence.metrics.output_tokens = len(output)
        if reason == "cancelled":
            self.stats.cancelled += 1
        else:
            self.stats.finished += 1
        if group.deltas is None:
            text = self._text(sequence, output)
            self._done.append(
                Completion(sequence.request.request_id, sequence.index, text, output, reason, sequence.metrics)
            )

    def _text(self, sequence: Sequence, output: list[int]) -> str | None:
        if self.tokenizer is None:
            return None
        if sequence.text is not None:
            return sequence.text.finish()
        return self.tokenizer.decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _count_drafts(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        for counts in (sequence.metrics, self.stats):
            counts.draft_tokens += drafted
            counts.accepted_tokens += accepted
        if self.speculator:
            self.speculator.observe(sequence, drafted, accepted)

    def _forget_drafts(self, sequence: Sequence) -> None:
        if self.speculator:
            self.speculator.forget(sequence)

    def _recover(self) -> None:
        """A step broke off: what the pages hold is unknown. Start with empty ones; every sequence has its tokens."""
        for sequence in self.scheduler.running:
            self._forget_drafts(sequence)
        self.scheduler.restart(self._new_manager())

    # ------------------------------------------------------------ conveniences on top of the loop

    def generate(
        self,
        prompts: str | list[int] | Iterable[str | list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue all prompts; returns their completions in order (n for each prompt).

        Args:
            prompts: strings or lists of token ids; a single prompt is a batch of one.
            params: for all, or one for each.
            progress: show a bar.

        Raises ValueError or TypeError as `add_request`, naming the prompt; then none of them was started.
        """
        prompts = _as_list(prompts)
        each = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params must be one, or one for each of the {len(prompts)} prompts, got {len(each)}")
        requests = []
        for i, (prompt, p) in enumerate(zip(prompts, each)):
            try:
                requests.append(self._make_request(prompt, p))
            except (ValueError, TypeError) as error:
                raise type(error)(f"prompts[{i}]: {error}") from error
        for request in requests:
            self._enqueue(request)
        mine = {request.request_id for request in requests}
        done: dict[tuple[str, int], Completion] = {}
        try:
            with tqdm(total=sum(r.params.n for r in requests), disable=not progress, unit="completion") as bar:
                while not mine.isdisjoint(self._groups) or any(c.request_id in mine for c in self._done):
                    self._advance()
                    for completion in [c for c in self._done if c.request_id in mine]:
                        done[completion.request_id, completion.index] = completion
                        bar.update()
                    self._done = [c for c in self._done if c.request_id not in mine]  # others' wait for their step
        except BaseException:
            for request_id in mine & self._groups.keys():
                self.cancel(request_id)
            self._done = [c for c in self._done if c.request_id not in mine]
            raise
        return [done[request.request_id, i] for request in requests for i in range(request.params.n)]

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> Iterator[Delta]:
        """Continue one prompt and yield its tokens and text as they come. Other requests advance with it.

        Dropping the iterator cancels the request. Raises as `add_request`, at the call.
        """
        return self._stream(self._make_request(prompt, params))

    def _stream(self, request: Request) -> Iterator[Delta]:
        self._enqueue(request, streamed=True)
        group = self._groups[request.request_id]
        try:
            while group.live or group.deltas:
                while group.deltas:
                    yield group.deltas.popleft()
                if group.live:
                    self._advance()
        finally:
            if request.request_id in self._groups:
                self.cancel(request.request_id)

    def check_integrity(self) -> None:
        """Recount every block. Raises IntegrityError when the books do not balance, or blocks leaked."""
        self.manager.check_integrity()
        running = {sequence.seq_id for sequence in self.scheduler.running}
        if set(self.manager.sequence_ids) != running:
            raise IntegrityError(f"blocks belong to {set(self.manager.sequence_ids) ^ running}, running: {running}")

    # ------------------------------------------------------------ checks

    def _make_request(
        self,
        prompt: str | Iterable[int],
        params: SamplingParams | None,
        request_id: str | None = None,
        arrival: float | None = None,
    ) -> Request:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
        if request_id is None:
            request_id = f"request-{self._next_id}"
            self._next_id += 1
        elif not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {request_id!r}")
        if request_id in self._groups:
            raise ValueError(f"request_id {request_id!r} is taken by an unfinished request")
        tokens = self._token_ids(prompt)
        self._check_fits(tokens, params)
        return Request(request_id, tokens, params, self.clock() if arrival is None else arrival)

    def _token_ids(self, prompt: str | Iterable[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a prompt of text needs a tokenizer; this engine has none: pass token ids")
            tokens = list(self.tokenizer(prompt)["input_ids"])
        else:
            try:
                tokens = [operator.index(token) for token in prompt]
            except TypeError:
                raise TypeError(f"a prompt must be a string or token ids, got {prompt!r:.80}") from None
        if not tokens:
            raise ValueError("the prompt is empty; it needs at least one token")
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is not in the vocabulary, 0 to {self.vocab_size - 1}")
        return tokens

    def _check_fits(self, tokens: list[int], params: SamplingParams) -> None:
        if len(tokens) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; the context of {self.max_model_len} must hold it and one more"
            )
        most = min(len(tokens) + params.max_tokens - 1, self.max_model_len)  # the last token is never computed
        capacity = self.manager.num_blocks * self.manager.block_size
        if math.ceil(most / self.manager.block_size) > self.manager.num_blocks:
            raise ValueError(
                f"prompt and output take up to {most} tokens, and all pages together hold {capacity}: "
                f"shorten the prompt, lower max_tokens={params.max_tokens}, or give the engine more blocks"
            )
        if params.n > self.scheduler.max_num_seqs:
            raise ValueError(f"n={params.n} is more than max_num_seqs={self.scheduler.max_num_seqs}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; this engine has none: use stop_token_ids")

    def _enqueue(self, request: Request, streamed: bool = False) -> None:
        if request.request_id in self._groups:
            raise ValueError(f"request_id {request.request_id!r} is taken by an unfinished request")
        watched = self.tokenizer is not None and (streamed or bool(request.params.stop))
        live = []
        for index in range(request.params.n):
            text = Detokenizer(self.tokenizer, request.params.stop) if watched else None
            metrics = RequestMetrics(request.arrival, prompt_tokens=len(request.prompt_token_ids))
            live.append(Sequence(request, index, list(request.prompt_token_ids), metrics, text))
        live[0].forked = request.params.n == 1
        self._groups[request.request_id] = _Group(request, live, deque() if streamed else None)
        self.stats.prompt_tokens += len(request.prompt_token_ids)
        self.scheduler.add(live[0])


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    is_one_prompt = bool(prompts) and all(hasattr(p, "__index__") for p in prompts)
    return [prompts] if is_one_prompt else prompts


def _end_of_sequence(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that `model.generate` stops at."""
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, (list, tuple)) else [ids])
    return frozenset()
