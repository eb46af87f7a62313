"""Buckets and padding of captured decode steps, with a stand-in for the graph: this part needs no GPU."""

import itertools

import pytest
import torch

from optinfer.kv_cache.pool import KVPool
from optinfer.serving import Engine, SamplingParams
from optinfer.serving.cuda_graphs import GraphedDecode, batch_sizes
from optinfer.serving.lean_decoder import LeanDecoder
from optinfer.serving.paged_batch import Chunk
from tests.devices import cpu_only

pytestmark = cpu_only  # on a GPU the graphs are real: see the tests marked `gpu`


class Replayed:
    """Computes anew at each replay, from whatever the static tensors hold then: what a CUDA graph does."""

    captured = 0

    def __init__(self, compute):
        Replayed.captured += 1
        self.compute = compute
        compute()

    def replay(self):
        return self.compute()


def with_graphs(engine, capture=Replayed):
    """Give an engine on a CPU the GPU's path."""
    runner, blocks = engine.runner, engine.manager.num_blocks
    runner.pool = KVPool.for_config(runner.model.config, blocks + 1, engine.manager.block_size, dtype=torch.float32)
    runner.backend = "sdpa"
    runner.decoder = LeanDecoder(runner.model, runner.model.lm_head)
    runner.graphs = GraphedDecode(runner.pool, runner.forward, 60, engine.scheduler.max_num_seqs, "sdpa", capture)
    return engine


@pytest.mark.parametrize("most", [1, 3, 8, 20, 64])
def test_batch_sizes(most):
    sizes = batch_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    assert {1, 2, 4, 8} & set(range(1, most + 1)) <= set(sizes)
    assert all(b - a <= 8 for a, b in itertools.pairwise(sizes))


def test_which_steps_are_captured(model):
    engine = with_graphs(Engine(model, num_blocks=30, block_size=4, max_num_seqs=20))
    graphs = engine.runner.graphs

    def step(*positions):
        return [Chunk([5], position, list(range(position // 4 + 1))) for position in positions]

    assert graphs.table_width == 15  # room for 60 tokens in blocks of 4
    assert graphs.takes(step(0, 7), [1, 1])
    assert not graphs.takes(step(*[0] * 21), [1] * 21)
    assert not graphs.takes([Chunk([5, 6], 0, [0])], [1])  # a prompt, or drafts
    assert not graphs.takes(step(4), [0])


@pytest.mark.parametrize("policy", ["continuous", "prefill_first"])
def test_padded_steps_give_the_text_of_generate(model, reference, policy):
    prompts = [[i, i + 1, i + 2, i + 3, i + 4] for i in range(3, 33, 5)]
    engine = with_graphs(Engine(model, num_blocks=11, block_size=4, policy=policy))
    Replayed.captured = 0
    done = engine.generate(prompts, SamplingParams(max_tokens=20))
    assert [c.token_ids for c in done] == [reference(p, 20) for p in prompts]
    assert engine.stats.preemptions > 0
    assert 1 < Replayed.captured <= 4  # sizes, not contexts


def test_the_comparison_can_fail(model, reference):
    """A graph that never looks at its inputs again must not pass."""

    class Frozen(Replayed):
        def __init__(self, compute):
            self.output = compute()

        def replay(self):
            return self.output

    engine = with_graphs(Engine(model, num_blocks=30, block_size=4), Frozen)
    (done,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=12))
    assert done.token_ids != reference([5, 6, 7], 12)


def test_padding_touches_no_block_of_a_request(model):
    engine = with_graphs(Engine(model, num_blocks=8, block_size=4))
    engine.runner.pool.keys.fill_(7.0)
    engine.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=4, ignore_eos=True))  # three are padded to four
    pool = engine.runner.pool
    assert (pool.keys[:, 8] != 7).any()  # the scratch block took the padding's
    untouched = [block for block in range(8) if bool((pool.keys[:, block] == 7).all())]
    assert len(untouched) == 8 - engine.stats.peak_used_blocks


def test_graphs_need_a_gpu(model):
    with pytest.raises(ValueError, match="cuda_graphs"):
        Engine(model, num_blocks=4, cuda_graphs=True)


def test_compile_needs_the_lean_decoder(model):
    with pytest.raises(ValueError, match="compile"):
        Engine(model, num_blocks=4, fuse=False, compile=True)


def test_a_compiled_decoder_gives_the_same_text(model, reference):
    engine = Engine(model, num_blocks=30, block_size=4, attention_backend="sdpa")
    decoder = torch.compile(engine.runner.decoder, backend="eager")  # traced, not translated
    engine.runner.decoder, engine.runner._compile = decoder, True
    prompts = [[5, 6, 7], [9] * 7]
    done = engine.generate(prompts, SamplingParams(max_tokens=6))
    assert [c.token_ids for c in done] == [reference(p, 6) for p in prompts]


def test_what_looks_for_outliers_is_not_captured_by_default(model):
    """How many features stay in 16 bits is read from the GPU in every step, which ends a capture."""
    import copy

    from optinfer import quantize
    from optinfer.serving.model_runner import has_outliers

    assert not has_outliers(model)
    assert has_outliers(quantize(copy.deepcopy(model), "llm_int8", progress=False))
    assert not has_outliers(quantize(copy.deepcopy(model), "int8", progress=False))
