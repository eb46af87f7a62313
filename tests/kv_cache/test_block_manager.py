"""The block manager: scenarios one can read. test_state_machine.py has all the others."""

import subprocess
import sys

import pytest

from optinfer.kv_cache import (
    BlockCopy,
    BlockManager,
    DuplicateSequence,
    IntegrityError,
    OutOfBlocks,
    UnknownSequence,
    replay,
)
from optinfer.kv_cache.events import BlockForgotten, SequenceFreed

# ---------------------------------------------------------------- allocation


def test_block_manager_needs_no_torch():
    code = "import sys, optinfer.kv_cache as kv; kv.BlockManager(4); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (15, 1), (16, 1), (17, 2), (160, 10)])
def test_a_sequence_takes_the_blocks_its_tokens_fill(tokens, blocks):
    m = BlockManager(10)
    allocation = m.allocate("a", range(tokens))
    assert allocation.num_cached_tokens == 0
    assert allocation.block_table == m.block_table("a") == list(range(blocks))
    assert m.num_free_blocks == 10 - blocks


def test_allocation_is_all_or_nothing():
    m = BlockManager(4, block_size=4)
    m.allocate("a", range(9))
    before = m.snapshot(), list(m.events)
    with pytest.raises(OutOfBlocks, match="needs 2 new blocks, 1 available") as caught:
        m.allocate("b", range(100, 108))
    assert (caught.value.needed, caught.value.available) == (2, 1)
    with pytest.raises(OutOfBlocks):
        m.append("a", range(50, 58))
    assert (m.snapshot(), m.events) == before
    m.allocate("c", [1])  # the last block is still there


def test_hits_waiting_in_the_free_queue_are_not_counted_twice():
    m = BlockManager(4, block_size=4)
    m.allocate("a", range(16))
    m.free("a")
    # 3 of the 4 free blocks are hits, so 1 is available for the 2 that are new.
    with pytest.raises(OutOfBlocks, match="needs 2 new blocks, 1 available"):
        m.allocate("b", [*range(12), 50, 51, 52, 53, 54])
    assert m.allocate("b", [*range(12), 50]).num_cached_tokens == 12


def test_the_watermark_holds_back_admissions_but_not_growth():
    m = BlockManager(10, block_size=1, watermark=0.25)
    assert m.watermark_blocks == 2
    with pytest.raises(OutOfBlocks):
        m.allocate("a", range(9))
    m.allocate("a", range(8))
    m.append("a", [8, 9])
    assert m.num_free_blocks == 0


# ---------------------------------------------------------------- prefix caching


def test_a_prefix_is_shared_while_its_owner_lives_and_after():
    m = BlockManager(10, block_size=4)
    first = m.allocate("a", range(10)).block_table
    shared = m.allocate("b", [*range(8), 90, 91])
    assert shared.num_cached_tokens == 8 and shared.block_table[:2] == first[:2]
    assert [m.ref_count(block) for block in first] == [2, 2, 1]
    m.free("a")
    m.free("b")
    assert m.num_free_blocks == 10
    assert m.allocate("c", range(10)).num_cached_tokens == 8


def test_the_last_token_is_never_a_hit():
    m = BlockManager(10, block_size=4)
    m.allocate("a", range(8))
    m.free("a")
    assert m.num_cached_tokens(range(8)) == 4  # a fully cached prompt would leave no query to compute
    assert m.num_cached_tokens(range(9)) == 8
    assert m.num_cached_tokens(range(1)) == 0


def test_a_block_counts_only_behind_the_same_prefix_and_salt():
    m = BlockManager(10, block_size=2)
    m.allocate("a", [1, 2, 3, 4, 5], salt="tenant 1")
    assert m.num_cached_tokens([1, 2, 3, 4, 5], salt="tenant 1") == 4
    assert m.num_cached_tokens([9, 2, 3, 4, 5], salt="tenant 1") == 0
    assert m.num_cached_tokens([1, 2, 3, 9, 5], salt="tenant 1") == 2
    assert m.num_cached_tokens([1, 2, 3, 4, 5], salt="tenant 2") == 0
    assert m.num_cached_tokens([1, 2, 3, 4, 5]) == 0


def test_prefix_caching_can_be_turned_off():
    m = BlockManager(10, block_size=2, prefix_caching=False)
    m.allocate("a", range(6))
    assert m.allocate("b", range(6)).num_cached_tokens == 0
    assert all(m.block_hash(block) is None for block in range(10))


