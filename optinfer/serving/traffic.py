"""Requests that come when they come, and what a promise about latency costs.

A trace of arrivals is served twice by the same code, `serve`: by the engine, in real time, or by a `Rehearsal`: the same
scheduler, block manager and bookkeeping, with a clock that a step moves on by what it would cost. So queues, chunks,
preemptions and prefix hits of the forecast are real; only the seconds of a step come from a formula, fitted to steps that the
engine really made.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optinfer.kv_cache import BlockManager
from optinfer.serving.intake import Intake, Prompt
from optinfer.serving.loop import Loop
from optinfer.serving.output import Output
from optinfer.serving.paged_batch import Chunk
from optinfer.serving.records import EngineStats, StepRecord
from optinfer.serving.request import Completion, RequestMetrics, SamplingParams
from optinfer.serving.scheduler import Policy, Scheduler
from optinfer.serving.turns import Interrupts

if TYPE_CHECKING:
    from optinfer.serving.engine import Engine

# ---------------------------------------------------------------------------------------------- arrivals


@dataclass(frozen=True)
class Arrival:
    """A prompt, how many tokens to generate (exactly), and when it comes, in seconds from the start."""

    time: float
    token_ids: tuple[int, ...]
    max_tokens: int


def arrival_times(rate: float, count: int, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """When requests come: gaps are drawn from a gamma distribution of mean 1/rate, and scaled so that this trace has the rate.

    (Short traces differ in their rates by a quarter and more; comparing two of them would compare that.)

    Args:
        rate: requests per second.
        burstiness: shape of the distribution, as in vLLM's benchmark: 1 is Poisson traffic, below 1 requests come in bursts
            (the gaps' deviation is 1/√burstiness of their mean), above 1 more evenly.

    Raises ValueError: an argument is not positive.
    """
    for name, value in (("rate", rate), ("count", count), ("burstiness", burstiness)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
    rng = random.Random(seed)
    times = list(itertools.accumulate(rng.gammavariate(burstiness, 1.0) for _ in range(count)))
    return [time * count / (rate * times[-1]) for time in times]


# ---------------------------------------------------------------------------------------------- what a step costs


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: `step` for being one, `token` for each token computed, `pair` for each token that one looks back at.

    Call it with [(number of tokens, tokens of the sequence then), …]: one pair per sequence of the step.
    """

    step: float
    token: float = 0.0
    pair: float = 0.0

    def __call__(self, chunks: Iterable[tuple[int, int]]) -> float:
        return float(np.dot(_features(chunks), (self.step, self.token, self.pair)))

    @classmethod
    def fit(cls, log: list[StepRecord]) -> "StepCost":
        """The formula nearest to recorded steps, by squares of relative errors; no cost is below zero.

        Raises ValueError: there are fewer than three steps.
        """
        if len(log) < 3:
            raise ValueError(f"three steps are needed to fit three costs, got {len(log)}")
        seconds = np.array([record.seconds for record in log])
        rows = np.array([_features(_chunks(record)) for record in log]) / seconds[:, None]
        best, least = (0.0, 0.0, 0.0), math.inf
        # Few enough to try: with some costs at zero, the best others are an ordinary least-squares problem.
        for used in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
            found = np.linalg.lstsq(rows[:, used], np.ones(len(log)), rcond=None)[0]
            error = float(np.square(rows[:, used] @ found - 1).sum())
            if (found >= 0).all() and error < least:
                costs = dict(zip(used, found.tolist()))
                best, least = (costs.get(0, 0.0), costs.get(1, 0.0), costs.get(2, 0.0)), error
        return cls(*best)


def _features(chunks: Iterable[tuple[int, int]]) -> tuple[float, float, float]:
    """(steps, tokens, looks back): token number i of a sequence looks at i tokens, itself included."""
    tokens = pairs = 0
    for count, end in chunks:
        tokens += count
        pairs += count * end - count * (count - 1) // 2
    return 1.0, float(tokens), float(pairs)


def _chunks(record: StepRecord) -> list[tuple[int, int]]:
    counts = ((chunk.num_tokens + chunk.drafted, chunk.start) for chunk in record.chunks)
    return [(count, start + count) for count, start in counts]


# ---------------------------------------------------------------------------------------------- serving a trace


class VirtualClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class _PricedSteps:
    """Stands in for the model: a step moves the clock on by its cost, and every token is 0."""

    def __init__(self, cost: Callable[[Iterable[tuple[int, int]]], float], clock: VirtualClock):
        self.cost, self.clock = cost, clock

    def run(self, chunks: list[Chunk], num_logits: list[int], copies: Any = ()) -> torch.Tensor:
        self.clock.wait(self.cost((len(chunk.token_ids), chunk.end) for chunk in chunks))
        return torch.zeros(sum(num_logits), 2)

    def is_current(self) -> bool:
        return True


class Rehearsal:
    """The engine without its model: requests go through the real scheduler, and steps cost what a formula says.

    Args:
        cost: seconds of a step, usually a `StepCost`.
        num_blocks, block_size, prefix_caching, max_batched_tokens, max_num_seqs, policy, chunked_prefill: as of `Engine`.
    """

    def __init__(
        self,
        cost: Callable[[Iterable[tuple[int, int]]], float],
        num_blocks: int,
        block_size: int = 16,
        *,
        prefix_caching: bool = True,
        max_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        policy: Policy = "continuous",
        chunked_prefill: bool = True,
    ):
        def new_manager() -> BlockManager:
            return BlockManager(num_blocks, block_size, prefix_caching, record_events=False)

        self.clock = VirtualClock()
        self.scheduler = Scheduler(new_manager(), max_batched_tokens, max_num_seqs, policy, chunked_prefill)
        self.stats = EngineStats()
        self._output = Output(self.scheduler, None, frozenset(), 2**31, self.stats)
        self._intake = Intake(None, 2**31, 2**31, num_blocks, block_size, max_num_seqs)
        runner: Any = _PricedSteps(cost, self.clock)
        self._loop = Loop(
            self.scheduler, runner, self._output, None, new_manager, Interrupts(), self.clock, log_steps=10**9
        )  # fmt: skip
        self._done: list[Completion] = []

    @property
    def log(self) -> list[StepRecord]:
        return self._loop.log

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def manager(self) -> BlockManager:
        return self.scheduler.manager

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        arrival: float | None = None,
    ) -> str:
        """As `Engine.add_request`."""
        request = self._intake.request(prompt, params, request_id, arrival=self.clock() if arrival is None else arrival)
        self._output.add(request, self._done)
        return request.request_id

    def step(self) -> list[Completion]:
        """As `Engine.step`."""
        if self.scheduler.has_work:
            self._loop.step()
        done = self._done[:]
        self._done.clear()
        return done


