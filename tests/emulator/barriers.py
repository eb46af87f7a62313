"""Which barriers of a kernel order what: a race check that keeps many clocks in one run, each blind to other barriers.

A block barrier whose loss no race shows is either not needed, or the check is blind. So every pair of conflicting accesses
of two agents (warps, tensor copies) is asked: does it stay in order without any `bar.sync`, by mbarriers alone? And which
`bar.sync` would order it, were it the only one? If a pair needs one of a set of barriers, dropping the whole set is a race.
The smallest such sets say what each barrier is for:

    {b}          b is needed
    {b, c}       b and c do each other's work: alone each is silent, dropped together they are a race
    in no set    whatever else is dropped, b changes nothing: no pair lies across it that needs a barrier (idle), or each
                 that does is also ordered by every barrier of some set without b (covered)
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np

from optinfer_kernels.emulator import machine
from optinfer_kernels.emulator.checks import RaceCheck
from optinfer_kernels.emulator.ptx import Instruction

BARRIER = r"\bbar\.sync\s+\d+(, \d+)?;"


def lines_of_barriers(ptx: str) -> list[int]:
    return [ptx.count("\n", 0, m.start()) + 1 for m in re.finditer(BARRIER, ptx)]


def without(ptx: str, lines: set[int] | frozenset[int]) -> str:
    """The PTX with the barriers of these lines dropped."""
    text = ptx.split("\n")
    for line in lines:
        text[line - 1], dropped = re.subn(BARRIER, "", text[line - 1])
        assert dropped == 1
    return "\n".join(text)


@dataclass
class Purposes:
    """What was seen: for each kind of pair that barriers order, which barriers would do it alone."""

    lines: list[int]  # of the barriers in the PTX
    needs: set[frozenset[int]] = field(default_factory=set)
    unexplained: int = 0  # pairs that take several barriers, none of which is indispensable

    def sets(self) -> list[frozenset[int]]:
        """The smallest sets of barriers that must not be dropped together."""
        return sorted((s for s in self.needs if not any(t < s for t in self.needs)), key=lambda s: (len(s), sorted(s)))

    def needed(self) -> set[int]:
        return {line for s in self.sets() if len(s) == 1 for line in s}

    def shared(self) -> set[int]:
        return {line for s in self.sets() if len(s) > 1 for line in s}

    def covered(self) -> set[int]:
        return {line for s in self.needs for line in s} - self.needed() - self.shared()

    def idle(self) -> set[int]:
        return set(self.lines) - self.needed() - self.shared() - self.covered()


class ManyClocks(RaceCheck):
    """Clocks [agents, agents, views]. The views: all barriers; none; each alone; all but one of each."""

    purposes: Purposes  # shared by the blocks of a launch

    def __init__(self, *args):
        super().__init__(*args)
        n = len(self.purposes.lines)
        self.counted = np.vstack((np.ones(n, bool), np.zeros(n, bool), np.eye(n, dtype=bool), ~np.eye(n, dtype=bool)))
        self.clock = np.repeat(self.clock[:, :, None], len(self.counted), axis=2)

    def now(self, agent: int) -> int:
        return int(self.clock[agent, agent, 0])

    def knows(self, warp: int, other: int, time: int) -> bool:
        if warp != other:
            self.note(np.array([[warp], [other], [time]]))
        return warp == other or int(self.clock[warp, other, 0]) >= time

    def barrier(self, warps: np.ndarray, i: Instruction) -> None:
        views = slice(None)
        if i.line in self.purposes.lines:
            views = np.flatnonzero(self.counted[:, self.purposes.lines.index(i.line)])
        clock = self.clock[:, :, views]
        clock[warps] = clock[warps].max(0)
        self.clock[:, :, views] = clock
        self.tick(warps)

    def read(self, offset, size, thread, i) -> None:
        units, warp = self.units(offset, size), (thread >> 5)[:, None]
        self.note_where(self.writer[units] != warp, warp, self.writer[units], self.write_time[units])
        with self.first_view():
            super().read(offset, size, thread, i)

    def write(self, offset, size, thread, i, changed=True, agent=None) -> None:
        units = self.units(offset, size)
        warp = (thread >> 5)[:, None] if agent is None else np.full((len(offset), 1), agent)
        matters = np.broadcast_to(np.broadcast_to(changed, len(offset))[:, None], units.shape)
        self.note_where(matters & (self.writer[units] != warp), warp, self.writer[units], self.write_time[units])
        other = np.arange(self.agents)[:, None, None]
        self.note_where(matters & (other != warp), warp, other, self.read_time[:, units])
        with self.first_view():
            super().write(offset, size, thread, i, changed, agent)

    def fence(self, warps: np.ndarray) -> None:
        with self.first_view():
            super().fence(warps)

    @contextlib.contextmanager
    def first_view(self) -> Iterator[None]:
        """What is reported is what the plain check reports."""
        whole, self.clock = self.clock, self.clock[:, :, 0]
        yield
        self.clock = whole

    def note_where(self, chosen: np.ndarray, *pair: np.ndarray) -> None:
        chosen = chosen & (pair[-1] > 0)
        if chosen.any():
            self.note(np.unique([np.broadcast_to(x, chosen.shape)[chosen] for x in pair], axis=1))

    def note(self, pairs: np.ndarray) -> None:
        """pairs: [warp, other, time of other], as columns."""
        warp, other, time = pairs
        lines, n = np.array(self.purposes.lines), len(self.purposes.lines)
        for ordered in np.unique(self.clock[warp, other] >= time[:, None], axis=0):
            if ordered[1] or not ordered[0]:
                continue  # mbarriers and waits are enough; or a race, which the plain check reports
            if ordered[2 : 2 + n].any():
                self.purposes.needs.add(frozenset(lines[ordered[2 : 2 + n]].tolist()))
            elif ordered[2 + n :].all():
                self.purposes.unexplained += 1
            else:  # several barriers in a row
                self.purposes.needs |= {frozenset([line]) for line in lines[~ordered[2 + n :]].tolist()}


@contextlib.contextmanager
def purposes_of(ptx: str) -> Iterator[Purposes]:
    """Inside, emulated launches of this PTX note what their barriers are for."""
    purposes = Purposes(lines_of_barriers(ptx))
    with mock.patch.object(machine, "RaceCheck", type("Noting", (ManyClocks,), {"purposes": purposes})):
        yield purposes