def test_eviction_takes_worthless_blocks_first_then_the_oldest_tail():
    m = BlockManager(10, block_size=4)
    table = m.allocate("a", range(18)).block_table  # 4 full blocks, 1 partial
    m.free("a")
    queue = m.free_blocks()
    assert queue[0] == table[4]  # partial: nobody can hit it
    assert queue[-4:] == table[3::-1]  # hashed ones last, tail before head
    m.allocate("b", range(100, 128))  # 7 blocks: 6 worthless ones, then one eviction
    evicted = [event.block for event in m.events if isinstance(event, BlockForgotten)]
    assert evicted == [table[3]]
    assert m.num_cached_tokens(range(18)) == 12


def test_eviction_is_least_recently_used():
    m = BlockManager(4, block_size=2)
    m.allocate("a", [1, 2])
    m.allocate("b", [3, 4])
    m.free("a")
    m.free("b")
    m.allocate("a again", [1, 2, 9])  # a hit in the middle of the queue: a becomes the most recent
    m.free("a again")
    m.allocate("c", range(10, 16))  # 3 blocks: two worthless, then the older hit
    assert m.num_cached_tokens([1, 2, 9]) == 2
    assert m.num_cached_tokens([3, 4, 9]) == 0


def test_equal_blocks_computed_side_by_side_are_both_hits():
    m = BlockManager(4, block_size=2)
    a = m.allocate("a", [1, 2]).block_table  # the last token rule: b may not reuse it
    b = m.allocate("b", [1, 2]).block_table
    assert a != b and m.block_hash(a[0]) == m.block_hash(b[0])
    m.free("a")
    m.allocate("c", range(10, 16))  # evicts a's copy
    assert m.num_free_blocks == 0
    m.free("c")
    assert m.allocate("d", [1, 2, 3]).block_table[0] == b[0]


def test_tokens_become_hits_when_they_are_committed():
    m = BlockManager(10, block_size=2)
    m.allocate("a", range(6), commit=False)  # a prompt computed in chunks
    assert m.num_cached_tokens(range(6)) == 0
    m.commit("a", 3)
    assert m.num_cached_tokens(range(6)) == 2
    m.commit("a")
    m.append("a", [7, 8], commit=False)  # drafts
    assert m.num_cached_tokens([*range(6), 7, 8, 9]) == 6
    m.truncate("a", 7)  # one accepted
    m.append("a", [50])
    assert m.num_cached_tokens([*range(6), 7, 8, 9]) == 6
    assert m.num_cached_tokens([*range(6), 7, 50, 9]) == 8


# ---------------------------------------------------------------- fork, copy-on-write, truncation


def test_fork_is_free_and_the_first_writer_copies():
    m = BlockManager(10, block_size=4)
    table = m.allocate("parent", range(6)).block_table
    m.fork("parent", "child")
    assert m.num_free_blocks == 8
    assert m.append("child", [50]) == [BlockCopy(source=table[1], target=2)]
    assert m.block_table("child") == [table[0], 2]
    assert m.append("parent", [60]) == []  # the last owner writes in place
    assert [m.ref_count(block) for block in (0, 1, 2)] == [2, 1, 1]


def test_fork_at_a_block_boundary_copies_nothing():
    m = BlockManager(10, block_size=4)
    m.allocate("parent", range(4))
    m.fork("parent", "child")
    assert m.append("child", [50]) == []
    assert m.append("parent", [60]) == []


def test_copy_on_write_needs_a_block_and_is_refused_without_one():
    m = BlockManager(1, block_size=4)
    m.allocate("parent", [1])
    m.fork("parent", "child")
    before = m.snapshot()
    with pytest.raises(OutOfBlocks, match="needs 1 new blocks, 0 available"):
        m.append("child", [2])
    assert m.snapshot() == before


def test_truncating_into_a_cached_block_keeps_it_a_hit_until_it_is_overwritten():
    m = BlockManager(10, block_size=4)
    table = m.allocate("a", range(8)).block_table
    m.truncate("a", 5)
    assert m.num_cached_tokens(range(9)) == 8
    m.append("a", [70])
    assert m.num_cached_tokens(range(9)) == 4
    assert m.block_table("a") == table


def test_truncate_releases_whole_blocks_and_other_owners_keep_theirs():
    m = BlockManager(10, block_size=4)
    m.allocate("a", range(12))
    m.fork("a", "b")
    m.truncate("a", 3)
    assert len(m.block_table("a")) == 1 and len(m.block_table("b")) == 3
    assert m.token_ids("b") == list(range(12))
    assert len(m.append("a", [99])) == 1  # its last block is shared, even hashed: copy
    assert m.num_cached_tokens(range(13)) == 12


# ---------------------------------------------------------------- preemption, log, errors


def test_preemption_returns_the_tokens_and_recompute_finds_the_prefix():
    m = BlockManager(4, block_size=4)
    m.allocate("a", range(10))
    tokens = m.preempt("a")
    assert tokens == list(range(10)) and m.num_free_blocks == 4
    assert m.events[-4] == SequenceFreed("a", preempted=True)
    assert m.allocate("a", tokens).num_cached_tokens == 8


