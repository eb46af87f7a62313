"""Life of a request: parameters, streams, cancellation, seeds, stop strings, metrics, and everything that is refused."""

import functools
import math
import operator
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from optinfer.serving import Engine, SamplingParams, UnknownRequest
from optinfer.serving.detokenizer import Detokenizer
from optinfer.serving.sampler import filter_logits, sample


@pytest.fixture
def engine(model):
    return Engine(model, num_blocks=24, block_size=4, max_batched_tokens=16)


def drain(engine):
    done = []
    while engine.has_work:
        done += engine.step()
    engine.check_integrity()
    assert engine.manager.num_free_blocks == engine.manager.num_blocks
    return done


# ---- what is refused

BAD_PARAMS = [
    {"max_tokens": 0},
    {"max_tokens": 1.5},
    {"temperature": -1.0},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "top_p": 1.5},
    {"temperature": 1.0, "top_k": -1},
    {"temperature": 1.0, "min_p": 2.0},
    {"n": 0},
    {"n": 2},
    {"top_k": 5},
    {"top_p": 0.5},
    {"seed": "x"},
    {"stop": [""]},
    {"stop": [3]},
    {"stop_token_ids": ["a"]},
]


@pytest.mark.parametrize("bad", BAD_PARAMS, ids=str)
def test_contradictory_parameters(bad):
    with pytest.raises((ValueError, TypeError)) as error:
        SamplingParams(**bad)
    assert any(name in str(error.value) for name in bad)


BAD_PROMPTS = [
    ([], "empty"),
    ([3] * 128, "context"),
    ([3] * 100, "pages"),
    ([3, 97], "97"),
    ([-1], "-1"),
    ([1.5], "token ids"),
    ("text", "tokenizer"),
    (None, "token ids"),
]


@pytest.mark.parametrize(("prompt", "names"), BAD_PROMPTS, ids=[names for _, names in BAD_PROMPTS])
def test_a_bad_prompt_harms_nobody(engine, reference, prompt, names):
    good = engine.add_request([5, 6, 7], SamplingParams(max_tokens=8))
    engine.step()
    before = engine.manager.snapshot()
    with pytest.raises((ValueError, TypeError), match=names):
        engine.add_request(prompt)
    with pytest.raises((ValueError, TypeError), match=r"prompts\[1\]"):
        engine.generate([[4, 5], prompt, [6]])
    with pytest.raises((ValueError, TypeError), match=names):
        engine.stream(prompt)
    assert engine.manager.snapshot() == before
    (done,) = drain(engine)
    assert (done.request_id, done.token_ids) == (good, reference([5, 6, 7], 8))


def test_requests_that_contradict_the_engine(engine):
    with pytest.raises(ValueError, match="tokenizer"):
        engine.add_request([5], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match="max_num_seqs"):
        engine.add_request([5], SamplingParams(n=65, temperature=1.0))
    with pytest.raises(TypeError, match="SamplingParams"):
        engine.add_request([5], {"max_tokens": 3})
    engine.add_request([5], request_id="mine")
    with pytest.raises(ValueError, match="mine"):
        engine.add_request([5], request_id="mine")
    assert [c.request_id for c in drain(engine)] == ["mine"]


@pytest.mark.parametrize(
    "bad", [{"draft": "crystal ball"}, {"policy": "random"}, {"max_num_seqs": 0}, {"num_blocks": 0}]
)
def test_a_bad_engine(model, bad):
    with pytest.raises(ValueError):
        Engine(model, **{"num_blocks": 8, **bad})


def test_cancelled_twice(engine, reference):
    other = engine.add_request([5, 6, 7], SamplingParams(max_tokens=8))
    victim = engine.add_request([8, 9], SamplingParams(max_tokens=8, n=3, temperature=1.0))
    engine.step()
    engine.cancel(victim)
    for request_id in (victim, "never"):
        with pytest.raises(UnknownRequest):
            engine.cancel(request_id)
    done = drain(engine)
    assert sorted(c.finish_reason for c in done if c.request_id == victim) == ["cancelled"] * 3
    assert [c.token_ids for c in done if c.request_id == other] == [reference([5, 6, 7], 8)]
    with pytest.raises(UnknownRequest):
        engine.cancel(other)


def test_a_stream_dropped_in_the_middle(engine, reference):
    other = engine.add_request([5, 6, 7], SamplingParams(max_tokens=8))
    stream = engine.stream([8, 9, 10], SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream), next(stream)
    del stream
    engine.stream([8, 9, 10])  # made and never started: nothing was queued
    assert engine.stats.cancelled == 1
    assert [(c.request_id, c.token_ids) for c in drain(engine)] == [(other, reference([5, 6, 7], 8))]


