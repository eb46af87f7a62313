"""What went wrong, and the check that looks for races in shared memory."""

from collections import Counter

import numpy as np

from .ptx import Instruction

MANY = 33  # in place of a lane: more than one lane has read here


class Findings:
    """What went wrong, counted by kind and instruction; the first of each is kept in words."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], str] = {}

    def add(self, kind: str, i: Instruction | None, text: str = "", count: int = 1) -> None:
        key = (kind, i.where if i is not None else "")
        self.counts[key] += count
        self.examples.setdefault(key, text)

    def kinds(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for (kind, _), count in self.counts.items():
            total[kind] += count
        return dict(total)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        lines = [f"{kind} ({count} times): {self.examples[kind, where]} [{where}]"
                 for (kind, where), count in self.counts.most_common()]  # fmt: skip
        return "\n".join(lines) or "no findings"


class RaceCheck:
    """Finds accesses to shared memory that nothing orders, and reads of what nobody wrote. One per block.

    Time is a vector clock (Lamport 1978; Mattern 1989) per agent: the warps, and after them asynchronous copies.
    `clock[a, b]` is how much of b's past a has seen. An access by b at b's own time t happened before a's now if and only if
    clock[a, b] >= t. A barrier gives everybody the maximum, then everybody's own time moves on. Lanes of a warp count
    as concurrent between two `bar.warp.sync`, unless the warp ticks. Memory is watched in units of 4 bytes, or less.
    """

    def __init__(self, nbytes: int, warps: int, copies: int, unit: int, findings: Findings):
        self.unit, self.findings, self.warps = unit, findings, warps
        self.agents = warps + copies
        self.next_copy = 0
        self.clock = np.zeros((self.agents, self.agents), np.int32)
        np.fill_diagonal(self.clock, 1)
        n = nbytes // unit + 1
        self.write_time, self.writer, self.write_lane = (
            np.zeros(n, np.int32),
            np.zeros(n, np.int32),
            np.full(n, -1, np.int32),
        )
        self.read_time, self.read_lane = np.zeros((self.agents, n), np.int32), np.full((self.agents, n), -1, np.int32)
        self.initialized = np.zeros(n, bool)
        self.in_flight = np.zeros(n, np.int32)  # cp.async copies that will land here
        self.unfenced = np.zeros(n, bool)  # written by ordinary stores that TMA and wgmma need not see yet
        self.version = np.zeros(n, np.int64)  # grows with every write
        self.writes = 0

    # ---- order

    def tick(self, warps) -> None:
        self.clock[warps, warps] += 1

    def now(self, agent: int) -> int:
        return int(self.clock[agent, agent])

    def knows(self, warp: int, other: int, time: int) -> bool:
        """Whether what `other` did at its `time` happened before what `warp` does now."""
        return warp == other or int(self.clock[warp, other]) >= time

    def barrier(self, warps: np.ndarray, i: Instruction) -> None:
        self.clock[warps] = self.clock[warps].max(0)
        self.tick(warps)

    def acquire(self, warps: np.ndarray, clock: np.ndarray) -> None:
        """These warps now know all that `clock` knows."""
        self.clock[warps] = np.maximum(self.clock[warps], clock)
        self.tick(warps)

    def start_copy(self, warp: int) -> int:
        """An agent for one tensor copy, which has seen what the warp that starts it has seen."""
        agent = self.warps + self.next_copy % (self.agents - self.warps)
        self.next_copy += 1
        own = self.clock[:, agent].max() + 1
        self.clock[agent] = self.clock[warp]
        self.clock[agent, agent] = own
        self.tick(warp)
        return agent

    def fence(self, warps: np.ndarray) -> None:
        """`fence.proxy.async`: ordinary writes that these warps have seen become visible to TMA and wgmma."""
        seen = self.clock[warps][:, self.writer] >= self.write_time
        self.unfenced &= ~seen.any(0)

    # ---- accesses: offset and thread [n]; `size` bytes each; agent instead of the thread's warp for tensor copies

    def units(self, offset: np.ndarray, size: int) -> np.ndarray:
        return (offset // self.unit)[:, None] + np.arange(max(1, size // self.unit))

    def read(self, offset: np.ndarray, size: int, thread: np.ndarray, i: Instruction) -> None:
        units, warp, lane = self.units(offset, size), (thread >> 5)[:, None], (thread & 31)[:, None]
        now, writer, written = self.clock[warp, warp], self.writer[units], self.write_time[units]
        self._report(
            "race: read after write", i, (writer != warp) & (written > self.clock[warp, writer]), units, writer
        )
        same_step = (writer == warp) & (written == now) & (self.write_lane[units] != lane)
        self._report("race within a warp: read after write", i, same_step, units, writer)
        in_flight = self.in_flight[units] > 0
        self._report("read of an asynchronous copy in flight", i, in_flight, units, writer)
        self._report("read of uninitialized shared memory", i, ~self.initialized[units] & ~in_flight, units, writer)
        others = (self.read_time[warp, units] == now) & (self.read_lane[warp, units] != lane)
        self.read_lane[warp, units] = np.where(others, MANY, lane)
        self.read_time[warp, units] = now

    def write(
        self, offset: np.ndarray, size: int, thread: np.ndarray, i: Instruction, changed=True, agent: int | None = None
    ) -> None:
        """changed [n]: whether the write changes anything. Unordered writes of the same value do no harm."""
        units, changed = self.units(offset, size), np.broadcast_to(changed, len(offset))[:, None]
        warp = (thread >> 5)[:, None] if agent is None else np.full((len(offset), 1), agent)
        lane = (thread & 31)[:, None] if agent is None else -1
        now, writer, written = self.clock[warp, warp], self.writer[units], self.write_time[units]
        race = (writer != warp) & (written > self.clock[warp, writer])
        race |= (writer == warp) & (written == now) & (self.write_lane[units] != lane) & (self.write_lane[units] >= 0)
        self._report("race: write after write", i, race & changed, units, writer)
        unseen = self.read_time[:, units] > self.clock[warp[:, 0]].T[:, :, None]  # [agents, n, units]
        unseen[warp[:, 0], np.arange(len(offset))] = False
        self._report("race: write after read", i, unseen.any(0) & changed, units, unseen.argmax(0))
        if agent is None:
            same_step = (self.read_time[warp, units] == now) & (self.read_lane[warp, units] != lane)
            self._report("race within a warp: write after read", i, same_step & changed, units, warp)
        self._report("write over an asynchronous copy in flight", i, self.in_flight[units] > 0, units, writer)
        self.writes += 1
        self.writer[units], self.write_lane[units], self.write_time[units] = warp, lane, now
        self.initialized[units], self.unfenced[units], self.version[units] = True, agent is None, self.writes

    def _report(self, kind: str, i: Instruction, bad: np.ndarray, units: np.ndarray, other: np.ndarray) -> None:
        if bad.any():
            first = tuple(np.argwhere(bad)[0])
            who = int(np.broadcast_to(other, units.shape)[first])
            whom = f"warp {who}" if who < self.warps else "a tensor copy"
            self.findings.add(
                kind, i, f"shared byte {int(units[first]) * self.unit}, with {whom}", int(bad.any(1).sum())
            )
