"""Serving in parts: routing, blocks that travel, and one model in two processes. The text is always the one of one engine."""

import copy
import operator
import pickle
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optinfer.kv_cache import kv_bytes_per_token
from optinfer.serving import Engine, Rehearsal, SamplingParams, StepCost
from optinfer.serving.handover import give_blocks, take_blocks
from optinfer.serving.processes import run_in_processes
from optinfer.serving.router import Router
from optinfer.serving.split import prefill_and_decode, serve_in_parts
from optinfer.serving.tensor_parallel import all_reduce_bytes, parts, ring_bytes, shard
from optinfer.serving.watch import without_lookers
from tests.devices import cpu_only

pytestmark = cpu_only  # models travel to processes that hold them on the CPU

OPTIONS = {"num_blocks": 32, "block_size": 4}


def prompts(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 90) for _ in range(rng.randint(1, longest))] for _ in range(count)]


# ---------------------------------------------------------------------------------------------- routing


def families(count: int) -> list[list[int]]:
    """Prompts of two long beginnings, in an order that turns cannot guess."""
    rng = random.Random(1)
    heads = [[a] * 40 for a in (5, 6)]
    return [heads[rng.random() < 0.5] + [rng.randrange(10, 90) for _ in range(5)] for _ in range(count)]


def route(policy: str, requests: list[list[int]], **options) -> Router:
    router = Router([Rehearsal(StepCost(0.01, 0.001), num_blocks=200) for _ in range(2)], policy, **options)
    for tokens in requests:
        router.add_request(tokens, SamplingParams(max_tokens=4, ignore_eos=True))
        router.step()
    while router.has_work:
        router.step()
    return router


def test_alike_prompts_go_where_their_beginning_is() -> None:
    requests = families(20)
    router = route("prefix", requests)
    homes = {(tokens[0], engine) for tokens, engine in zip(requests, router.assigned)}
    assert len(homes) == 2 and len({engine for _, engine in homes}) == 2
    cached = {
        policy: sum(e.stats.cached_tokens for e in route(policy, requests).engines) for policy in ("prefix", "turns")
    }
    assert (
        cached["prefix"] == 18 * 32 and cached["turns"] == 16 * 32
    )  # two beginnings computed twice; hits are whole blocks


def test_a_popular_beginning_does_not_drown_one_engine() -> None:
    requests = [[5] * 40 + [i] for i in range(10, 30)]
    assert set(route("prefix", requests).assigned) == {0}
    assert set(route("prefix", requests, max_imbalance=2).assigned) == {0, 1}


def test_routed_text_is_the_same(model, reference) -> None:
    router = Router([Engine(model, **OPTIONS) for _ in range(2)], "load")
    asked = prompts(6)
    names = [router.add_request(p, SamplingParams(max_tokens=6)) for p in asked]
    done = {}
    while router.has_work:
        done.update({c.request_id: c.token_ids for c in router.step()})
    assert [done[name] for name in names] == [reference(p, 6) for p in asked]
    with pytest.raises(ValueError, match="policy must be one of prefix, load, turns"):
        Router(router.engines, "luck")


# ---------------------------------------------------------------------------------------------- blocks that travel


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_handed_over_blocks_are_not_computed_again(model, reference, kv_dtype) -> None:
    first, second = (Engine(model, kv_dtype=kv_dtype, **OPTIONS) for _ in range(2))
    for prompt in prompts(5, seed=3):
        first.generate([prompt], SamplingParams(max_tokens=1))
        blocks = take_blocks(first, prompt)
        assert len(blocks.token_ids) == len(prompt) // 4 * 4
        if blocks.token_ids:
            assert blocks.nbytes == len(blocks.token_ids) * kv_bytes_per_token(model.config, kv_dtype or torch.float32)
        assert give_blocks(second, blocks) == len(blocks.token_ids)
        [done] = second.generate([prompt], SamplingParams(max_tokens=5))
        assert done.metrics.cached_tokens == (len(prompt) - 1) // 4 * 4
        if kv_dtype is None:
            assert done.token_ids == reference(prompt, 5)
    first.check_integrity()
    second.check_integrity()


