"""One step of serving: schedule -> run -> decide -> apply. It knows nothing of threads; `Engine` lets one in at a time."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from optinfer.kv_cache import BlockManager, IntegrityError
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.output import Decision, Output
from optinfer.serving.paged_batch import Chunk
from optinfer.serving.records import ChunkRecord, EngineStats, StepRecord
from optinfer.serving.request import Sequence
from optinfer.serving.scheduler import Schedule, Scheduler
from optinfer.serving.speculation import Speculator
from optinfer.serving.turns import Interrupts
from optinfer.upload import upload


class Loop:
    """Computes for all requests, a step at a time.

    Args:
        scheduler: what to compute.
        runner: computes it.
        output: what becomes of it.
        speculator: drafts; None: nobody does.
        new_manager: makes an empty block manager.
        interrupts: held off by the caller; while the model computes they are let in.
        clock: seconds.
        log_steps: how many of the newest steps the log keeps.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        output: Output,
        speculator: Speculator | None,
        new_manager: Callable[[], BlockManager],
        interrupts: Interrupts,
        clock: Callable[[], float],
        log_steps: int,
    ):
        self.scheduler, self.runner, self.output, self.speculator = scheduler, runner, output, speculator
        self._new_manager, self._interrupts, self._clock = new_manager, interrupts, clock
        self.stats: EngineStats = output.stats
        self.log: list[StepRecord] = []
        self._log_steps = log_steps

    def step(self) -> None:
        """Compute one batch. If it raises, no request is lost: all are computed again from their tokens."""
        start = self._clock()
        if not self.runner.is_current():  # nor are the keys and values that the old weights gave
            self.runner.renew()
            self.restart()
        try:
            schedule = self.scheduler.schedule(self.speculator.propose if self.speculator else None)
            with self._interrupts.allowed():
                logits = self._run(schedule)
                decisions = self.output.decide(schedule.chunks, logits)
            now = self._clock()
        except BaseException:
            self.restart()
            raise
        record = self._apply(schedule, decisions, start, now)
        if self.speculator is not None:
            self._learn(self.speculator, schedule, decisions, record)

    def _run(self, schedule: Schedule) -> Tensor:
        chunks = []
        for c in schedule.chunks:
            tokens = c.sequence.token_ids[c.start : c.end] + c.drafts.tokens
            table = self.scheduler.manager.block_table(c.sequence.seq_id)
            chunks.append(Chunk(tokens, c.start, table, c.drafts if c.drafts.branches else None))
        return self.runner.run(chunks, [c.num_logits for c in schedule.chunks], schedule.copies)

    def _apply(self, schedule: Schedule, decisions: list[Decision], start: float, now: float) -> StepRecord:
        """The step counts: write down what it brought."""
        chunks, finished, moves = [], [], []
        kinds: list[Literal["prefill", "decode"]] = [
            "decode" if chunk.sequence.is_decoding else "prefill" for chunk in schedule.chunks
        ]
        for chunk, decision in zip(schedule.chunks, decisions):  # before any block is freed
            moves += self.scheduler.settle(chunk, decision.path)
        for chunk, decision, kind in zip(schedule.chunks, decisions, kinds):
            sequence, drafted, accepted = chunk.sequence, len(chunk.drafts), len(decision.path)
            if sequence.metrics.first_scheduled is None:
                sequence.metrics.first_scheduled = start
                sequence.metrics.cached_tokens = chunk.start
                self.stats.cached_tokens += chunk.start
            for counts in (sequence.metrics, self.stats):
                counts.draft_tokens += drafted
                counts.accepted_tokens += accepted
            finished += self.output.apply(decision, now)
            chunks.append(
                ChunkRecord(
                    *sequence.seq_id,
                    kind,
                    chunk.start,
                    chunk.num_tokens,
                    drafted,
                    accepted,
                    len(decision.tokens),
                )
            )
        self.forget_drafts([*schedule.preempted, *finished])
        if moves:  # of trees alone; a rehearsal's runner has no pool
            self._move(moves)
        stats, manager = self.stats, self.scheduler.manager
        used = manager.num_blocks - manager.num_free_blocks
        stats.steps += 1
        stats.computed_tokens += schedule.num_tokens
        stats.preemptions += len(schedule.preempted)
        stats.peak_used_blocks = max(stats.peak_used_blocks, used)
        record = StepRecord(
            stats.steps, start, now - start, chunks,
            [s.seq_id for s in schedule.preempted], [s.seq_id for s in finished],
            len(self.scheduler.waiting), len(self.scheduler.running), used,
        )  # fmt: skip
        if self._log_steps:
            self.log.append(record)
            del self.log[: -self._log_steps]
        return record

    def _move(self, moves: list[tuple[int, int]]) -> None:
        """Keys and values go where the block manager says that they are; where that fails, nobody may find them there."""
        try:
            self.runner.pool.move_tokens(moves)
        except BaseException:
            self.restart()
            raise

    def _learn(self, speculator: Speculator, schedule: Schedule, decisions: list[Decision], record: StepRecord) -> None:
        """What the step says about drafts."""
        speculator.cost.observe(schedule.num_tokens, record.seconds)
        for i, (chunk, decision) in enumerate(zip(schedule.chunks, decisions)):
            if chunk.drafts:
                speculator.observe(chunk.sequence, chunk.drafts, decision.path)
            if speculator.needs_hidden and chunk.sequence.metrics.finished is None:
                final = _final(self.runner.hidden[i], chunk.num_tokens, decision.path)
                speculator.observe_hidden(chunk.sequence, chunk.start, final)

    def restart(self) -> None:
        """Begin again with empty pages and no cached prefixes; every sequence has its tokens."""
        self.forget_drafts(self.scheduler.running)
        self.scheduler.restart(self._new_manager())

    def cancel(self, request_id: str) -> None:
        """Raises UnknownRequest."""
        self.forget_drafts(self.output.cancel(request_id, self._clock()))

    def forget_drafts(self, sequences: list[Sequence]) -> None:
        if self.speculator is not None:
            for sequence in sequences:
                self.speculator.forget(sequence)

    def check_integrity(self) -> None:
        """Raises IntegrityError when the books do not balance, or blocks leaked."""
        manager = self.scheduler.manager
        manager.check_integrity()
        running = {sequence.seq_id for sequence in self.scheduler.running}
        if set(manager.sequence_ids) != running:
            raise IntegrityError(f"blocks belong to {set(manager.sequence_ids) ^ running}, running: {running}")


def _final(hidden: Tensor, num_tokens: int, path: list[int]) -> Tensor:
    """Of a chunk's hidden states [tokens and drafts, hidden_size] those of its tokens and of the drafts on the path."""
    if path == list(range(len(path))):
        return hidden[: num_tokens + len(path)]
    rows = [*range(num_tokens), *(num_tokens + node for node in path)]
    return hidden.index_select(0, upload(rows, hidden.device))
