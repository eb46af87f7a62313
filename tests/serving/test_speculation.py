"""Speculation in the engine: same tokens, fewer steps, no rejected token in the prefix cache, off when it loses."""

import copy

import pytest
import torch
import transformers

import optinfer
from optinfer.serving import Engine, SamplingParams
from optinfer.serving.speculation import RunningFit, Speculator
from optinfer.speculative import (
    ChainDraft,
    Draft,
    LookupTree,
    ModelDraft,
    PromptLookupDraft,
    Proposal,
    QuantizedDraft,
    SelfDraft,
)
from optinfer.speculative.draft_head import DraftHead, HeadDraft


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


@pytest.fixture
def head(model):
    """An untrained head: its drafts are as good as random, which is all that the engine must survive."""
    torch.manual_seed(3)
    with torch.device("cpu"):  # the same guesses on every device
        guesses = DraftHead.for_model(copy.deepcopy(model).cpu(), torch.arange(3, 90))
    return HeadDraft(guesses.to(model.device), min_confidence=0.0)


@pytest.mark.parametrize("fuse", [True, False], ids=["lean", "modules"])
@pytest.mark.parametrize("chained", [False, True], ids=["head", "chain"])
def test_a_draft_head(model, reference, head, fuse, chained):
    draft = ChainDraft([PromptLookupDraft(), head]) if chained else head
    engine = Engine(
        model, num_blocks=13, block_size=4, max_batched_tokens=9, draft=draft, adaptive_drafts=False, fuse=fuse
    )
    prompts = [[7, 8, 9] * 6, [30, 31], [40] * 11, [30, 31, 32]]
    for _ in range(2):  # the second time with hits in the prefix cache
        done = engine.generate(prompts, SamplingParams(max_tokens=12))
        assert [c.token_ids for c in done] == [reference(p, 12) for p in prompts]
    assert engine.stats.draft_tokens > 0 and engine.stats.preemptions > 0 and engine.stats.cached_tokens > 0
    assert not any(draft._own for draft in engine.speculator.drafts)


def test_a_draft_head_sees_what_it_sees_in_generate(model, head):
    """One prompt in chunks, then rounds of drafts: the same drafts as the decoder of lesson 5 gets."""
    said = []

    class Listening(HeadDraft):
        def _draft(self, input_ids, num_tokens, sampler):
            drafted = super()._draft(input_ids, num_tokens, sampler)
            said[-1].append(drafted[0].tolist())
            return drafted

    said.append([])
    draft = Listening(head.head, min_confidence=0.0)
    engine = Engine(model, num_blocks=60, block_size=4, max_batched_tokens=5, draft=draft, num_draft_tokens=3,
                    adaptive_drafts=False)  # fmt: skip
    prompt = [7, 8, 9, 20, 21, 22, 23, 50]
    (done,) = engine.generate([prompt], SamplingParams(max_tokens=14, ignore_eos=True))
    said.append([])
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, min_new_tokens=14, do_sample=False,
        custom_generate=optinfer.speculative_decoding, draft=Listening(head.head, min_confidence=0.0),
        num_draft_tokens=3, adaptive_drafts=False,
    )  # fmt: skip
    rounds = [(a, b) for a, b in zip(*([d for d in drafts if d] for drafts in said))]
    # Near the end each cuts its drafts in its own way.
    assert len(rounds) > 5 and all(a[: len(b)] == b[: len(a)] for a, b in rounds)
    assert out[0, len(prompt) :].tolist()[:10] == done.token_ids[:10]


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_the_quantized_target_as_a_draft(build_model, hf_generate, scheme):
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    target = build_model(config, seed=2)
    engine = Engine(target, num_blocks=60, block_size=4, draft=QuantizedDraft(scheme), num_draft_tokens=3,
                    adaptive_drafts=False)  # fmt: skip
    prompts = [[7, 8, 9] * 5, [30, 31], [40] * 11]
    expected = [hf_generate(target, p, 12) for p in prompts]
    for _ in range(2):
        done = engine.generate(prompts, SamplingParams(max_tokens=12))
        assert [c.token_ids for c in done] == expected
    assert engine.stats.accepted_tokens > 0
    (drafts,) = engine.speculator.drafts
    assert drafts.manager.num_free_blocks == drafts.manager.num_blocks


@pytest.mark.parametrize("chained", [False, True], ids=["tree", "in a chain"])
def test_drafters_of_trees_are_refused_where_only_chains_are_checked(model, chained):
    """They have a chain's methods too, and would be asked for chains without a word."""
    draft = [PromptLookupDraft(), LookupTree()] if chained else LookupTree()
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"draft LookupTree drafts trees.*tree_decoding"):
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
            custom_generate=optinfer.speculative_decoding, draft=draft,
        )  # fmt: skip


