"""The engine: requests in, tokens out, for any number of threads."""

import functools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from optinfer.kv_cache import BlockManager, num_blocks_for
from optinfer.kv_cache.attention import Backend
from optinfer.quantization.schemes import SchemeName
from optinfer.serving.intake import Intake, Message, Prompt
from optinfer.serving.loop import Loop
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.output import Output, end_of_sequence
from optinfer.serving.records import EngineStats, StepRecord
from optinfer.serving.request import Completion, Delta, Request, SamplingParams
from optinfer.serving.scheduler import Policy, Scheduler
from optinfer.serving.speculation import Speculator, batch_drafts
from optinfer.serving.turns import FairLock, Interrupts
from optinfer.speculative.by_name import DraftLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DEFAULT_KV_BYTES = 2**29


class Engine:
    """Serves one transformers model to many requests at once.

    The model stays its owner's: it can be trained, moved, or called beside the engine. A weight or adapter that changed is
    noticed before the next step; what was computed with the old ones is forgotten, and unfinished requests go on with the new.

    Threads may share an engine: each step computes for all requests, and calls take turns in the order in which they
    came. In asyncio: ``await asyncio.to_thread(engine.generate, prompts)``.

    Args:
        model: a decoder from transformers, quantized or not. It is tried out before anything is served, see `examine`.
        tokenizer: for prompts and results as text; None: token ids only.
        num_blocks: pages of the KV cache. Default: half a GiB of them.
        block_size: tokens per page.
        draft: who guesses tokens ahead, as in `speculative_decoding` (see `as_draft`): a name such as "prompt_lookup", a
            smaller model, a drafter, or a list of them; None: nobody. Drafters of trees (`HeadTree`, `LookupTree`) have theirs
            checked in one pass.
        num_draft_tokens: tokens drafted per step and sequence, at most; of a tree, along one branch.
        adaptive_drafts: draft only as far as the measured cost of a step says that it pays.
        max_batched_tokens, max_num_seqs, policy, chunked_prefill: see `Scheduler`.
        prefix_caching: requests that begin alike share pages.
        max_model_len: longest prompt plus output; default: what the model's config allows.
        fuse, head, attention_backend, kv_dtype, cuda_graphs, compile: see `ModelRunner`.
        log_steps: the log keeps the records of this many steps, the newest; 0: none.
        clock: seconds, for metrics and the log.

    Raises:
        UnsupportedModel: the model needs something that is not done here; the message says what.
        ValueError: parameters that cannot be.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        draft: "DraftLike | None" = None,
        *,
        num_draft_tokens: int = 5,
        adaptive_drafts: bool = True,
        max_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        policy: Policy = "continuous",
        chunked_prefill: bool = True,
        prefix_caching: bool = True,
        max_model_len: int | None = None,
        fuse: bool = True,
        head: SchemeName | None = None,
        attention_backend: Backend = "auto",
        kv_dtype: torch.dtype | None = None,
        cuda_graphs: bool | None = None,
        compile: bool = False,
        log_steps: int = 10_000,
        clock: Callable[[], float] = time.perf_counter,
    ):
        config = model.config.get_text_config()
        self.model, self.tokenizer, self.clock = model, tokenizer, clock
        embeddings: Any = model.get_input_embeddings()  # torch takes a module's attributes for tensors
        self.vocab_size: int = embeddings.weight.shape[0]
        self.max_model_len: int = max_model_len or getattr(config, "max_position_embeddings", None) or 2**31
        if num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens must be at least 1, got {num_draft_tokens}")
        if num_blocks is None:
            num_blocks = max(1, num_blocks_for(_DEFAULT_KV_BYTES, config, kv_dtype or model.dtype, block_size))
        new_manager = functools.partial(BlockManager, num_blocks, block_size, prefix_caching, record_events=False)
        self.scheduler = Scheduler(new_manager(), max_batched_tokens, max_num_seqs, policy, chunked_prefill)
        self.runner = ModelRunner(
            model, num_blocks, block_size, fuse, head, attention_backend, kv_dtype, cuda_graphs, compile, max_num_seqs,
            min(self.max_model_len, num_blocks * block_size),
        )  # fmt: skip
        self.speculator = None
        if draft is not None:
            longest = self.runner.max_length
            drafts = batch_drafts(draft, model, num_blocks, block_size, longest, any(self.runner.windows))
            self.speculator = Speculator(drafts, num_draft_tokens, adaptive_drafts, longest, clock)
            self.runner.keep_hidden = self.speculator.needs_hidden

        self.stats = EngineStats()
        self._lock, self._interrupts = FairLock(), Interrupts()
        self._intake = Intake(tokenizer, self.vocab_size, self.max_model_len, num_blocks, block_size, max_num_seqs)
        eos = end_of_sequence(model, tokenizer)
        self._output = Output(self.scheduler, tokenizer, eos, self.max_model_len, self.stats)
        self._loop = Loop(
            self.scheduler, self.runner, self._output, self.speculator, new_manager, self._interrupts, clock, log_steps
        )  # fmt: skip
        self._done: list[Completion] = []  # of requests that were added, until a step returns them
        self._abandoned: deque[str] = deque()  # streams that were dropped while somebody had the turn

    # ------------------------------------------------------------ requests

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        arrival: float | None = None,
        *,
        salt: str = "",
    ) -> str:
        """Queue a request; `step` works on it. Returns its id.

        Args:
            prompt: one prompt, of any kind that `generate` takes.
            arrival: when it came, in seconds of the engine's clock; None: now.
            salt: requests share cached prefixes only within the same salt (one per tenant, say).

        Raises:
            ValueError, TypeError: the prompt is empty, too long for the context or for the pages, holds an unknown
                token, or the id is taken. The message says which; the engine is unchanged.
        """
        with self._turn():
            arrival = self.clock() if arrival is None else arrival
            request = self._intake.request(prompt, params, request_id, arrival=arrival, salt=salt)
            self._output.add(request, self._done)
            return request.request_id

    def cancel(self, request_id: str) -> None:
        """End a request now; its continuations are reported with finish_reason "cancelled" by the next step, or by the
        stream that it belongs to.

        Raises UnknownRequest: there is no such request, or not any more.
        """
        with self._turn():
            self._loop.cancel(request_id)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        progress: bool = False,
        *,
        salt: str = "",
    ) -> list[Completion]:
        """Continue all prompts; returns their completions in order (n for each prompt).

        Args:
            prompts: one prompt or several: strings, lists of token ids, arrays or tensors [length] or [prompts, length], what a
                tokenizer returns, {"prompt": text}, {"prompt_token_ids": ids}; see `Intake.read`.
            params: for all, or one for each.
            progress: show a bar.
            salt: as in `add_request`.

        Raises ValueError or TypeError as `add_request`, naming the prompt; then none of them was started.
        """
        if isinstance(prompts, Iterator):
            prompts = list(prompts)
        tokens = [] if isinstance(prompts, (list, tuple)) and not prompts else self._intake.read(prompts)
        each = list(params) if isinstance(params, (list, tuple)) else [params] * len(tokens)
        if len(each) != len(tokens):
            raise ValueError(f"params must be one, or one for each of the {len(tokens)} prompts, got {len(each)}")
        requests: list[Request] = []
        done: list[Completion] = []
        try:
            with self._turn():
                for i, (prompt, p) in enumerate(zip(tokens, each)):
                    try:
                        requests.append(self._intake.make(prompt, p, None, arrival=self.clock(), salt=salt))
                    except (ValueError, TypeError) as error:
                        raise type(error)(f"prompts[{i}]: {error}") from error
                for request in requests:
                    self._output.add(request, done)
            with tqdm(total=sum(r.params.n for r in requests), disable=not progress, unit="completion") as bar:
                while self._advance(requests):
                    bar.update(len(done) - bar.n)
                bar.update(len(done) - bar.n)
        except BaseException:
            with self._turn():
                for request in requests:
                    if request.request_id in self._output.groups:
                        self._loop.cancel(request.request_id)
            raise
        found = {(completion.request_id, completion.index): completion for completion in done}
        return [found[request.request_id, i] for request in requests for i in range(request.params.n)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | list[SamplingParams] | None = None,
        progress: bool = False,
        *,
        salt: str = "",
        **template: Any,
    ) -> list[Completion]:
        """Answer a conversation, a list of {"role", "content"}, or several; otherwise as `generate`.

        Args:
            template: options of the tokenizer's `apply_chat_template`.

        Raises ValueError: there is no tokenizer, or it has no chat template.
        """
        if self.tokenizer is None or getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError("chat needs a tokenizer with a chat template; this engine has none")
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        options = {"add_generation_prompt": True, **template, "tokenize": False}
        texts = [self.tokenizer.apply_chat_template(conversation, **options) for conversation in conversations]
        tokens = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return self.generate(tokens, params, progress, salt=salt)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, salt: str = ""
    ) -> Generator[Delta, None, None]:
        """Continue one prompt and yield its tokens and text as they come. Other requests advance with it.

        Dropping the iterator cancels the request. Raises as `add_request`, at the call.
        """
        request = self._intake.request(prompt, params, arrival=self.clock(), salt=salt)
        return self._stream(request)

    def _stream(self, request: Request) -> Generator[Delta, None, None]:
        try:
            with self._turn():
                group = self._output.add(request, None)
            while group.live or group.deltas:
                while group.deltas:
                    yield group.deltas.popleft()
                self._advance([request])
        finally:
            self._abandon(request.request_id)

    def _abandon(self, request_id: str) -> None:
        """A reader is gone. Python may say so in the middle of anything, even of a step: then the next turn cancels."""
        self._abandoned.append(request_id)
        with self._interrupts.deferred():
            if self._lock.acquire(blocking=False):
                try:
                    self._cancel_abandoned()
                finally:
                    self._lock.release()

    # ------------------------------------------------------------ the loop

    def step(self) -> list[Completion]:
        """Compute one batch; returns the continuations of added requests that finished since the last step.

        If the model raises (out of memory, an interrupt), no request is lost: all are computed again from their tokens.
        """
        with self._turn():
            if self.scheduler.has_work:
                self._loop.step()
        done = self._done[:]  # an interrupt was raised before this line; none comes between these two
        del self._done[: len(done)]
        return done

    def _advance(self, requests: list[Request]) -> bool:
        """One step for all, unless none of these requests needs one; whether there was one."""
        with self._turn():
            if not any(request.request_id in self._output.groups for request in requests):
                return False
            self._loop.step()
            return True

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Running requests are computed again from their tokens."""
        with self._turn():
            self._loop.restart()

    def _cancel_abandoned(self) -> None:
        while self._abandoned:
            if (request_id := self._abandoned.popleft()) in self._output.groups:
                self._loop.cancel(request_id)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This thread's turn. An interrupt waits for its end, except where the model computes."""
        with self._interrupts.deferred():
            self._lock.acquire()
            try:
                self._cancel_abandoned()
                yield
            finally:
                self._lock.release()

    # ------------------------------------------------------------ looking

    @property
    def log(self) -> list[StepRecord]:
        """The newest steps, the oldest of them first."""
        return self._loop.log

    @property
    def has_work(self) -> bool:
        """A step would compute something or hand something over."""
        return self.scheduler.has_work or bool(self._done)

    @property
    def manager(self) -> BlockManager:
        return self.scheduler.manager

    @property
    def request_ids(self) -> list[str]:
        """Of the requests under way, the oldest first."""
        return list(self._output.groups)

    def check_integrity(self) -> None:
        """Recount every block. Raises IntegrityError when the books do not balance, or blocks leaked."""
        with self._turn():
            self._loop.check_integrity()