def test_damaged_blocks_change_the_text(model, reference) -> None:
    """The receiver really reads what it was given."""
    first, second = (Engine(model, **OPTIONS) for _ in range(2))
    prompt = list(range(3, 20))
    first.generate([prompt], SamplingParams(max_tokens=1))
    blocks = take_blocks(first, prompt)
    blocks.tensors[1].mul_(-1)
    give_blocks(second, blocks)
    assert second.generate([prompt], SamplingParams(max_tokens=8))[0].token_ids != reference(prompt, 8)
    with pytest.raises(ValueError, match="do not fit pages"):
        give_blocks(Engine(model, num_blocks=32, block_size=8), blocks)


# ---------------------------------------------------------------------------------------------- tensor parallelism


def test_a_model_with_hooks_that_look_travels(model) -> None:
    watched = copy.deepcopy(model)
    watched(torch.tensor([[5, 6]]), output_hidden_states=True)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(watched)
    sent = pickle.loads(pickle.dumps(without_lookers(watched)))
    for same in (sent, watched, without_lookers(watched)):  # and still answers when it is asked for hidden states
        found = same(torch.tensor([[5, 6]]), output_hidden_states=True)
        assert len(found.hidden_states) == 3 and torch.equal(found.logits, watched(torch.tensor([[5, 6]])).logits)


@given(st.integers(0, 60), st.integers(1, 8))
def test_parts_are_even_and_complete(total: int, processes: int) -> None:
    found = parts(total, processes)
    assert [i for part in found for i in part] == list(range(total))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_ring_formula() -> None:
    assert ring_bytes(1000, 1) == 0 and ring_bytes(1000, 2) == 1000 and ring_bytes(1000, 4) == 1500


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tied"), [(9, 3, True), pytest.param(6, 2, False, marks=pytest.mark.slow)]
)  # fmt: skip
def test_two_processes_speak_as_one(build_model, hf_generate, heads: int, kv_heads: int, tied: bool) -> None:
    """Three KV heads do not divide by two: one process holds two of them, and twice the pages."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=54, intermediate_size=81, num_hidden_layers=2, num_attention_heads=heads, head_dim=8,
        num_key_value_heads=kv_heads, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = build_model(config)
    asked = prompts(4, seed=6)
    shares = serve_in_parts(model, asked, 6, **OPTIONS)
    for share in shares:
        assert share.token_ids == [hf_generate(model, p, 6) for p in asked]
        assert share.sent.reduce_bytes == all_reduce_bytes(config, 1, 2, 4) * share.computed_tokens
        assert share.sent.gather_bytes == share.logit_rows * -(-97 // 2) * 4
    assert shares[0].page_bytes == shares[1].page_bytes * len(parts(kv_heads, 2)[0]) // len(parts(kv_heads, 2)[1])
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # small, and everywhere
    assert sum(share.parameters for share in shares) == sum(p.numel() for p in model.parameters()) + norms
    with pytest.raises(ValueError, match="KV heads cannot be dealt to 4"):
        shard(model, 0, 4)


def test_prefill_in_one_process_decode_in_another(model, reference) -> None:
    asked = prompts(3, seed=7)
    handed = prefill_and_decode(model, asked, 6, **OPTIONS)
    assert handed.token_ids == [reference(p, 6) for p in asked]
    full = sum(len(p) // 4 * 4 for p in asked)
    assert handed.handed_bytes == full * kv_bytes_per_token(model.config, torch.float32)
    assert handed.prefill_tokens == sum(map(len, asked))


@pytest.mark.slow
def test_processes_return_by_rank_and_fail_with_a_traceback() -> None:
    assert run_in_processes(operator.sub, 2) == [-2, -1]
    with pytest.raises(RuntimeError, match=r"(?s)process \d failed.*TypeError"):
        run_in_processes(operator.sub, 2, "one argument too many")