def serve(engine: "Engine | Rehearsal", trace: list[Arrival]) -> list[RequestMetrics]:
    """Hand each request to the engine when its time has come, and step until all are done.

    Args:
        engine: an `Engine`, which is served in real time, or a `Rehearsal`; idle.
        trace: in the order of arrival.

    Returns: the requests' metrics in the trace's order. Times are in seconds of the engine's clock.
    """
    clock = engine.clock
    wait = clock.wait if isinstance(clock, VirtualClock) else time.sleep
    start, waiting = clock(), list(reversed(trace))
    ids: list[str] = []
    done: dict[str, RequestMetrics] = {}
    while len(done) < len(trace):
        while waiting and start + waiting[-1].time <= clock():
            request = waiting.pop()
            params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
            ids.append(engine.add_request(list(request.token_ids), params, arrival=start + request.time))
        if engine.has_work:
            for completion in engine.step():
                done[completion.request_id] = completion.metrics
        else:
            wait(max(0.0, start + waiting[-1].time - clock()))
    return [done[request_id] for request_id in ids]


# ---------------------------------------------------------------------------------------------- promises


@dataclass(frozen=True)
class Promise:
    """Most seconds to the first token, and most seconds per token after it."""

    ttft: float
    tpot: float

    def kept(self, metrics: RequestMetrics) -> bool:
        first, between = metrics.time_to_first_token, metrics.time_per_output_token
        return first is not None and first <= self.ttft and (between is None or between <= self.tpot)


@dataclass(frozen=True)
class Service:
    """What users got. Percentiles {50, 90, 99} in seconds; `goodput`: requests per second whose promise was kept;
    `throughput`: requests per second at all."""

    ttft: dict[int, float]
    tpot: dict[int, float]
    throughput: float
    goodput: float
    kept: float

    @classmethod
    def of(cls, metrics: list[RequestMetrics], promise: Promise) -> "Service":
        """Raises ValueError: a request is not finished, or there is none."""
        ends = [m.finished for m in metrics if m.finished is not None]
        if not metrics or len(ends) < len(metrics):
            raise ValueError(f"{len(metrics) - len(ends)} of {len(metrics)} requests are not finished")
        seconds = max(ends) - min(m.arrival for m in metrics)
        kept = sum(map(promise.kept, metrics))
        return cls(
            _percentiles([m.time_to_first_token for m in metrics]),
            _percentiles([m.time_per_output_token for m in metrics]),
            len(metrics) / seconds,
            kept / seconds,
            kept / len(metrics),
        )


def _percentiles(values: list[float | None]) -> dict[int, float]:
    known = [value for value in values if value is not None]
    return {p: float(np.percentile(known, p)) if known else math.nan for p in (50, 90, 99)}


def knee(
    serve_at: Callable[[float], Service], lowest: float, highest: float, share: float = 0.9, steps: int = 8
) -> float:
    """The highest rate of requests at which at least `share` of them get what was promised, found by halving.

    Args:
        serve_at: serves a trace of this rate, e.g. by a `Rehearsal`. Use one seed for all rates.
        lowest, highest: rates, requests per second.

    Returns: the rate, within (highest - lowest) / 2**steps; `lowest` if the promise is broken there, `highest` if it never is.
    """
    if not 0 < lowest < highest:
        raise ValueError(f"rates must be 0 < lowest < highest, got {lowest!r} and {highest!r}")
    if serve_at(highest).kept >= share:
        return highest
    for _ in range(steps):
        middle = (lowest + highest) / 2
        lowest, highest = (middle, highest) if serve_at(middle).kept >= share else (lowest, middle)
    return lowest
