"""Speculation in the engine: same tokens, fewer steps, no rejected token in the prefix cache, off when it loses."""

import pytest

from optinfer.serving import Engine, SamplingParams
from optinfer.serving.speculation import Speculator, StepCost
from optinfer.speculative import Draft, ModelDraft, Proposal, SelfDraft


class Liar(Draft):
    """Always drafts, always wrong."""

    def propose(self, input_ids, num_tokens, sampler):
        return Proposal((input_ids[0, -1:].repeat(num_tokens) * 0) + 96)


@pytest.mark.parametrize("draft", ["prompt_lookup", Liar(), SelfDraft(1)], ids=["lookup", "liar", "layers"])
def test_output_and_prefix_cache(model, reference, draft):
    engine = Engine(model, num_blocks=60, block_size=4, draft=draft, num_draft_tokens=5, adaptive_drafts=False)
    prompts = [[7, 8, 9] * 6, [30, 31], [40] * 11]
    for _ in range(2):  # the second time on a warm prefix cache: rejected drafts in it would show
        done = engine.generate(prompts, SamplingParams(max_tokens=12))
        assert [c.token_ids for c in done] == [reference(p, 12) for p in prompts]
    assert engine.stats.draft_tokens > 0


def test_the_target_as_its_own_draft(model, reference):
    engine = Engine(model, num_blocks=60, draft=ModelDraft(model), num_draft_tokens=3, adaptive_drafts=False)
    (done,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=13, ignore_eos=True))
    assert done.metrics.accepted_tokens == done.metrics.draft_tokens > 0
    assert len(engine.log) == 1 + 3  # the prompt gives the first token, each step after it four


def test_a_drafter_that_needs_hidden_states_is_refused(model):
    draft = Liar()
    draft.needs_hidden = True
    with pytest.raises(ValueError, match="hidden"):
        Engine(model, num_blocks=8, draft=draft)


def test_step_cost():
    cost = StepCost()
    assert cost.coefficients is None
    for tokens in (1, 2, 8, 30) * 4:
        cost.observe(tokens, 0.5 + 0.1 * tokens)
    assert cost.coefficients == pytest.approx((0.5, 0.1))


def test_speculation_turns_itself_off_when_the_batch_makes_it_lose():
    speculator = Speculator(drafts=None, num_tokens=4, adaptive=True, clock=lambda: 0.0)
    for tokens in (1, 4, 16, 64) * 4:  # half of a step at 50 tokens is fixed
        speculator.cost.observe(tokens, 0.05 + 0.001 * tokens)
    thresholds = [speculator.break_even(n) for n in (1, 8, 50, 500)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < 0.05 and thresholds[2] == pytest.approx(0.5) and thresholds[3] > 0.9


def test_adaptive_drafts_stop_for_a_liar(model):
    engine = Engine(model, num_blocks=60, block_size=4, draft=Liar())
    engine.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=60, ignore_eos=True))
    assert engine.stats.draft_tokens < 4 * 2 * 59 * 0.9
