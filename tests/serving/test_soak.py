"""Many requests through tiny memory with random cancellations: nothing leaks, nothing is lost."""

import random

import pytest

from optinfer.serving import Engine, SamplingParams


def soak(model, scripted, num_requests, seed):
    rng = random.Random(seed)
    engine = Engine(model, num_blocks=24, block_size=4, max_batched_tokens=24, max_num_seqs=12, log_steps=0,
                    draft="prompt_lookup", adaptive_drafts=False)  # fmt: skip
    scripted(engine, lambda text: 2 if hash((len(text), text[-1])) % 17 == 0 else 3 + (text[-1] * 7 + len(text)) % 40)
    outstanding, reported, cancelled, expected, added = set(), {}, set(), {}, 0
    while added < num_requests or engine.has_work:
        for _ in range(rng.choice((0, 0, 1, 2))):
            if added < num_requests and len(outstanding) < 40:
                n = rng.choice((1, 1, 1, 2, 3))
                params = SamplingParams(max_tokens=rng.randint(1, 12), n=n, temperature=0.0 if n == 1 else 1.0)
                prompt = rng.choice(([], [9] * 8, list(range(5, 17)))) + [
                    rng.randint(3, 96) for _ in range(rng.randint(1, 20))
                ]
                request_id = engine.add_request(prompt, params)
                outstanding.add(request_id)
                expected[request_id] = n
                added += 1
        if outstanding and rng.random() < 0.1:
            victim = rng.choice(sorted(outstanding))
            if victim in engine.request_ids:
                engine.cancel(victim)
                cancelled.add(victim)
        for done in engine.step():
            reported.setdefault(done.request_id, {})[done.index] = done.finish_reason
            if len(reported[done.request_id]) == expected[done.request_id]:
                outstanding.discard(done.request_id)
        if rng.random() < 0.05:
            engine.check_integrity()
    engine.check_integrity()
    assert {r: set(parts) for r, parts in reported.items()} == {r: set(range(n)) for r, n in expected.items()}
    for request_id, parts in reported.items():
        assert set(parts.values()) <= {"stop", "length", "cancelled"}
        assert ("cancelled" in parts.values()) <= (request_id in cancelled)
    assert engine.manager.num_free_blocks == engine.manager.num_blocks
    assert not engine.request_ids and not engine.has_work and not any(draft._own for draft in engine.speculator.drafts)
    return engine.stats, len(cancelled)


def test_soak(model, scripted):
    stats, cancelled = soak(model, scripted, 300, seed=random.randrange(10**6))
    assert stats.preemptions > 0 and cancelled > 0


@pytest.mark.nightly
def test_soak_of_10_000(model, scripted):
    stats, cancelled = soak(model, scripted, 10_000, seed=0)
    print(stats, "requests cancelled:", cancelled)
    assert stats.preemptions > 1000 and cancelled > 100
