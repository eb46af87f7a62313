"""The scheduler without a model: order, budget, and the bugs that other small engines had."""

import pytest

from optinfer.kv_cache import BlockManager
from optinfer.serving import Request, RequestMetrics, SamplingParams, Scheduler, Sequence


def make(num_blocks=16, block_size=4, **options):
    return Scheduler(BlockManager(num_blocks, block_size), **options)


def add(scheduler, name, tokens, **params):
    request = Request(name, list(tokens), SamplingParams(**{"max_tokens": 8, **params}), arrival=0.0)
    sequence = Sequence(request, 0, list(tokens), RequestMetrics(0.0), forked=request.params.n == 1)
    scheduler.add(sequence)
    return sequence


def step(scheduler, token=9):
    """Schedule, and pretend that the model answered `token` wherever it was asked."""
    schedule = scheduler.schedule()
    for chunk in schedule.chunks:
        samples = chunk.samples
        scheduler.settle(chunk, [])
        if samples:
            chunk.sequence.token_ids.append(token)
    scheduler.manager.check_integrity()
    return [(c.sequence.request.request_id, c.start, c.num_tokens) for c in schedule.chunks]


def test_prompts_come_in_chunks_beside_decoding():
    s = make(max_batched_tokens=6)
    add(s, "a", range(4))
    add(s, "b", range(20, 29))
    assert step(s) == [("a", 0, 4), ("b", 0, 2)]
    assert step(s) == [("a", 4, 1), ("b", 2, 5)]
    assert step(s) == [("a", 5, 1), ("b", 7, 2)]
    assert step(s) == [("a", 6, 1), ("b", 9, 1)]


def test_a_step_never_exceeds_its_budget():
    s = make(num_blocks=100, max_batched_tokens=7)
    for i in range(12):
        add(s, str(i), range(i, i + 9))
    for _ in range(60):
        assert sum(n for _, _, n in step(s)) <= 7


def test_first_come_first_served():
    s = make(num_blocks=4)
    add(s, "large", range(12))
    add(s, "too large for now", range(30, 42))
    add(s, "small", range(3))
    assert [name for name, _, _ in step(s)] == ["large"]
    assert len(s.waiting) == 2  # the small one would fit, and waits its turn


def test_policies():
    s = make(policy="static")
    first = add(s, "a", range(4))
    step(s)
    add(s, "b", range(4))
    assert step(s) == [("a", 4, 1)]
    s.remove(first)
    assert step(s) == [("b", 0, 4)]  # its prompt's only full block holds the last token: no hit

    s = make(policy="prefill_first")
    add(s, "a", range(4))
    step(s)
    add(s, "b", range(50, 54))
    assert step(s) == [("b", 0, 4)]
    assert step(s) == [("a", 4, 1), ("b", 4, 1)]


def test_a_prompt_that_is_cached_whole_still_computes_a_token():
    """nano-vllm: a full hit left zero query tokens, and the kernel failed."""
    s = make()
    first = add(s, "a", range(8))
    step(s)
    s.remove(first)
    add(s, "b", range(8))
    assert step(s) == [("b", 4, 4)]


def test_a_preempted_sequence_is_not_mistaken_for_decoding():
    """nano-vllm: a preempted request that came back was treated as one that only lacks its newest token."""
    s = make(num_blocks=5, block_size=4)
    a, b = add(s, "a", range(8)), add(s, "b", range(20, 28))
    while not b.metrics.preemptions:
        step(s)
    assert b.num_computed == 0 and not b.is_decoding and b in s.waiting
    tokens = len(b.token_ids)
    s.remove(a)
    s.manager._cached.clear()  # nothing left to hit
    s.manager._hashes[:] = [None] * 5
    assert step(s) == [("b", 0, tokens)]


def test_a_prefix_hit_is_counted_before_the_budget():
    """nano-vllm: the hit changed the number of tokens after the scheduler had counted them."""
    s = make(num_blocks=40, max_batched_tokens=20)
    add(s, "a", range(16))
    step(s)
    for i in range(4):
        add(s, f"hit {i}", [*range(16), 50 + i, 60 + i, 70 + i])
    assert step(s) == [("a", 16, 1), *((f"hit {i}", 16, 3) for i in range(4))]


def test_the_youngest_is_preempted_and_returns_first():
    s = make(num_blocks=6, block_size=4)
    for name in "abc":
        add(s, name, [ord(name) % 50] * 7)
    add(s, "later", [1])
    preempted = []
    while not preempted:
        before = list(s.running)
        step(s)
        preempted = [x for x in before if x not in s.running]
    assert [x.request.request_id for x in preempted] == ["c"]
    assert [x.request.request_id for x in s.waiting] == ["c", "later"]


def test_forks_have_room():
    s = make(num_blocks=40, max_num_seqs=4)
    add(s, "a", range(4), n=3, temperature=1.0)
    add(s, "b", range(4), n=2, temperature=1.0)
    add(s, "c", range(4))
    assert [name for name, _, _ in step(s)] == ["a"]


@pytest.mark.parametrize("bad", [{"max_batched_tokens": 0}, {"max_num_seqs": 0}, {"policy": "fair"}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)
