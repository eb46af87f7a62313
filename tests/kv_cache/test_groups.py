"""Groups of layers over one pool: the right layers, the right number of pages, and the same attention as without pages."""

import random

import pytest
import torch

from optinfer import memory
from optinfer.kv_cache import (
    DuplicateSequence,
    KVPool,
    LayerCache,
    LayerGroup,
    LayerGroupManager,
    OutOfBlocks,
    UnknownSequence,
    layer_groups,
    paged_attention,
)

FULL, SLIDING = LayerCache("full", 2, 8, 8), LayerCache("sliding", 2, 8, 8, window=7)


def cache_of(name: str) -> list[LayerCache]:
    return [layer for count, layer in memory.MODELS[name].cache for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama-3-8B", {"full": 1}),
        ("Gemma-3-27B", {"sliding": 26, "full": 5}),  # 52 and 10 layers, in twos
        ("GPT-OSS-20B", {"sliding": 1, "full": 1}),
        ("Llama-4-Scout", {"chunked": 3, "full": 1}),
        ("Kimi-Linear-48B", {"linear": 20, "latent": 7}),
        ("Qwen3-Next-80B", {"linear": 3, "full": 1}),
    ],
)
def test_groups_of_models(name: str, expected: dict[str, int]) -> None:
    cache = cache_of(name)
    groups = layer_groups(cache)
    found: dict[str, int] = {}
    for group in groups:
        found[group.cache.kind] = found.get(group.cache.kind, 0) + 1
        assert all(cache[layer] == group.cache for layer in group.layers)
    assert found == expected and len({len(group.layers) for group in groups}) == 1
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(cache)))


@pytest.mark.parametrize("name", ["Gemma-3-27B", "GPT-OSS-20B", "Llama-4-Scout", "Qwen3-Next-80B", "DeepSeek-V3"])
def test_pages_hold_what_the_formula_counts(name: str) -> None:
    """At least the formula's bytes, and less than a page more per group for what is not whole pages."""
    groups = layer_groups(cache_of(name))
    manager = LayerGroupManager(groups, 1, 16)
    page = max(group.bytes_per_token for group in groups) * 16
    for length in (1, 100, 128, 129, 5000, 40_000):
        pages = sum(manager.num_pages(group, length) for group in range(len(groups)))
        counted = memory.MODELS[name].kv_bytes(length)
        assert counted <= pages * page < counted + len(groups) * page


def test_a_layer_that_shares_has_no_pages() -> None:
    groups = layer_groups([FULL, SLIDING, LayerCache("shared"), LayerCache("shared")])
    assert groups == (LayerGroup(FULL, (0,)), LayerGroup(SLIDING, (1,)))
    manager = LayerGroupManager(groups, 4)
    assert manager.place(1) == (1, 0)
    with pytest.raises(ValueError, match="layer 2 has no pages of its own"):
        manager.place(2)