def test_events_are_json_ready_and_replay():
    import json

    m = BlockManager(6, block_size=2)
    m.allocate("a", range(5))
    m.fork("a", "b")
    m.append("b", [9])
    m.truncate("a", 2)
    m.free("b")
    assert replay(m.events, 6) == m.snapshot()
    for cut in range(len(m.events)):
        replay(m.events[:cut], 6)  # every state on the way, too
    records = json.loads(json.dumps([event.to_dict() for event in m.events]))
    assert records[0] == {"type": "SequenceAllocated", "seq_id": "a", "token_ids": [0, 1, 2, 3, 4]} | {
        "num_cached_tokens": 0
    }


def test_replay_refuses_a_log_that_contradicts_itself():
    m = BlockManager(6, block_size=2)
    m.allocate("a", range(5))
    with pytest.raises(ValueError):
        replay([m.events[0], *m.events[2:]], 6)


def test_the_log_can_be_off():
    m = BlockManager(6, record_events=False)
    m.allocate("a", range(5))
    assert m.events == []


def test_errors_name_what_is_wrong():
    m = BlockManager(4, block_size=4, vocab_size=100)
    m.allocate("a", [1, 2])
    before = m.snapshot(), list(m.events)
    for call, error, message in [
        (lambda: m.allocate("a", [1]), DuplicateSequence, "'a' is allocated already"),
        (lambda: m.fork("a", "a"), DuplicateSequence, "'a'"),
        (lambda: m.fork("x", "y"), UnknownSequence, "'x' is not allocated"),
        (lambda: m.free("x"), UnknownSequence, "'x'"),
        (lambda: m.preempt("x"), UnknownSequence, "'x'"),
        (lambda: m.block_table("x"), UnknownSequence, "'x'"),
        (lambda: m.append("x", [1]), UnknownSequence, "'x'"),
        (lambda: m.allocate("b", []), ValueError, "token_ids is empty"),
        (lambda: m.append("a", []), ValueError, "token_ids is empty"),
        (lambda: m.allocate("b", [1, 100]), ValueError, "token_ids holds 100; allowed are 0 to 99"),
        (lambda: m.append("a", [-1]), ValueError, "token_ids holds -1"),
        (lambda: m.allocate("b", [1.5]), TypeError, "token_ids must be integers"),
        (lambda: m.allocate("b", "text"), TypeError, "token_ids must be integers"),
        (lambda: m.allocate("b", [1], salt=7), TypeError, "salt must be a string"),
        (lambda: m.allocate([], [1]), TypeError, "unhashable"),
        (lambda: m.truncate("a", 0), ValueError, "num_tokens must be 1 to 2"),
        (lambda: m.truncate("a", 3), ValueError, "num_tokens must be 1 to 2"),
        (lambda: m.commit("a", 3), ValueError, "num_tokens must be 1 to 2"),
        (lambda: m.slots("a", 0, 3), ValueError, "stop <= 2"),
        (lambda: m.ref_count(4), ValueError, "block must be 0 to 3"),
        (lambda: m.block_hash(-1), ValueError, "block must be 0 to 3"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert (m.snapshot(), m.events) == before
    m.free("a")
    with pytest.raises(UnknownSequence, match="freed already"):
        m.free("a")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_blocks": 0}, ValueError),
        ({"num_blocks": 1.0}, TypeError),
        ({"num_blocks": 4, "block_size": 0}, ValueError),
        ({"num_blocks": 4, "watermark": 1.0}, ValueError),
        ({"num_blocks": 4, "watermark": -0.1}, ValueError),
        ({"num_blocks": 4, "vocab_size": 0}, ValueError),
    ],
)
def test_a_pool_of_no_size_is_refused(arguments, error):
    with pytest.raises(error, match=next(reversed(arguments))):
        BlockManager(**arguments)


def test_check_integrity_finds_planted_damage():
    def fresh():
        m = BlockManager(6, block_size=2)
        m.allocate("a", range(5))
        m.free("a")
        m.allocate("b", range(20, 23))
        return m

    def damage_count(m):
        m._ref_counts[m.block_table("b")[0]] += 1

    def damage_queue(m):
        del m._free_queue[m.free_blocks()[0]]

    def damage_hash(m):
        m._hashes[m.block_table("b")[0]] = b"x" * 32

    def damage_tokens(m):
        m._sequences["b"].tokens[0] += 1

    def damage_order(m):
        m._free_queue.move_to_end(m.free_blocks()[-1], last=False)

    fresh().check_integrity()
    for damage in (damage_count, damage_queue, damage_hash, damage_tokens, damage_order):
        m = fresh()
        damage(m)
        with pytest.raises(IntegrityError):
            m.check_integrity()
