"""What goes into the engine and what comes out: parameters, requests, completions and their metrics."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from optinfer.speculative.draft_length import Acceptance


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this, in (0, 1].
        min_p: drop tokens less likely than this share of the likeliest one, in [0, 1].
        n: independent continuations of the prompt; it is computed once and its blocks are shared.
        seed: continuation i draws from a generator of its own, seeded from `(seed, i)`, so that a sample
            depends on nothing but its request. None: a fresh seed.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: token ids that end a continuation, besides the model's own end-of-sequence.
        ignore_eos: generate to `max_tokens` whatever the model says (for benchmarks).

    Raises:
        ValueError, TypeError: a value outside these ranges, or parameters that contradict each other.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, least in (("max_tokens", 1), ("n", 1), ("top_k", 0)):
            _check(_is_index(getattr(self, name)), name, getattr(self, name), "an integer", TypeError)
            _check(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        for name in ("temperature", "top_p", "min_p"):
            _check(isinstance(getattr(self, name), (int, float)), name, getattr(self, name), "a number", TypeError)
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more, and finite")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _check(self.seed is None or _is_index(self.seed), "seed", self.seed, "an integer or None", TypeError)
        _check(all(isinstance(s, str) for s in stop), "stop", stop, "strings", TypeError)
        _check(all(stop), "stop", stop, "without empty strings: they would match everywhere")
        _check(all(map(_is_index, self.stop_token_ids)), "stop_token_ids", self.stop_token_ids, "integers", TypeError)
        filters = self.top_k or self.top_p < 1 or self.min_p
        if self.temperature == 0 and filters:
            raise ValueError("top_k, top_p and min_p choose what to sample from, but temperature=0 samples nothing")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n={self.n} greedy continuations would all be the same; set a temperature above 0")


def _check(ok: bool, name: str, value: Any, allowed: str, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(f"{name} must be {allowed}, got {value!r}")


def _is_index(value: Any) -> bool:
    return hasattr(type(value), "__index__") and not isinstance(value, bool)


@dataclass
class RequestMetrics:
    """What happened to one continuation. Times are in seconds; points in time are the engine's clock."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache when first admitted
    preemptions: int = 0
    recomputed_tokens: int = 0  # computed again after a preemption
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between tokens, after the first."""
        if self.first_token is None or self.finished is None or self.output_tokens < 2:
            return None
        return (self.finished - self.first_token) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Completion:
    """A finished continuation. `finish_reason`: "stop" (end of sequence, stop string or token), "length"
    (`max_tokens` or the context is full), "cancelled", or "error", and then `error` says what went wrong."""

    request_id: str
    index: int  # 0 to n-1
    text: str | None  # None without a tokenizer
    token_ids: list[int]
    finish_reason: str
    metrics: RequestMetrics
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of a stream: what is new since the last one. `text` never ends inside a character or a stop string."""

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. Requests share cached prefixes only within the same `salt`."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: float
    salt: str = ""


@dataclass(eq=False)
class Sequence:
    """One continuation of a request: its tokens, and how many of them have keys and values in the pages.

    There is no prefill phase and no decode phase. A sequence has tokens that are not computed yet: the whole prompt
    at first, everything again after a preemption, one token while decoding.
    """

    request: Request
    index: int
    token_ids: list[int]
    metrics: RequestMetrics
    text: Any = None  # a Detokenizer, where text is needed before the end
    num_computed: int = 0
    forked: bool = False  # all n continuations have their own blocks
    high_water: int = 0  # most tokens ever computed, to count what preemption throws away
    acceptance: Acceptance = field(default_factory=Acceptance)  # of drafts, in this text
    generator: torch.Generator | None = None
    uniforms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        params = self.request.params
        if params.temperature > 0 and self.generator is None:
            self.generator = torch.Generator()
            if params.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed((int(params.seed) * 1_000_003 + self.index) % 2**63)

    @property
    def seq_id(self) -> tuple[str, int]:
        return self.request.request_id, self.index

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is missing from the pages."""
        return self.num_uncomputed == 1 and len(self.token_ids) > self.num_prompt_tokens

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) that decides output token `position`: the same however often it is asked."""
        while len(self.uniforms) <= position:
            self.uniforms.append(torch.rand((), generator=self.generator, dtype=torch.float64, device="cpu").item())
        return self.uniforms[position]