def test_a_head_for_another_model_is_refused(model, build_model):
    other = build_model(transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64,
                                                 num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    draft = HeadDraft(DraftHead.for_model(other, torch.arange(3, 90)))
    with pytest.raises(ValueError, match="hidden size 32"):
        Engine(model, num_blocks=8, draft=draft)


def test_speculation_stops_when_the_batch_grows(model):
    """A model of the cost of a step in place of a clock: alone, drafts of which half are wrong still pay; among forty not."""
    now = [0.0]
    engine = Engine(model, num_blocks=400, block_size=4, draft=Halfway(), num_draft_tokens=4, max_num_seqs=40,
                    clock=lambda: now[0])  # fmt: skip
    run = engine.runner.run

    def timed(chunks, num_logits, copies=()):
        now[0] += 0.010 + 0.001 * sum(len(chunk.token_ids) for chunk in chunks)
        return run(chunks, num_logits, copies)

    engine.runner.run = timed
    Halfway.target = engine
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    engine.generate([[5, 6, 7]], params)
    alone = sum(chunk.drafted for record in engine.log[10:] for chunk in record.chunks) / len(engine.log[10:])
    first = len(engine.log)
    engine.generate([[5, 6, i] for i in range(40, 80)], params)
    log = [record for record in engine.log[first + 25 :] if len(record.chunks) > 30]
    crowded = sum(chunk.drafted for record in log for chunk in record.chunks) / sum(len(r.chunks) for r in log)
    assert alone > 1 and crowded < 0.2


class Halfway(Draft):
    """Half of the tokens it is judged by are right: the first, taken from the target itself, and then no other."""

    target: Engine

    def propose(self, input_ids, num_tokens, sampler):
        model = self.target.model
        out = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=1,
                             min_new_tokens=1, do_sample=False, pad_token_id=0)  # fmt: skip
        return Proposal(torch.cat([out[0, -1:], torch.full((num_tokens - 1,), 96)])[:num_tokens])


def test_running_fit():
    cost = RunningFit()
    assert cost.coefficients is None
    for tokens in (1, 2, 8, 30) * 4:
        cost.observe(tokens, 0.5 + 0.1 * tokens)
    assert cost.coefficients == pytest.approx((0.5, 0.1))


def test_the_price_of_a_draft_grows_with_the_batch():
    speculator = Speculator([], num_tokens=4, adaptive=True, max_length=100, clock=lambda: 0.0)
    for tokens in (1, 4, 16, 64) * 4:  # half of a step at 50 tokens is fixed
        speculator.cost.observe(tokens, 0.05 + 0.001 * tokens)
    prices = [speculator.price(n) for n in (1, 8, 50, 500)]
    assert prices == sorted(prices)
    assert prices[0] < 0.05 and prices[2] == pytest.approx(0.5) and prices[3] > 0.9


@pytest.mark.parametrize(
    "draft", [["prompt_lookup", "model"], ["model", "prompt_lookup"], ["liar", "model", "int8"]], ids=str
)
def test_chains_with_models(model, build_model, reference, draft):
    """Members are asked in turn, whatever they are; each sequence gets the first that has something to say."""
    other = build_model(transformers.LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": 1}), seed=5)
    draft = [{"model": other, "liar": Liar()}.get(one, one) for one in draft]
    engine = Engine(model, num_blocks=60, block_size=4, draft=draft, num_draft_tokens=3)
    prompts = [[7, 8, 9] * 6, [30, 31], [40] * 11]
    for _ in range(2):
        done = engine.generate(prompts, SamplingParams(max_tokens=12))
        assert [c.token_ids for c in done] == [reference(p, 12) for p in prompts]
    assert engine.stats.draft_tokens > 0
    for member in engine.speculator.drafts:
        assert member.manager.num_free_blocks == 60 if hasattr(member, "manager") else not member._own


def test_a_draft_with_a_shorter_context_drafts_until_there(model, build_model):
    short = build_model(transformers.LlamaConfig(**model.config.to_dict() | {"max_position_embeddings": 12}), seed=5)
    engine = Engine(model, num_blocks=60, block_size=4, draft=short, num_draft_tokens=3, adaptive_drafts=False)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    plain = Engine(model, num_blocks=60).generate([[7, 8, 9]], params)
    (done,) = engine.generate([[7, 8, 9]], params)
    assert done.token_ids == plain[0].token_ids
    assert max(c.start + c.drafted for record in engine.log for c in record.chunks if c.drafted) <= 12


def test_a_confident_model_stops_where_it_is_not_sure(model, build_model):
    other = build_model(transformers.LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": 1}), seed=5)
    drafted = []
    for confidence in (0.0, 0.2, 1.1):
        engine = Engine(model, num_blocks=60, draft=ModelDraft(other, confidence), adaptive_drafts=False)
        engine.generate([[7, 8, 9], [5, 4]], SamplingParams(max_tokens=20, ignore_eos=True))
        drafted.append(engine.stats.draft_tokens)
    assert drafted[0] > drafted[1] >= drafted[2] == 0


@pytest.mark.parametrize("draft", ["nothing", 3, [], ["prompt_lookup", "nothing"]], ids=str)
def test_unknown_drafts_are_refused(model, draft):
    with pytest.raises(
        ValueError, match="draft must be a drafter, a model, a list of them, or one of prompt_lookup, head"
    ):
        Engine(model, num_blocks=8, draft=draft)


def test_adaptive_drafts_stop_for_a_liar(model):
    engine = Engine(model, num_blocks=60, block_size=4, draft=Liar())
    engine.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=60, ignore_eos=True))
    assert engine.stats.draft_tokens < 4 * 2 * 59 * 0.9
