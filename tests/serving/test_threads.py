"""Threads on one engine, and interrupts anywhere: nothing is lost, nothing is done twice."""

import random
import signal
import sys
import threading
import time

import pytest

from optinfer.serving import Engine, SamplingParams
from optinfer.serving.turns import FairLock, Interrupts


def in_threads(work, count):
    """Run work(i) in threads; returns the results, raises what one of them raised."""
    results, errors = [None] * count, []

    def run(i):
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results


def check_empty(engine):
    engine.check_integrity()
    assert not engine.has_work and not engine.request_ids
    assert engine.manager.num_free_blocks == engine.manager.num_blocks


@pytest.mark.parametrize("draft", [None, "prompt_lookup"])
def test_eight_threads(model, reference, draft):
    engine = Engine(model, num_blocks=20, block_size=4, max_batched_tokens=16, draft=draft)
    prompts = [[3 + i, 4, 5 + i] * (1 + i % 4) for i in range(16)]
    expected = [reference(p, 8) for p in prompts]
    params = SamplingParams(max_tokens=8)

    def work(i):
        if i == 7:  # one that streams and drops
            for _ in range(6):
                stream = engine.stream(prompts[i], params)
                next(stream)
                del stream
            return [expected[i]]
        if i % 2:
            return [[t for d in engine.stream(p, params) for t in d.token_ids] for p in prompts[i : i + 8]]
        return [c.token_ids for c in engine.generate(prompts[i : i + 8], params)]

    assert in_threads(work, 8) == [expected[7:8] if i == 7 else expected[i : i + 8] for i in range(8)]
    check_empty(engine)


def test_a_step_leaves_the_results_of_others_alone(model, reference):
    """A thread in `step` finishes what another thread's `generate` waits for: each gets its own."""
    engine = Engine(model, num_blocks=40, block_size=4)
    params = SamplingParams(max_tokens=12)
    stop = threading.Event()

    def work(i):
        if i:
            try:
                return [c.token_ids for c in engine.generate([[5, 6, 7 + i]] * 3, params)]
            finally:
                stop.set()
        mine, done = [engine.add_request([9, 8, 7], params) for _ in range(2)], []
        while len(done) < 2 or not stop.is_set():
            done += engine.step()
        assert sorted(c.request_id for c in done) == sorted(mine)
        return [c.token_ids for c in done]

    assert in_threads(work, 2) == [[reference([9, 8, 7], 12)] * 2, [reference([5, 6, 8], 12)] * 3]
    check_empty(engine)


def test_the_lock_is_fair():
    lock, order = FairLock(), []
    lock.acquire()
    assert not lock.acquire(blocking=False)
    threads = []
    for i in range(6):
        thread = threading.Thread(target=lambda i=i: (lock.acquire(), order.append(i), lock.release()))
        thread.start()
        while len(lock._queue) <= i:
            time.sleep(0.001)
        threads.append(thread)
    lock.release()
    for thread in threads:
        thread.join()
    assert order == list(range(6)) and lock.acquire(blocking=False)


def test_an_interrupt_waits_for_the_end():
    interrupts, seen = Interrupts(), []
    with pytest.raises(KeyboardInterrupt):
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            seen.append("after the first")
            with pytest.raises(KeyboardInterrupt), interrupts.allowed():
                seen.append("never")
            with pytest.raises(KeyboardInterrupt), interrupts.allowed():
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        seen.append("never")
    assert seen == ["after the first"]
    with pytest.raises(KeyboardInterrupt):  # the usual handler is back
        signal.raise_signal(signal.SIGINT)


class InterruptedAt:
    """Ctrl-C before the n-th line of our serving code that runs from now on."""

    def __init__(self, n):
        self.left = n

    def __call__(self, frame, event, arg):
        if "optinfer/serving" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *_):
        sys.settrace(self.before)


@pytest.mark.parametrize("draft", [None, "prompt_lookup"])
def test_an_interrupt_before_any_line(model, reference, draft):
    """Requests that were added survive; a call that was interrupted ends its own; and the books balance."""
    engine = Engine(model, num_blocks=14, block_size=4, max_batched_tokens=9, draft=draft, adaptive_drafts=False)
    params = SamplingParams(max_tokens=6)
    prompts = [[7, 8, 9] * 3, [30, 31], [40] * 11]
    rng, interrupted = random.Random(0), 0
    for _ in range(60):
        ids = {engine.add_request(p, params): p for p in prompts}
        done = []
        try:
            with InterruptedAt(rng.randrange(1, 900)):
                if rng.random() < 0.4:
                    engine.generate([[50, 51, 52], [60] * 5], params)
                elif rng.random() < 0.5:
                    list(engine.stream([50, 51, 52], params))
                else:
                    while engine.has_work:
                        done += engine.step()
        except KeyboardInterrupt:
            interrupted += 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        engine.check_integrity()
        assert set(engine.request_ids) <= set(ids)
        while engine.has_work:
            done += engine.step()
        assert sorted(c.request_id for c in done) == sorted(ids)
        assert all(c.token_ids == reference(ids[c.request_id], 6) for c in done)
        check_empty(engine)
    assert interrupted > 20


def test_what_fails_while_results_are_decided(model, reference, byte_model, byte_tokenizer, scripted):
    """The tokenizer raises in the middle of a step: the step never was."""
    engine = Engine(byte_model, byte_tokenizer, num_blocks=40, block_size=4)
    answer = list("naïve — text".encode())
    scripted(engine, lambda text: answer[(len(text) - 4) % len(answer)])
    decode, rng = byte_tokenizer.decode, random.Random(0)

    def failing(*args, **kwargs):
        if rng.random() < 0.1:
            raise RuntimeError("decoder")
        return decode(*args, **kwargs)

    params = SamplingParams(max_tokens=24, stop="never there", ignore_eos=True)
    ids = [engine.add_request("what", params) for _ in range(3)]
    byte_tokenizer.decode = failing
    done, failures = [], 0
    while engine.has_work:
        try:
            done += engine.step()
        except RuntimeError:
            failures += 1
    whole = (answer * 3)[:24]
    assert failures > 3 and sorted(c.request_id for c in done) == sorted(ids)
    assert all(c.token_ids == whole and c.text == bytes(whole).decode(errors="replace") for c in done)
