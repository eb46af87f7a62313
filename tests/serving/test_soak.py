"""Many requests through tiny memory with cancellations, threads, interrupts and new weights: nothing leaks, nothing is lost."""

import copy
import itertools
import random
import threading

import pytest
import torch

from optinfer.serving import Engine, SamplingParams, UnknownRequest
from tests.serving.conftest import generate
from tests.serving.test_threads import InterruptedAt, check_empty, in_threads


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


class Everybody:
    """One engine, and in each round threads that generate, stream, drop streams and cancel, beside interrupted calls.

    In quiet rounds all texts are compared with `generate`; in the others the weights change under way, and only that
    everything asked for comes back is.
    """

    PARAMS = SamplingParams(max_tokens=6)

    def __init__(self, model, seed):
        self.rng = random.Random(seed)
        self.model = copy.deepcopy(model)
        weight = self.weight = self.model.model.layers[1].self_attn.q_proj.weight
        self.variants = [weight.detach().clone(), weight.detach() * -1.5]
        self.prompts = [[3 + i, 4, 5 + i] * (1 + i % 5) for i in range(14)]
        self.expected = []
        for variant in self.variants:
            self.become(variant)
            self.expected.append([generate(self.model, prompt, 6) for prompt in self.prompts])
        self.engine = Engine(self.model, num_blocks=26, block_size=4, max_batched_tokens=16, max_num_seqs=8,
                             draft="prompt_lookup", log_steps=50)  # fmt: skip
        self.added: list[str] = []
        self.count, self.interrupted, self.cancelled = itertools.count(), 0, 0

    def become(self, variant):
        with torch.no_grad():
            self.weight.copy_(variant)

    @property
    def requests(self):
        return self.count.__reduce__()[1][0]

    def round(self, threads, actions):
        state = self.rng.randrange(2)
        self.become(self.variants[state])
        expected = self.expected[state] if self.rng.random() < 0.6 else None
        seeds = [self.rng.randrange(10**9) for _ in range(threads)]
        workers = threading.Thread(
            target=lambda: errors.append(
                self.collect(lambda i: self.act(random.Random(seeds[i]), actions, expected), threads)
            )
        )
        errors = []
        workers.start()
        while workers.is_alive():
            self.interrupt()
            if expected is None:
                state = 1 - state
                self.become(self.variants[state])
        workers.join()
        assert errors == [None]
        done = []
        while self.engine.has_work:
            done += [c.request_id for c in self.engine.step()]
        assert sorted(done) == sorted(self.added)  # each exactly once, cancelled or not
        self.added.clear()
        check_empty(self.engine)
        assert len(self.engine.log) <= 50

    @staticmethod
    def collect(work, threads):
        try:
            in_threads(work, threads)
        except BaseException as error:
            return error

    def interrupt(self):
        """Only the main thread sees Ctrl-C."""
        try:
            with InterruptedAt(self.rng.randrange(1, 2000)):
                self.engine.generate([self.prompts[0]], self.PARAMS)
        except KeyboardInterrupt:
            self.interrupted += 1
        next(self.count)

    def act(self, rng, actions, expected):
        for _ in range(actions):
            chosen = rng.sample(range(len(self.prompts)), rng.randint(1, 4))
            prompts, kind = [self.prompts[i] for i in chosen], rng.random()
            if kind < 0.5:
                texts = [c.token_ids for c in self.engine.generate(prompts, self.PARAMS)]
            elif kind < 0.7:
                texts = [[t for d in self.engine.stream(p, self.PARAMS) for t in d.token_ids] for p in prompts]
            elif kind < 0.85:  # a reader who goes away
                stream = self.engine.stream(prompts[0], self.PARAMS)
                next(stream)
                stream.close()
                texts = None
            else:
                name = self.engine.add_request(prompts[0], self.PARAMS)
                self.added.append(name)
                try:
                    self.engine.cancel(name)
                    self.cancelled += 1
                except UnknownRequest:  # another thread's step has finished it
                    pass
                texts = None
            for _ in range(len(prompts) if texts is not None else 1):
                next(self.count)
            if texts is not None:
                assert len(texts) == len(chosen) and all(texts)
                if expected is not None:
                    assert texts == [expected[i] for i in chosen]


def test_everybody_at_once(model):
    everybody = Everybody(model, seed=random.randrange(10**6))
    for _ in range(4):
        everybody.round(threads=4, actions=4)
    assert everybody.requests > 50


@pytest.mark.nightly
def test_everybody_10_000_times(model):
    everybody = Everybody(model, seed=0)
    while everybody.requests < 10_000:
        everybody.round(threads=6, actions=12)
    print(everybody.requests, "requests,", everybody.interrupted, "interrupted,", everybody.cancelled, "cancelled")
    assert everybody.interrupted > 100 and everybody.cancelled > 100