@pytest.mark.parametrize("end", ["close", "throw", "before the first token"])
def test_a_stream_ended_by_its_reader(engine, reference, end):
    other = engine.add_request([5, 6, 7], SamplingParams(max_tokens=8))
    stream = engine.stream([8, 9, 10], SamplingParams(max_tokens=20, n=2, temperature=1.0, ignore_eos=True))
    if end == "before the first token":
        stream.close()
    else:
        next(stream)
        if end == "close":
            stream.close()
        else:
            with pytest.raises(RuntimeError, match="the reader's"):
                stream.throw(RuntimeError("the reader's"))
    assert next(stream, "over") == "over"
    assert engine.stats.cancelled == (0 if end == "before the first token" else 2)
    assert [(c.request_id, c.token_ids) for c in drain(engine)] == [(other, reference([5, 6, 7], 8))]


def test_a_stream_cancelled_by_somebody_else(engine, reference):
    stream = engine.stream([8, 9, 10], SamplingParams(max_tokens=20, ignore_eos=True))
    first = next(stream)
    (request_id,) = engine.request_ids
    engine.cancel(request_id)
    rest = list(stream)
    assert rest[-1].finish_reason == "cancelled" and not rest[-1].token_ids
    tokens = first.token_ids + [token for delta in rest for token in delta.token_ids]
    assert tokens == reference([8, 9, 10], 20)[: len(tokens)]
    with pytest.raises(UnknownRequest):
        engine.cancel(request_id)
    assert drain(engine) == []


def test_an_interrupted_generate_cancels_only_its_own(engine, reference, monkeypatch):
    other = engine.add_request([5, 6, 7], SamplingParams(max_tokens=8))
    run, calls = engine.runner.run, iter(range(3))

    def interrupted(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[8, 9], [10, 11, 12]], SamplingParams(max_tokens=20, ignore_eos=True))
    monkeypatch.setattr(engine.runner, "run", run)
    assert engine.stats.cancelled == 2
    assert [(c.request_id, c.token_ids) for c in drain(engine)] == [(other, reference([5, 6, 7], 8))]


@pytest.mark.parametrize("moment", ["waiting", "running", "preempted"])
def test_cancelled_in_any_state(model, reference, moment):
    engine = Engine(model, num_blocks=9, block_size=4, max_num_seqs=1 if moment == "waiting" else 8)
    prompts = [[i, i + 1, i + 2, i + 3, i + 4] for i in range(3, 28, 5)]
    ids = [engine.add_request(p, SamplingParams(max_tokens=16, ignore_eos=True)) for p in prompts]
    while True:
        engine.step()
        states = {
            "waiting": [s for s in engine.scheduler.waiting if not s.metrics.preemptions],
            "running": engine.scheduler.running,
            "preempted": [s for s in engine.scheduler.waiting if s.metrics.preemptions],
        }
        if states[moment]:
            break
    victim = states[moment][0].request.request_id
    engine.cancel(victim)
    engine.check_integrity()
    done = {c.request_id: c for c in drain(engine)}
    assert done[victim].finish_reason == "cancelled"
    for request_id, prompt in zip(ids, prompts):
        if request_id != victim and request_id in done:
            assert done[request_id].finish_reason == "length"
            # `generate` may end earlier, at an end-of-sequence that is ignored here
            expected = reference(prompt, 16)
            assert done[request_id].token_ids[: len(expected)] == expected


def test_a_failing_step_loses_no_request(engine, reference, monkeypatch):
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_tokens=8))
    engine.step()
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda *a: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(MemoryError):
        engine.step()
    monkeypatch.setattr(engine.runner, "run", run)
    assert {tuple(c.token_ids) for c in drain(engine)} == {tuple(reference(p, 8)) for p in prompts}


# ---- streams and text


def test_streams_side_by_side(engine, reference):
    prompts = [[5, 6, 7], [8, 9], [20] * 9]
    streams = [engine.stream(p, SamplingParams(max_tokens=9)) for p in prompts]
    tokens = [[], [], []]
    live = set(range(3))
    while live:
        for i in sorted(live):
            delta = next(streams[i], None)
            if delta is None:
                live.discard(i)
            else:
                tokens[i] += delta.token_ids
    assert tokens == [reference(p, 9) for p in prompts]
    assert not engine.has_work


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_stop_strings(byte_tokenizer_class, text, stop):
    text = text.replace("\ufffd", "?").replace("\x02", "?")
    detokenizer, shown, ended = Detokenizer(byte_tokenizer_class(), tuple(stop)), "", False
    for byte in text.encode(errors="replace"):
        ended = detokenizer.push(byte)
        shown += detokenizer.take()
        assert "\ufffd" not in shown
        if ended:
            break
    whole = detokenizer.finish()
    shown += detokenizer.take(final=True)
    assert shown == whole
    text = text.encode(errors="replace").decode()
    # The first moment at which any stop string is complete, searched character by character.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    assert ended == bool(ends)
    if not ends:
        assert whole == text
    else:
        begin = min(text[: ends[0]].find(s) for s in stop if s in text[: ends[0]])
        assert whole == text[:begin]


