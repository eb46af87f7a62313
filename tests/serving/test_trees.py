"""Draft trees in the engine: the text is that without drafts, whatever is drafted; nothing leaks, and mistakes are noticed."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chisquare

from optinfer.kv_cache.pool import KVPool
from optinfer.serving import Engine, SamplingParams
from optinfer.serving.paged_batch import Chunk, PagedBatch
from optinfer.speculative import DraftTree, HeadTree, LookupTree, TreeDraft, tree_decoding
from optinfer.speculative.draft_head import DraftHead

PROMPTS = [[7, 8, 9] * 6, [30, 31], [40] * 11, [50, 51, 52, 53, 54], [60]]


def serve(model, draft, prompts=PROMPTS, params=None, **options):
    options = {"num_blocks": 80, "block_size": 4, "adaptive_drafts": False, "num_draft_tokens": 6} | options
    engine = Engine(model, draft=draft, **options)
    done = engine.generate(prompts, params or SamplingParams(max_tokens=14))
    engine.check_integrity()
    assert engine.manager.num_free_blocks == engine.manager.num_blocks
    return engine, done


@pytest.fixture
def draft(reference, knowing_tree):
    return knowing_tree([prompt + reference(prompt, 14) for prompt in PROMPTS])


@pytest.fixture
def moves(monkeypatch):
    """What the steps moved."""
    found = []
    move = KVPool.move_tokens
    monkeypatch.setattr(KVPool, "move_tokens", lambda pool, moves: (found.extend(moves), move(pool, moves)))
    return found


@pytest.mark.parametrize("fuse", [True, False], ids=["lean", "modules"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "triton"])
def test_the_text_is_that_of_generate(model, reference, draft, moves, fuse, backend):
    engine, done = serve(model, draft, fuse=fuse, attention_backend=backend)
    assert [c.token_ids for c in done] == [reference(p, 14) for p in PROMPTS]
    stats = engine.stats
    assert stats.draft_tokens > stats.accepted_tokens > 20 and len(moves) > 10
    assert stats.draft_tokens == sum(c.metrics.draft_tokens for c in done)
    assert stats.accepted_tokens == sum(c.metrics.accepted_tokens for c in done)
    chunks = [chunk for record in engine.log for chunk in record.chunks if chunk.drafted]
    assert max(chunk.emitted for chunk in chunks) > 3  # several tokens of a pass
    assert {chunk.emitted - chunk.accepted for chunk in chunks} <= {0, 1}  # 0: the text ends within the path


@pytest.mark.parametrize("blocks", [12, 60], ids=["preempted", "from the prefix cache"])
def test_chunks_preemption_and_a_warm_prefix_cache(model, reference, draft, moves, blocks):
    engine = Engine(model, num_blocks=blocks, block_size=4, max_batched_tokens=17, draft=draft, adaptive_drafts=False)
    for _ in range(2):  # the second time with hits: a rejected node in the cache would show
        done = engine.generate(PROMPTS, SamplingParams(max_tokens=14))
        assert [c.token_ids for c in done] == [reference(p, 14) for p in PROMPTS]
        engine.check_integrity()
    assert moves and (engine.stats.preemptions if blocks == 12 else engine.stats.cached_tokens) > 0
    assert engine.manager.num_free_blocks == blocks
    assert not any(member._own for member in engine.speculator.drafts)


def test_a_cancelled_request_leaves_nothing(model, reference, draft):
    engine = Engine(model, num_blocks=60, block_size=4, draft=draft, adaptive_drafts=False)
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=14)) for prompt in PROMPTS]
    done = [c for _ in range(3) for c in engine.step()]
    for request_id in ids[::2]:
        if request_id in engine.request_ids:
            engine.cancel(request_id)
        engine.check_integrity()
    while engine.has_work:
        done += engine.step()
        engine.check_integrity()
    for completion in done:
        expected = reference(PROMPTS[ids.index(completion.request_id)], 14)
        assert completion.token_ids == expected[: len(completion.token_ids)]
        assert completion.finish_reason == "cancelled" or completion.token_ids == expected
    assert engine.manager.num_free_blocks == 60


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.9, "seed": 3}, {"temperature": 1.3, "top_p": 0.8, "seed": 4}, {"temperature": 1.0, "n": 4, "seed": 5}],
    ids=["plain", "filtered", "forked"],
)  # fmt: skip
def test_a_sample_is_the_one_without_drafts(model, knowing_tree, moves, params):
    """Each token is decided by the random number of its place, whatever is drafted."""
    params = SamplingParams(max_tokens=14, ignore_eos=True, **params)
    _, plain = serve(model, None, params=params, num_blocks=120)
    texts = [PROMPTS[i // params.n] + c.token_ids for i, c in enumerate(plain)]
    engine, done = serve(model, knowing_tree(texts), params=params, num_blocks=120)
    assert [c.token_ids for c in done] == [c.token_ids for c in plain]
    assert engine.stats.accepted_tokens > 20 and moves


def see_all_before(tree):
    return torch.ones(len(tree) + 1, len(tree) + 1, dtype=torch.bool, device="cpu").tril()


def see_nobody(tree):
    return torch.eye(len(tree) + 1, dtype=torch.bool, device="cpu")


def nothing_moves(pool, moves): ...


class SmallTree(TreeDraft):
    """The same second choices everywhere, for a vocabulary of five."""

    on_host = True

    def propose_tree(self, input_ids, num_tokens=None):
        return DraftTree.of_chains(branch[:num_tokens] for branch in ([3, 4], [1, 0], [4, 4], [1, 2]))


@pytest.mark.parametrize("mistaken", [False, True], ids=["right", "mistaken"])
def test_the_law_of_a_sampled_text_is_the_models(build_model, monkeypatch, mistaken):
    """All texts of three tokens over a vocabulary of five, counted against their exact chances."""
    config = {"vocab_size": 5, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}  # fmt: skip
    model = build_model(transformers.LlamaConfig(**config, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)  # tokens should depend on those before them
    texts = torch.tensor([[2, 3, *rest] for rest in product(range(5), repeat=3)])
    with torch.no_grad():
        laws = model(texts).logits[:, 1:4].double().softmax(-1)
    chances = laws.gather(-1, texts[:, 2:, None])[..., 0].prod(-1)
    if mistaken:
        monkeypatch.setattr(DraftTree, "mask", see_nobody)
    engine = Engine(model, num_blocks=700, block_size=2, draft=SmallTree(), adaptive_drafts=False, max_num_seqs=60,
                    max_batched_tokens=2048)  # fmt: skip
    counts: Counter = Counter()
    for seed in range(80):
        params = SamplingParams(max_tokens=3, temperature=1.0, n=60, seed=seed)
        counts.update(tuple(c.token_ids) for c in engine.generate([[2, 3]], params))
    total = sum(counts.values())
    expected = chances / chances.sum() * total
    observed = torch.tensor([float(counts[tuple(text[2:].tolist())]) for text in texts])
    often = expected > 5  # the others are counted together
    cells = [torch.cat([x[often], x[~often].sum()[None]]).tolist() for x in (observed, expected)]
    found = chisquare(*cells)
    assert engine.stats.accepted_tokens > total / 10
    assert (found.pvalue < 1e-6) if mistaken else (found.pvalue > 1e-4)


@pytest.mark.parametrize(
    ("holder", "name", "mistake"),
    [
        (DraftTree, "mask", see_all_before),
        (DraftTree, "mask", see_nobody),
        (KVPool, "move_tokens", nothing_moves),
        (Chunk, "positions", property(lambda chunk: np.arange(chunk.start, chunk.end))),
    ],
    ids=["nodes see all before them", "nodes see no ancestor", "accepted nodes stay", "positions by place"],
)
def test_the_comparison_can_fail(model, reference, draft, monkeypatch, holder, name, mistake):
    monkeypatch.setattr(holder, name, mistake)
    _, done = serve(model, draft)
    assert [c.token_ids for c in done] != [reference(p, 14) for p in PROMPTS]


def test_a_text_ends_within_a_branch(model, reference, draft):
    text = reference(PROMPTS[0], 14)
    end = text[6]
    _, (done,) = serve(model, draft, PROMPTS[:1], SamplingParams(max_tokens=14, stop_token_ids=(end,)))
    assert done.token_ids == text[: text.index(end) + 1] and done.finish_reason == "stop"
    for most in (1, 2, 5):
        _, (done,) = serve(model, draft, PROMPTS[:1], SamplingParams(max_tokens=most))
        assert done.token_ids == text[:most] and done.finish_reason == "length"


def test_a_move_that_fails_loses_no_request(model, reference, draft, monkeypatch):
    move, fails = KVPool.move_tokens, [True]

    def failing(pool, moves):
        if moves and fails.pop() if fails else False:
            raise MemoryError("no room")
        move(pool, moves)

    engine = Engine(model, num_blocks=80, block_size=4, draft=draft, adaptive_drafts=False)
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=14)) for prompt in PROMPTS]
    monkeypatch.setattr(KVPool, "move_tokens", failing)
    done, failures = {}, 0
    while engine.has_work:
        try:
            done |= {c.request_id: c.token_ids for c in engine.step()}
        except MemoryError:
            failures += 1
    assert failures == 1
    assert [done[request_id] for request_id in ids] == [reference(p, 14) for p in PROMPTS]


@pytest.mark.parametrize(
    "drafts",
    [[LookupTree()], [LookupTree(), "head"], ["prompt_lookup", "head"]],
    ids=["lookup", "both", "chain and head"],
)
def test_the_drafters_of_trees_that_we_have(model, reference, drafts):
    """Alone and in turn, with chains beside them; an untrained head guesses at random."""
    torch.manual_seed(3)
    head = HeadTree(DraftHead.for_model(model, torch.arange(3, 90)), min_confidence=0.0)
    engine, done = serve(model, [head if one == "head" else one for one in drafts])
    assert [c.token_ids for c in done] == [reference(p, 14) for p in PROMPTS]
    assert engine.stats.draft_tokens > 0


@pytest.mark.parametrize("min_confidence", [0.0, 0.02])
def test_a_head_sees_what_it_sees_in_tree_decoding(model, min_confidence):
    """One prompt in chunks, then rounds of trees: the same trees as one text alone gets."""
    said = []

    class Listening(HeadTree):
        def as_tree(self, marked):
            tree = super().as_tree(marked)
            said[-1].append((tree.tokens, tree.parents))
            return tree

    torch.manual_seed(3)
    head = DraftHead.for_model(model, torch.arange(3, 90))
    prompt = [7, 8, 9, *range(20, 40), 50]
    said.append([])
    _, (done,) = serve(model, Listening(head, 4, 3, min_confidence), [prompt],
                       SamplingParams(max_tokens=14, ignore_eos=True), max_batched_tokens=13)  # fmt: skip
    said.append([])
    out = tree_decoding(model, torch.tensor([prompt]), Listening(head, 4, 3, min_confidence), 14)
    trees = [[tree for tree in trees if len(tree[0])] for trees in said]
    rounds = list(zip(*trees))[:-3]  # near the end each cuts its drafts in its own way
    assert len(rounds) > 5 and all(a == b for a, b in rounds)
    assert done.token_ids[: out.sequences.shape[1] - len(prompt)] == out.sequences[0, len(prompt) :].tolist()


def test_trees_that_are_always_wrong_are_given_up(model, knowing_tree):
    engine = Engine(model, num_blocks=60, block_size=4, draft=knowing_tree([]))
    engine.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=60, ignore_eos=True))
    drafted = [sum(chunk.drafted for chunk in record.chunks) for record in engine.log]
    assert sum(drafted[:5]) > 10 and sum(drafted[10:]) < len(drafted[10:])  # then a try now and then
    assert engine.speculator._breadth["KnowingTree"] > 1  # so a level costs more than a chain's


def test_layers_with_a_window_refuse_trees(build_model):
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    model = build_model(transformers.MistralConfig(**shape, sliding_window=8))
    with pytest.raises(
        ValueError, match="draft LookupTree drafts trees, and a layer of this MistralForCausalLM sees a window"
    ):
        Engine(model, num_blocks=30, draft=LookupTree())
    Engine(model, num_blocks=30, draft="prompt_lookup")
    chunk = Chunk([5, 6, 7], 0, [0], DraftTree.of_chains([[6], [7]]))
    with pytest.raises(ValueError, match="layers that see a window"):
        PagedBatch([chunk], [3], KVPool(1, 2, 16, 4, dtype=torch.float32), windows=[8])


def test_places_and_positions_of_a_chunk():
    tree = DraftTree.of_chains([[6, 7], [8]])
    batch = PagedBatch([Chunk([5, *tree.tokens], 9, [4, 2, 0, 1], tree), Chunk([1, 2], 0, [3])], [4, 1],
                       KVPool(1, 2, 16, 5, 4, dtype=torch.float32))  # fmt: skip
    assert batch.position_ids[0].tolist() == [9, 10, 11, 10, 0, 1]
    assert batch.slots.tolist() == [1, 2, 3, 4, 12, 13]
    assert batch.tree_mask.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, False, False, True],
        [True, False, False, False],
        [True, True, False, False],
    ]
