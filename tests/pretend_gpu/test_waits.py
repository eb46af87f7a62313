"""How often the host waits for the GPU: once per step of the engine, for the tokens, and once per speculative round."""

import pytest
import torch
import transformers

import optinfer
from optinfer.serving import Engine, SamplingParams
from optinfer.speculative import HeadTree, LookupTree, ModelDraft, PromptLookupDraft
from optinfer.speculative.draft_head import DraftHead, HeadDraft

TINY = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    return model.to("cuda")


def waits_per_step(engine, log, params, prompts=2):
    for i in range(prompts):
        engine.add_request([5, 6, 7, 8 + i] * 3, params)
    for _ in range(4):  # prompts, and graphs of this batch size
        engine.step()
    log.waits.clear()
    steps = 3
    for _ in range(steps):
        engine.step()
    return log.num_waits / steps


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"fuse": False}, {"kv_dtype": torch.int8}], ids=str)
def test_a_step_of_the_engine(model, log, options):
    engine = Engine(model, num_blocks=60, block_size=4, **options)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    own = 1 if options.get("fuse", True) else 2  # transformers looks whether positions are those of packed texts
    assert waits_per_step(engine, log, params) <= own, str(log)


def test_a_step_that_samples(model, log):
    engine = Engine(model, num_blocks=60, block_size=4)
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, top_k=20, top_p=0.9, seed=1)
    assert waits_per_step(engine, log, params) <= 1, str(log)


@pytest.mark.parametrize("copies", [1, 3])
def test_a_step_that_copies_on_write(model, log, copies):
    engine = Engine(model, num_blocks=90, block_size=4)
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, n=copies)
    assert waits_per_step(engine, log, params) <= 1, str(log)


def test_a_step_with_prompt_lookup(model, log):
    engine = Engine(model, num_blocks=90, block_size=4, draft="prompt_lookup", adaptive_drafts=False)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    assert waits_per_step(engine, log, params) <= 1, str(log)
    assert engine.stats.draft_tokens > 0


@pytest.mark.parametrize("min_confidence", [0.0, 0.02])
def test_a_step_with_a_trained_head(model, log, min_confidence):
    """Once for the drafts of all sequences together, once for their tokens."""
    draft = HeadDraft(DraftHead.for_model(model, torch.arange(3, 90)), min_confidence)
    engine = Engine(model, num_blocks=90, block_size=4, draft=draft, adaptive_drafts=False)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    assert waits_per_step(engine, log, params) <= 2, str(log)
    assert engine.stats.draft_tokens > 0


@pytest.mark.parametrize("name", ["lookup", "head"])
def test_a_step_with_trees(model, log, name):
    """As with chains: once for the trees of all sequences together, if they come from the GPU, and once for their tokens."""
    head = DraftHead.for_model(model, torch.arange(3, 90))
    draft, most = (LookupTree(), 1) if name == "lookup" else (HeadTree(head, min_confidence=0.0), 2)
    engine = Engine(model, num_blocks=90, block_size=4, draft=draft, adaptive_drafts=False)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    assert waits_per_step(engine, log, params) <= most, str(log)
    chunks = [chunk for record in engine.log[4:] for chunk in record.chunks]
    assert any(chunk.drafted > chunk.accepted for chunk in chunks)
    if name == "head":
        assert all(chunk.drafted in (0, 12) for chunk in chunks)


def waits_and_rounds(model, log, draft, tokens, options):
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 11, 5, 6]]).to("cuda")
    log.waits.clear()
    out = model.generate(
        ids, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, draft=draft,
        custom_generate=optinfer.speculative_decoding, adaptive_drafts=False, num_draft_tokens=4, **options,
    )  # fmt: skip
    return log.num_waits, len(out.statistics.rounds)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["lookup", "model", "head"])
def test_a_speculative_round(model, log, name, options):
    """Of two runs the longer waits more: by so much a round.

    A draft model is asked once more what is left of its cache, and a head how far it is sure.
    """
    head = HeadDraft(DraftHead.for_model(model, torch.arange(3, 90)), 0.02)
    draft = {"lookup": PromptLookupDraft(), "model": ModelDraft(model), "head": head}[name]
    (few, short), (many, long) = (waits_and_rounds(model, log, draft, n, options) for n in (8, 32))
    last = 1 if name == "head" else 0  # its last round may have room for one token, where no draft is asked for
    assert many - few <= (1 if name == "lookup" else 2) * (long - short) + last, str(log)