def test_a_stop_string_in_the_engine(byte_model, byte_tokenizer, scripted):
    engine = Engine(
        byte_model, byte_tokenizer, num_blocks=24, block_size=4, draft="prompt_lookup", adaptive_drafts=False
    )
    answer = list(b"say STOP now")
    scripted(engine, lambda text: answer[min(len(text) - 4, len(answer) - 1)])
    params = SamplingParams(max_tokens=30, stop=("STOP",))
    (done,) = engine.generate(["what"], params)
    assert (done.text, done.finish_reason) == ("say ", "stop")
    deltas = list(engine.stream("what", params))
    assert "".join(d.text for d in deltas) == "say " and deltas[-1].finish_reason == "stop"
    assert functools.reduce(operator.iadd, (d.token_ids for d in deltas), []) == done.token_ids == answer[:8]


# ---- sampling


def test_a_seeded_sample_depends_on_nothing_else(model):
    params = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.95, top_k=40, seed=7, n=3)
    alone = [c.token_ids for c in Engine(model, num_blocks=40).generate([[5, 6, 7]], params)]
    assert len({tuple(t) for t in alone}) == 3
    crowded = Engine(model, num_blocks=14, block_size=4, draft="prompt_lookup", adaptive_drafts=False)
    others = [crowded.add_request([i] * 6, SamplingParams(max_tokens=12, temperature=1.0)) for i in range(9, 14)]
    assert [c.token_ids for c in crowded.generate([[5, 6, 7]], params)] == alone
    drain(crowded)
    assert others and crowded.stats.preemptions > 0


def test_samples_follow_the_law():
    params = SamplingParams(temperature=0.7, top_k=6, seed=0)
    logits = torch.randn(1, 12)
    law = filter_logits(logits, params).softmax(-1)[0]
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    draws = 20_000
    tokens = sample(logits.expand(draws, -1), params, torch.rand(draws, generator=generator).tolist()).tolist()
    counts = Counter(tokens)
    likely = [i for i in range(12) if law[i] > 0]
    assert set(counts) <= set(likely) and len(likely) == 6
    assert chisquare([counts[i] for i in likely], [law[i].item() * draws for i in likely]).pvalue > 1e-4


@pytest.mark.parametrize(
    "changes", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.9, "min_p": 0.05}]
)
def test_filters_agree_with_transformers(changes):
    from transformers.generation import logits_process as hf

    logits = torch.randn(4, 50).double() * 3
    params = SamplingParams(temperature=0.8, **changes)
    expected = hf.TemperatureLogitsWarper(0.8)(None, logits)
    if params.top_k:
        expected = hf.TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = hf.TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = hf.MinPLogitsWarper(params.min_p)(None, expected)
    torch.testing.assert_close(filter_logits(logits, params).softmax(-1), expected.softmax(-1))


def test_parallel_samples_share_the_prompt(model):
    prompt = list(range(3, 33))
    engine = Engine(model, num_blocks=60, block_size=4)
    done = engine.generate([prompt], SamplingParams(max_tokens=5, n=4, temperature=1.0, ignore_eos=True))
    assert [c.index for c in done] == [0, 1, 2, 3]
    assert engine.stats.computed_tokens == 30 + 4 * 4
    assert engine.stats.peak_used_blocks <= 7 + 4 * 3  # seven full blocks once, the rest per continuation


# ---- the end of a request, and its metrics


def test_end_of_sequence_and_limits(model, scripted):
    engine = Engine(model, num_blocks=40, block_size=4, max_model_len=20)
    scripted(engine, lambda text: 2 if len(text) == 10 else 5)
    eos, ignored, token, length = engine.generate(
        [[4] * 6] * 4,
        [
            SamplingParams(max_tokens=9),
            SamplingParams(max_tokens=9, ignore_eos=True),
            SamplingParams(max_tokens=9, stop_token_ids=(5,)),
            SamplingParams(max_tokens=99, ignore_eos=True),
        ],
    )
    assert (eos.token_ids, eos.finish_reason) == ([5, 5, 5, 5, 2], "stop")
    assert (len(ignored.token_ids), ignored.finish_reason) == (9, "length")
    assert (token.token_ids, token.finish_reason) == ([5], "stop")
    assert (len(length.token_ids), length.finish_reason) == (14, "length")  # 6 + 14 fill the context


def test_metrics(model):
    ticks = iter(range(10_000))
    engine = Engine(model, num_blocks=40, block_size=4, clock=lambda: float(next(ticks)))
    first, second = engine.generate(
        [list(range(3, 15)), list(range(3, 15))], SamplingParams(max_tokens=5, ignore_eos=True)
    )
    for done in (first, second):
        m = done.metrics
        assert m.arrival < m.first_scheduled < m.first_token < m.finished
        assert m.time_to_first_token == m.first_token - m.arrival
        assert m.time_per_output_token == (m.finished - m.first_token) / 4
        assert (m.prompt_tokens, m.output_tokens) == (12, 5)
    assert (first.metrics.cached_tokens, second.metrics.cached_tokens) == (0, 8)
