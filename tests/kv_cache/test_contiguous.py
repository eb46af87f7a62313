"""Contiguous reservation and its waste, counted slot by slot; pages on the same trace."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optinfer.kv_cache import (
    ContiguousAllocator,
    PagedAllocator,
    Request,
    parallel_sampling_saving,
    shared_prefix_saving,
    sharegpt_like,
    simulate,
)
from optinfer.kv_cache.contiguous import SHAREGPT_OUTPUT_MEAN, SHAREGPT_PROMPT_MEAN

TOTAL = 16_384  # an A100-40GB has about 12 GB left for the cache of OPT-13B, 800 KiB per token


def test_the_trace_is_seeded_and_has_the_published_means():
    trace = sharegpt_like(20_000, seed=1)
    assert trace[:50] == sharegpt_like(50, seed=1) != sharegpt_like(50, seed=2)
    assert sum(r.prompt_len for r in trace) / len(trace) == pytest.approx(SHAREGPT_PROMPT_MEAN, rel=0.03)
    assert sum(r.output_len for r in trace) / len(trace) == pytest.approx(SHAREGPT_OUTPUT_MEAN, rel=0.03)


@pytest.mark.parametrize(("policy", "slots"), [("max", 64), ("pow2", 5 + 16), ("oracle", 5 + 11)])
def test_each_policy_counts_its_waste(policy, slots):
    a = ContiguousAllocator(100, policy, max_model_len=64)
    assert a.admit(0, Request(5, 11))
    assert a.pieces() == {0: (0, slots)}
    a.grow(0)
    usage = a.usage(waiting=True)
    assert (usage.used, usage.reserved, usage.internal) == (6, 10, slots - 16)
    assert usage.external == 100 - slots and usage.wasted == 0.94
    assert a.usage(waiting=False).external == 0


def test_a_hole_that_is_too_short_is_external_waste():
    a = ContiguousAllocator(30, "oracle")
    for i in range(3):
        assert a.admit(i, Request(5, 5))
    a.free(0)
    a.free(2)
    assert not a.admit(3, Request(5, 6))  # 20 slots free, in two holes of 10
    assert a.admit(3, Request(5, 5)) and a.pieces()[3] == (0, 10)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(ContiguousAllocator.POLICIES),
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 3)), max_size=40),
)
def test_pieces_never_overlap_and_every_slot_is_counted_once(policy, steps):
    a = ContiguousAllocator(100, policy, max_model_len=40)
    live = []
    for i, (prompt, output, frees) in enumerate(steps):
        if a.admit(i, Request(prompt, output)):
            live.append(i)
        for _ in range(min(frees, len(live))):
            a.free(live.pop(0))
        pieces = sorted(a.pieces().values())
        assert all(s + n <= t for (s, n), (t, _) in zip(pieces, [*pieces[1:], (100, 0)]))
        usage = a.usage(waiting=True)
        assert usage.used + usage.reserved + usage.internal + usage.external == 100


def test_pages_waste_under_4_percent_where_reservation_wastes_most():
    trace = sharegpt_like(400, seed=0)
    result = {p: simulate(trace, ContiguousAllocator(TOTAL, p)) for p in ContiguousAllocator.POLICIES}
    paged = simulate(trace, PagedAllocator(TOTAL))
    assert paged.usage.wasted < 0.04
    assert 0.6 < result["max"].usage.wasted < 0.8
    assert result["max"].usage.wasted > result["pow2"].usage.wasted > result["oracle"].usage.wasted > 0.3
    assert paged.batch > 1.5 * result["oracle"].batch > 3 * result["max"].batch
    for r in (*result.values(), paged):
        assert r.usage.effective + r.usage.wasted == pytest.approx(1)


def test_every_request_is_served_in_full_whatever_is_preempted():
    trace = [Request(3, 9)] * 6

    class Counting(PagedAllocator):
        grown = 0

        def grow(self, seq_id):
            ok = super().grow(seq_id)
            self.grown += ok
            return ok

    allocator = Counting(40, block_size=4)
    result = simulate(trace, allocator)
    assert allocator.grown == 6 * 9 and result.preemptions > 0
    assert allocator.manager.num_free_blocks == allocator.manager.num_blocks


def test_sharing_saves_what_the_paper_saw():
    trace = sharegpt_like(60, seed=0)
    savings = [parallel_sampling_saving(trace, n) for n in (2, 4, 6)]
    assert savings == sorted(savings)
    assert savings[0] > 0.10 and savings[2] < 0.45  # ShareGPT in the paper: 16.2 to 30.5 %
    assert parallel_sampling_saving(trace[:5], 1) == 0
    # By hand: a prompt of two blocks and one token each: 6 blocks separate, 2 + 2 shared.
    assert parallel_sampling_saving([Request(8, 1)], 2, block_size=4) == pytest.approx(1 - 4 / 6)


def test_a_shared_system_prompt_is_stored_once():
    # By hand: 2 blocks of prefix, then 1 of its own each: 9 blocks separate, 2 + 3 shared.
    assert shared_prefix_saving([Request(2, 2)] * 3, 8, block_size=4) == pytest.approx(1 - 5 / 9)
    # A prefix that fills no block is not shared; of one that fills 1.5, one block is.
    assert shared_prefix_saving([Request(2, 2)] * 3, 3, block_size=4) == 0
    assert shared_prefix_saving([Request(1, 1)] * 3, 6, block_size=4) == pytest.approx(1 - 4 / 6)
    trace = sharegpt_like(40, seed=1)
    savings = [shared_prefix_saving(trace, n) for n in (64, 256, 1024)]
    assert savings == sorted(savings) and 0 < savings[0] < savings[2] < 1
    with pytest.raises(ValueError, match="prefix_len"):
        shared_prefix_saving(trace, 0)


def test_bad_arguments_are_refused():
    for call, message in [
        (lambda: ContiguousAllocator(10, "best"), "policy must be one of"),
        (lambda: ContiguousAllocator(0), "total"),
        (lambda: sharegpt_like(0), "num_requests"),
        (lambda: ContiguousAllocator(100, max_model_len=8).admit(0, Request(5, 5)), "exceeds max_model_len"),
        (lambda: simulate([Request(50, 5)], PagedAllocator(16)), "does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