def attend_in_pages(ring_error: int = 0) -> float:
    """The largest difference between attention over pages and over everything, with chunks of a prompt and then single tokens."""
    torch.manual_seed(0)
    cache = [SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING]
    groups = layer_groups(cache)
    manager = LayerGroupManager(groups, 40, 4, chunk=5)
    if ring_error:
        right = manager.num_pages
        manager.num_pages = lambda g, n: min(right(g, n), right(g, 10_000) - ring_error) if g < 2 else right(g, n)
    pool = KVPool(len(groups[0].layers), 2, 8, 40, 4, dtype=torch.float32, device=torch.get_default_device())
    history = {s: [[torch.empty(0, 2, 8)] * 2 for _ in cache] for s in "AB"}
    worst = 0.0
    for count in (5, 5, 3, *[1] * 17, 4, 1, 2, 5):
        for s in "AB":
            (manager.append if s in manager.sequence_ids else manager.allocate)(s, count)
            length = manager.num_tokens(s)
            positions = torch.arange(length - count, length)
            for layer, kept in enumerate(cache):
                q, k, v = torch.randn(count, 4, 8), torch.randn(count, 2, 8), torch.randn(count, 2, 8)
                group, place = manager.place(layer)
                table = torch.tensor([manager.block_table(s, group)])
                pool.write(place, table[0, positions // 4] * 4 + positions % 4, k, v)
                got = paged_attention(
                    q, *pool.layer(place), table, torch.tensor([length]), backend="reference",
                    query_starts=torch.tensor([0, count]), max_queries=count, window=kept.window,
                )  # fmt: skip
                keys, values = (torch.cat(pair) for pair in zip(history[s][layer], (k, v)))
                history[s][layer] = [keys, values]
                seen = torch.arange(length) <= positions[:, None]
                if kept.window:
                    seen &= torch.arange(length) > positions[:, None] - kept.window
                wide = [x.repeat_interleave(2, 1).transpose(0, 1).double() for x in (keys, values)]
                wanted = torch.nn.functional.scaled_dot_product_attention(
                    q.transpose(0, 1).double(), *wide, attn_mask=seen
                ).transpose(0, 1)
                worst = max(worst, float((got.double() - wanted).abs().max()))
        manager.check_integrity()
    assert manager.num_tokens("A") == 42
    return worst


def test_attention_over_the_groups_pages_is_the_models() -> None:
    assert attend_in_pages() < 1e-5


def test_a_ring_one_page_shorter_is_noticed() -> None:
    assert attend_in_pages(ring_error=1) > 1e-2


def test_windowed_groups_stop_growing_and_all_pages_come_back() -> None:
    manager = LayerGroupManager(layer_groups([FULL, SLIDING]), 30, 4)
    manager.allocate("A", 1)
    for length in range(2, 80):
        manager.append("A", 1)
        assert len(manager.pages("A", 0)) == -(-length // 4)
        assert len(manager.pages("A", 1)) == min(-(-length // 4), 2)  # 7 tokens, in pages of 4
        assert len(manager.block_table("A", 1)) == -(-length // 4)
    manager.free("A")
    assert manager.num_free_blocks == 30 and manager.sequence_ids == []


def test_refusals_change_nothing() -> None:
    with pytest.raises(ValueError, match="cache must hold tokens of one size per layer, found 16, 32"):
        layer_groups([FULL, LayerCache("sliding", 1, 8, 8, window=7)])
    with pytest.raises(ValueError, match="found none"):
        layer_groups([LayerCache("linear", state=3)])
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        LayerGroupManager(layer_groups([FULL]), 3, chunk=0)
    manager = LayerGroupManager(layer_groups([FULL, SLIDING]), 3, 4, chunk=5)
    manager.allocate("A", 4)
    for error, call, message in [
        (DuplicateSequence, lambda: manager.allocate("A", 1), "'A' is allocated already"),
        (UnknownSequence, lambda: manager.append("B", 1), "'B' is not allocated"),
        (UnknownSequence, lambda: manager.free("B"), "'B' is not allocated"),
        (OutOfBlocks, lambda: manager.append("A", 1), "needs 2 new blocks, 1 available"),
        (OutOfBlocks, lambda: manager.allocate("B", 1), "needs 2 new blocks, 1 available"),
        (ValueError, lambda: manager.append("A", 6), r"num_tokens must be 1 to 5 \(chunk\), got 6"),
        (ValueError, lambda: manager.append("A", 0), "num_tokens must be at least 1, got 0"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert manager.num_free_blocks == 1 and manager.num_tokens("A") == 4


def test_any_history_balances() -> None:
    draw = random.Random(1)
    manager = LayerGroupManager(layer_groups([FULL, SLIDING, SLIDING, LayerCache("linear", state=900)]), 40, 4, chunk=9)
    refused = 0
    for step in range(800):
        known = manager.sequence_ids
        before = manager.num_free_blocks
        try:
            if not known or draw.random() < 0.2:
                manager.allocate(step, draw.randint(1, 9))
            elif draw.random() < 0.12:
                manager.free(draw.choice(known))
            else:
                manager.append(draw.choice(known), draw.randint(1, 9))
        except OutOfBlocks:
            refused += 1
            assert manager.num_free_blocks == before
            manager.free(draw.choice(known))
        manager.check_integrity()
        held = [p for s in manager.sequence_ids for g in range(4) for p in manager.pages(s, g)]
        assert len(held) == len(set(held)) == 40 - manager.num_free_blocks
        for s in manager.sequence_ids:
            assert [len(manager.pages(s, g)) for g in range(4)] == [
                manager.num_pages(g, manager.num_tokens(s)) for g in range(4)
            ]
    assert refused > 10
