"""Traffic: arrivals have their law, the rehearsal obeys queueing theory, and it decides exactly as the engine does."""

import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optinfer.serving import ChunkRecord, Engine, RequestMetrics, StepRecord
from optinfer.serving.traffic import (
    Arrival,
    Promise,
    Rehearsal,
    Service,
    StepCost,
    VirtualClock,
    arrival_times,
    knee,
    serve,
)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_that_is_asked_for(burstiness: float) -> None:
    times = np.array(arrival_times(5.0, 20_000, burstiness))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def one_at_a_time(cost: float) -> Rehearsal:
    """A server that needs `cost` seconds for each request and serves one after the other."""
    return Rehearsal(lambda chunks: cost, num_blocks=64, max_num_seqs=1, prefix_caching=False)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 2, allow_subnormal=False), min_size=1, max_size=30), st.floats(0.1, 1.5))
def test_one_server_waits_by_lindleys_recursion(gaps: list[float], cost: float) -> None:
    times = np.cumsum(gaps).tolist()
    found = serve(one_at_a_time(cost), [Arrival(t, (1, 2, 3), 1) for t in times])
    wait = 0.0
    for i, metrics in enumerate(found):
        if i:
            wait = max(0.0, wait + cost - (times[i] - times[i - 1]))
        assert metrics.time_to_first_token == pytest.approx(wait + cost, abs=1e-9)


def test_poisson_traffic_waits_as_pollaczek_and_khinchine_say() -> None:
    """M/D/1: mean wait = load x service / (2 (1 - load))."""
    cost, load = 1.0, 0.6
    found = serve(one_at_a_time(cost), [Arrival(t, (1,), 1) for t in arrival_times(load / cost, 6000, seed=3)])
    waits = [m.time_to_first_token - cost for m in found]
    assert statistics.mean(waits) == pytest.approx(load * cost / (2 * (1 - load)), rel=0.1)
    bursty = serve(one_at_a_time(cost), [Arrival(t, (1,), 1) for t in arrival_times(load / cost, 6000, 0.25, seed=3)])
    assert statistics.mean(m.time_to_first_token - cost for m in bursty) > 2 * statistics.mean(waits)


def make_trace(count: int, seed: int, longest: int = 30) -> list[Arrival]:
    rng = random.Random(seed)
    times = arrival_times(3.0, count, seed=seed)
    return [
        Arrival(t, tuple(rng.randrange(3, 90) for _ in range(rng.randint(1, longest))), rng.randint(1, 9))
        for t in times
    ]


@pytest.mark.parametrize("policy", ["continuous", "prefill_first", "static"])
def test_the_rehearsal_decides_as_the_engine_does(model, policy: str) -> None:
    """With its steps priced alike, the engine itself makes the same steps at the same times."""
    options = {"num_blocks": 14, "block_size": 4, "max_batched_tokens": 12, "max_num_seqs": 4, "policy": policy}
    cost = StepCost(0.1, 0.02, 0.001)
    trace = make_trace(12, seed=1)
    rehearsal = Rehearsal(cost, prefix_caching=False, **options)

    clock = VirtualClock()
    engine = Engine(model, clock=clock, prefix_caching=False, **options)
    run = engine.runner.run
    engine.runner.run = lambda chunks, *rest: (
        clock.wait(cost((len(c.token_ids), c.end) for c in chunks)),
        run(chunks, *rest),
    )[1]
    real, forecast = serve(engine, trace), serve(rehearsal, trace)
    assert [m.time_to_first_token for m in real] == pytest.approx([m.time_to_first_token for m in forecast])
    assert [m.finished for m in real] == pytest.approx([m.finished for m in forecast])
    assert [len(r.chunks) for r in engine.log] == [len(r.chunks) for r in rehearsal.log]
    assert sum(m.preemptions for m in real) == sum(m.preemptions for m in forecast)
    rehearsal.manager.check_integrity()


def test_a_fitted_cost_is_the_one_that_made_the_log() -> None:
    for wanted in (StepCost(0.02, 0.003, 1e-5), StepCost(0.02, 0.003), StepCost(0.0, 0.003, 2e-6)):
        rehearsal = Rehearsal(wanted, num_blocks=200)
        serve(rehearsal, make_trace(20, seed=2))
        found = StepCost.fit(rehearsal.log)
        assert (found.step, found.token, found.pair) == pytest.approx(
            (wanted.step, wanted.token, wanted.pair), abs=1e-8
        )


def test_costs_are_never_below_zero() -> None:
    """Steps that get cheaper with size: the nearest honest formula is a constant."""
    log = [
        StepRecord(i, 0.0, 1.0 / n, [ChunkRecord("a", 0, "prefill", 0, n)], [], [], 0, 1, 1)
        for i, n in enumerate((1, 2, 4, 8))
    ]
    found = StepCost.fit(log)
    assert found.token == found.pair == 0 and found.step > 0
    with pytest.raises(ValueError, match="three steps"):
        StepCost.fit(log[:2])


def metrics(ttft: float, total: float, tokens: int, arrival: float = 0.0) -> RequestMetrics:
    return RequestMetrics(arrival, arrival, arrival + ttft, arrival + total, output_tokens=tokens)


def test_goodput_counts_kept_promises() -> None:
    served = [metrics(0.5, 1.5, 11), metrics(2.0, 3.0, 11), metrics(0.5, 10.0, 11), metrics(0.5, 0.5, 1)]
    found = Service.of(served, Promise(ttft=1.0, tpot=0.1))
    assert found.kept == 0.5 and found.throughput == pytest.approx(0.4) and found.goodput == pytest.approx(0.2)
    assert found.ttft[50] == pytest.approx(np.percentile([0.5, 2, 0.5, 0.5], 50))
    assert found.tpot[99] == pytest.approx(np.percentile([0.1, 0.1, 0.95], 99))
    with pytest.raises(ValueError, match="1 of 1 requests are not finished"):
        Service.of([RequestMetrics(0.0)], Promise(1, 1))


def test_the_knee_of_a_deterministic_server() -> None:
    """Requests that come evenly at a rate below 1/cost never wait; above it the queue grows without end."""

    def at(rate: float) -> Service:
        return Service.of(serve(one_at_a_time(0.5), [Arrival(i / rate, (1,), 1) for i in range(200)]), Promise(0.75, 1))

    assert knee(at, 0.5, 8.0, steps=10) == pytest.approx(2.0, abs=0.02)
    assert knee(at, 0.5, 1.0) == 1.0


def test_chunks_shorten_the_tail_of_those_who_decode() -> None:
    """A long prompt in one step stops everybody; in chunks it does not."""
    trace = [Arrival(0.0, (5,) * 8, 60), Arrival(1.0, (6,) * 400, 2)]
    longest = {}
    for chunked in (True, False):
        rehearsal = Rehearsal(StepCost(0.05, 0.01), num_blocks=100, max_batched_tokens=32, chunked_prefill=chunked)
        serve(rehearsal, trace)
        longest[chunked] = max(record.seconds for record in rehearsal.log)
    assert longest[True] < 0.4 < 4 < longest[False]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rate must be positive"):
        arrival_times(0, 5)
    with pytest.raises(ValueError, match="lowest < highest"):
        knee(lambda rate: pytest.fail("nothing is measured"), 2.0, 1.0)
