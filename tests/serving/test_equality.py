"""Greedy output in fp32 equals one-at-a-time `generate`, whatever the schedule."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optinfer.serving import Engine, SamplingParams
from optinfer.speculative import ModelDraft, PromptLookupDraft

PREFIXES = [[], [5, 6, 7, 8] * 3, list(range(10, 31))]
MAX_TOKENS = 8


@st.composite
def prompts(draw):
    """Prompts that share prefixes and repeat themselves."""
    prefix = draw(st.sampled_from(PREFIXES))
    tail = draw(st.lists(st.integers(3, 96), min_size=1, max_size=12))
    return prefix + tail


SCHEDULES = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(10, 30),
        "block_size": st.sampled_from([4, 5, 8]),
        "max_batched_tokens": st.sampled_from([1, 3, 8, 33, 512]),
        "max_num_seqs": st.sampled_from([1, 2, 4, 16]),
        "policy": st.sampled_from(["continuous", "prefill_first", "static"]),
        "chunked_prefill": st.booleans(),
        "prefix_caching": st.booleans(),
        "draft": st.sampled_from([None, "prompt_lookup", "model", "tree"]),
        "num_draft_tokens": st.sampled_from([1, 3, 6]),
        "adaptive_drafts": st.booleans(),
        "fuse": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SCHEDULES, st.lists(st.tuples(prompts(), st.integers(0, 6), st.booleans()), min_size=1, max_size=9))
def test_any_schedule_gives_the_text_of_generate(model, reference, knowing_tree, schedule, arrivals):
    """`arrivals`: (prompt, engine steps before the next one arrives, cancelled later)."""
    if schedule["draft"] == "model":  # the target as its own draft: everything is accepted
        schedule = {**schedule, "draft": ModelDraft(model)}
    if schedule["draft"] == "tree":
        texts = [prompt + reference(prompt, MAX_TOKENS) for prompt, _, _ in arrivals]
        schedule = {**schedule, "draft": knowing_tree(texts)}
    engine = Engine(model, **schedule)
    done, expected, cancelled = {}, {}, []
    for prompt, steps, cancel in arrivals:
        request_id = engine.add_request(prompt, SamplingParams(max_tokens=MAX_TOKENS))
        expected[request_id] = reference(prompt, MAX_TOKENS)
        for _ in range(steps):
            done.update((c.request_id, c) for c in engine.step())
            engine.check_integrity()
        if cancel and request_id not in done:
            engine.cancel(request_id)
            cancelled.append(request_id)
    while engine.has_work:
        done.update((c.request_id, c) for c in engine.step())
        engine.check_integrity()
    assert done.keys() == expected.keys()
    for request_id, completion in done.items():
        if request_id in cancelled:
            assert completion.finish_reason == "cancelled"
            assert completion.token_ids == expected[request_id][: len(completion.token_ids)]
        else:
            assert completion.token_ids == expected[request_id]
    assert engine.manager.num_free_blocks == engine.manager.num_blocks


def test_the_comparison_can_fail(model, reference):
    """The same check against an engine whose cache is corrupted must not pass."""
    engine = Engine(model, num_blocks=30, block_size=4)
    prompts = [[7, 8, 9, 10, 11, 12], [20, 21, 22]]
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_tokens=MAX_TOKENS))
    engine.step()
    engine.runner.pool.values.mul_(-1.0)
    done = []
    while engine.has_work:
        done += engine.step()
    assert [c.token_ids for c in done] != [reference(p, MAX_TOKENS) for p in prompts]


def test_the_model_is_left_as_it_was(model, reference):
    prompt = [11, 12, 13, 14]
    attention, expected = model.config._attn_implementation, reference(prompt, 10)
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    engine = Engine(model, num_blocks=16)
    engine.generate([prompt])
    assert model.config._attn_implementation == attention
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    ids = torch.tensor([prompt])
    after = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert after[0, 4:].tolist() == expected


@pytest.mark.parametrize("draft", [None, PromptLookupDraft(max_ngram=2, min_ngram=1)])
def test_preemption_keeps_the_text(model, reference, draft):
    prompts = [[i, i + 1, i + 2, i + 3, i + 4] for i in range(3, 33, 5)]
    engine = Engine(model, num_blocks=9, block_size=4, draft=draft, adaptive_drafts=False)
    done = engine.generate(prompts, SamplingParams(max_tokens=20))
    assert engine.stats.preemptions > 0
    assert sum(c.metrics.recomputed_tokens for c in done) > 0
    assert [c.token_ids for c in done] == [reference(p, 20) for p in prompts]


def test_a_prefix_hit_keeps_the_text(model, reference):
    prefix = list(range(3, 43))
    engine = Engine(model, num_blocks=40, block_size=4)
    for tail in ([50], [51, 52], [50]):
        (done,) = engine.generate([prefix + tail], SamplingParams(max_tokens=9))
        assert done.token_ids == reference(prefix + tail, 9)
    assert done.metrics.cached_tokens == 40


def test_requests_of_one_step_share_what_that_step_computes(model, reference):
    prefix = list(range(3, 43))
    prompts = [[*prefix, i] for i in (50, 51, 52, 53)]
    engine = Engine(model, num_blocks=60, block_size=4)
    done = engine.generate(prompts, SamplingParams(max_tokens=6))
    assert [c.token_ids for c in done] == [reference(p, 6) for p in prompts]
    assert engine.log[0].chunks[1].start == 40  # the second prompt found the first one's blocks at once
