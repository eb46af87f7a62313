"""A model of the block manager for hypothesis: random operations, every promise checked after each one.

The model knows tokens only. It plays the part of the GPU: `memory[block]` holds the tokens that were really
written there, by following the events, so "the right block" means "the block with the right content".
"""

import os
from math import ceil

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from optinfer.kv_cache import BlockManager, IntegrityError, OutOfBlocks, replay
from optinfer.kv_cache.events import BlockCopied

# Two token values and blocks of 1 to 4: sequences collide all the time, which is where the bugs are.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
COUNT = {"operations": 0}


class BlockManagerMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 4),
        prefix_caching=st.booleans(),
        watermark=st.sampled_from([0.0, 0.0, 0.3]),
    )
    def start(self, num_blocks, block_size, prefix_caching, watermark):
        self.manager = self.make_manager(
            num_blocks, block_size=block_size, prefix_caching=prefix_caching, watermark=watermark
        )
        self.tokens: dict[int, list[int]] = {}
        self.memory = [[None] * block_size for _ in range(num_blocks)]
        self.next_id = 0
        self.num_events = 0

    make_manager = staticmethod(BlockManager)

    # ------------------------------------------------------------ rules

    @rule(target=sequences, tokens=TOKENS, commit=st.booleans(), salt=st.sampled_from(["", "", "x"]))
    def allocate(self, tokens, commit, salt):
        m, seq_id = self.manager, self.next_id
        expected_hit = m.num_cached_tokens(tokens, salt=salt)
        done = self.attempt(lambda: m.allocate(seq_id, tokens, salt=salt, commit=commit))
        if done is None:
            return multiple()
        self.next_id += 1
        self.tokens[seq_id] = list(tokens)
        assert done.block_table == m.block_table(seq_id)
        assert done.num_cached_tokens == expected_hit <= len(tokens) - 1
        assert done.num_cached_tokens % m.block_size == 0
        for i in range(done.num_cached_tokens):  # a hit promises that the content is there already
            assert self.memory[done.block_table[i // m.block_size]][i % m.block_size] == tokens[i]
        self.write(seq_id, done.num_cached_tokens)
        return seq_id

    @rule(seq_id=sequences, tokens=TOKENS, commit=st.booleans())
    def append(self, seq_id, tokens, commit):
        m = self.manager
        before, table = m.num_free_blocks, m.block_table(seq_id)
        partial = len(self.tokens[seq_id]) % m.block_size > 0
        must_copy = partial and m.ref_count(table[-1]) > 1
        copies = self.attempt(lambda: m.append(seq_id, tokens, commit=commit))
        if copies is None:
            return
        assert len(copies) == must_copy
        for copy in copies:
            self.memory[copy.target] = list(self.memory[copy.source])
        old, new = len(self.tokens[seq_id]), len(self.tokens[seq_id]) + len(tokens)
        assert before - m.num_free_blocks == ceil(new / m.block_size) - ceil(old / m.block_size) + must_copy
        self.tokens[seq_id] += tokens
        self.write(seq_id, old)

    @rule(seq_id=sequences, data=st.data())
    def commit(self, seq_id, data):
        self.count()
        self.manager.commit(seq_id, data.draw(st.integers(1, len(self.tokens[seq_id]))))

    @rule(target=sequences, parent=sequences)
    def fork(self, parent):
        self.count()
        before = self.manager.num_free_blocks
        self.manager.fork(parent, child := self.next_id)
        assert self.manager.num_free_blocks == before
        self.next_id += 1
        self.tokens[child] = list(self.tokens[parent])
        return child

    @rule(seq_id=sequences, data=st.data())
    def truncate(self, seq_id, data):
        self.count()
        length = data.draw(st.integers(1, len(self.tokens[seq_id])))
        self.manager.truncate(seq_id, length)
        del self.tokens[seq_id][length:]

    @rule(seq_id=consumes(sequences), preempt=st.booleans())
    def free(self, seq_id, preempt):
        self.count()
        tokens = self.tokens.pop(seq_id)
        if preempt:
            assert self.manager.preempt(seq_id) == tokens
        else:
            self.manager.free(seq_id)

    @rule(seq_id=sequences, which=st.integers(0, 8))
    def refuse(self, seq_id, which):
        """Bad input is refused with a typed error and changes nothing, not even the log."""
        m, gone = self.manager, self.next_id + 1
        bad_calls = [
            lambda: m.allocate(seq_id, [0]),
            lambda: m.fork(seq_id, seq_id),
            lambda: m.append(gone, [0]),
            lambda: m.free(gone),
            lambda: m.append(seq_id, []),
            lambda: m.append(seq_id, [0, -1]),
            lambda: m.truncate(seq_id, 0),
            lambda: m.truncate(seq_id, len(self.tokens[seq_id]) + 1),
            lambda: m.allocate(gone, [0, 2**31]),
        ]
        before = m.snapshot(), len(m.events)
        try:
            bad_calls[which]()
        except ValueError:
            assert (m.snapshot(), len(m.events)) == before
        else:
            raise AssertionError(f"bad call {which} was accepted")

    # ------------------------------------------------------------ helpers

    def count(self):
        COUNT["operations"] += 1

    def attempt(self, operation):
        """Run it; None if the pool is exhausted, in which case nothing may have changed."""
        self.count()
        before = self.manager.snapshot(), len(self.manager.events)
        try:
            return operation()
        except OutOfBlocks as error:
            assert error.needed > error.available >= 0
            assert (self.manager.snapshot(), len(self.manager.events)) == before
            return None

    def write(self, seq_id, start):
        """Put the tokens from `start` on into memory, as an attention kernel would, checking ownership."""
        m = self.manager
        for i, slot in enumerate(m.slots(seq_id, start), start):
            block, offset = divmod(slot, m.block_size)
            assert m.ref_count(block) == 1, "a shared block was written"
            self.memory[block][offset] = self.tokens[seq_id][i]

    # ------------------------------------------------------------ promises

    @invariant()
    def promises(self):
        m, size = self.manager, self.manager.block_size
        m.check_integrity()
        state = m.snapshot()
        assert state.tokens == self.tokens
        tables = state.tables
        assert replay(m.events, m.num_blocks) == state  # the log tells the whole story
        for block in range(m.num_blocks):  # counts equal the number of tables that hold a block; no leak
            holders = sum(block in table for table in tables.values())
            assert m.ref_count(block) == holders
            assert (holders == 0) == (block in state.free_queue)
        assert len(set(state.free_queue)) == len(state.free_queue) == m.num_free_blocks
        for seq_id, tokens in self.tokens.items():  # every owner finds its own tokens
            for i, token in enumerate(tokens):
                assert self.memory[tables[seq_id][i // size]][i % size] == token
        for block in range(m.num_blocks):  # a hashed block, owned or not, holds what its hash says
            if state.hashes[block] is not None:
                assert None not in self.memory[block]
        for event in m.events[self.num_events :]:
            if isinstance(event, BlockCopied):
                assert event.source != event.target
        self.num_events = len(m.events)
        ranks = [state.hashes[block] is not None for block in state.free_queue]
        assert ranks == sorted(ranks)  # worthless blocks are reused before prefix hits


def run_machine(machine, examples, steps, phases=tuple(Phase)):
    quiet = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        phases=phases,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=quiet)


def test_random_operations_keep_every_promise():
    run_machine(BlockManagerMachine, examples=300, steps=40)


@pytest.mark.nightly
def test_millions_of_random_operations():
    """Keeps going until a million operations have run; OPTINFER_OPERATIONS sets another total."""
    goal = int(os.environ.get("OPTINFER_OPERATIONS", 1_000_000))
    COUNT["operations"] = 0
    while COUNT["operations"] < goal:
        run_machine(BlockManagerMachine, examples=2_000, steps=60)


class ForgetsToCopy(BlockManager):
    """Writes into a shared block instead of copying it."""

    def append(self, seq_id, token_ids, *, commit=True):
        seq = self._get(seq_id)
        partial = len(seq.tokens) % self.block_size > 0
        if partial and self._ref_counts[seq.table[-1]] > 1:
            self._ref_counts[seq.table[-1]] -= 1
            try:
                return super().append(seq_id, token_ids, commit=commit)
            finally:
                self._ref_counts[seq.table[-1]] += 1
        return super().append(seq_id, token_ids, commit=commit)


class HitsTheLastToken(BlockManager):
    def _find_hits(self, tokens, root):
        return super()._find_hits([*tokens, 0], root)


class KeepsStaleHashes(BlockManager):
    """Overwrites a truncated block without forgetting its hash."""

    def _forget(self, block, evicted=False):
        if evicted:
            super()._forget(block, evicted)


class LeaksOnTruncate(BlockManager):
    def _release(self, seq_id, seq, keep):
        free_before = dict(self._free_queue)
        super()._release(seq_id, seq, keep)
        if keep:
            for block in set(self._free_queue) - set(free_before):
                del self._free_queue[block]


class IgnoresTheParentHash(BlockManager):
    """Two blocks with equal tokens after different prefixes look the same."""

    def _find_hits(self, tokens, root):
        hits, chain = [], []
        size = self.block_size
        if self.prefix_caching:
            for start in range(0, (len(tokens) - 1) // size * size, size):
                for seq in self._sequences.values():
                    for i, digest in enumerate(seq.chain):
                        same = seq.tokens[i * size : (i + 1) * size] == tokens[start : start + size]
                        if same and seq.table[i] not in hits and len(hits) == start // size:
                            hits.append(seq.table[i])
                            chain.append(digest)
        return hits, chain


@pytest.mark.parametrize(
    "broken",
    [
        ForgetsToCopy,
        HitsTheLastToken,
        pytest.param(KeepsStaleHashes, marks=pytest.mark.thorough),
        LeaksOnTruncate,
        IgnoresTheParentHash,
    ],
)
def test_the_state_machine_catches_a_broken_manager(broken):
    class Machine(BlockManagerMachine):
        make_manager = broken

    with pytest.raises((AssertionError, IntegrityError, KeyError, ValueError, ExceptionGroup)):
        run_machine(Machine, examples=2_000, steps=30, phases=[Phase.generate])  # no shrinking
