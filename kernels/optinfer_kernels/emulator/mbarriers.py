"""mbarriers: barriers in shared memory that count arrivals and bytes ("Parallel Synchronization: mbarrier"), and fences."""

from dataclasses import dataclass, field

import numpy as np

from .instructions import Action, instruction
from .ptx import Instruction

SCOPES = "shared shared::cta shared::cluster cta cluster release acquire relaxed"


@dataclass
class Mbarrier:
    """A phase ends when `count` threads have arrived and all bytes that were announced have come."""

    count: int
    made_by: tuple[int, int]  # the warp, and its time
    missing: int = 0  # arrivals of this phase
    nbytes: int = 0  # announced, less those that came
    phase: int = 0
    clock: np.ndarray = field(default_factory=lambda: np.zeros(0))  # what those who arrived in this phase have seen
    last_clock: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the same, of the phase before
    waited: dict[int, int] = field(default_factory=dict)  # warp -> its time when it last waited here


class Mbarriers:
    def __init__(self, m):
        self.m = m

    def start(self) -> None:
        self.at: dict[int, Mbarrier] = {}

    def make(self, at: int, count: int, thread: int, i: Instruction) -> None:
        warp, races = thread // 32, self.m.races
        b = Mbarrier(count, (warp, 0), count)
        if races:
            races.write(np.array([at]), 8, np.array([thread]), i)
            b.made_by = (warp, races.now(warp))
            b.clock, b.last_clock = (np.zeros_like(races.clock[0]) for _ in range(2))
            races.tick(warp)
        self.at[at] = b

    def destroy(self, at: int, thread: int, i: Instruction) -> None:
        b = self.find(at, i, thread)
        if b is not None:
            if b.missing != b.count or b.nbytes:
                self.m.findings.add("mbarrier invalidated in use", i, f"at {at}")
            races, warp = self.m.races, thread // 32
            if races and not all(races.knows(warp, *waiter) for waiter in b.waited.items()):
                self.m.findings.add("mbarrier invalidated while others may wait", i, f"at {at}")
            del self.at[at]

    def find(self, at: int, i: Instruction, thread: int | None = None) -> Mbarrier | None:
        b, races = self.at.get(at), self.m.races
        if b is None:
            self.m.findings.add("mbarrier used before its init or after its inval", i, f"at {at}")
        elif races and thread is not None and not races.knows(thread // 32, *b.made_by):
            self.m.findings.add("mbarrier used before its init is visible", i, f"at {at}")
        return b

    def arrive(self, at: int, arrivals: int, nbytes: int, thread: int, i: Instruction) -> None:
        b, races = self.find(at, i, thread), self.m.races
        if b is None:
            return
        if arrivals > b.missing:
            self.m.findings.add("mbarrier with too many arrivals", i, f"{arrivals}, where {b.missing} were missing")
        b.missing = max(0, b.missing - arrivals)
        b.nbytes += nbytes
        if races:
            b.clock = np.maximum(b.clock, races.clock[thread // 32])
            races.tick(thread // 32)
        self._end_phase(b)

    def complete(self, at: int, nbytes: int, agent: int | None, i: Instruction) -> None:
        """Bytes of a tensor copy have come."""
        b, races = self.find(at, i), self.m.races
        if b is None:
            return
        b.nbytes -= nbytes
        if races and agent is not None:
            b.clock = np.maximum(b.clock, races.clock[agent])
        self._end_phase(b)

    def _end_phase(self, b: Mbarrier) -> None:
        if b.missing == 0 and b.nbytes == 0:
            b.phase += 1
            b.missing = b.count
            b.last_clock, b.clock = b.clock, np.zeros_like(b.clock)

    def is_past(self, at: int, parity: int) -> bool:
        b = self.at.get(at)
        return b is not None and b.phase % 2 != parity

    def acquire(self, at: int, warps: np.ndarray, i: Instruction) -> None:
        """Those who waited have now seen what those who arrived had seen."""
        b, races = self.at[at], self.m.races
        if races:
            for warp in warps:
                self.find(at, i, 32 * int(warp))
                b.waited[int(warp)] = races.now(warp)
            races.acquire(warps, b.last_clock)
            races.tick(warps)

    def finish(self) -> None:
        pass  # Triton leaves the last barriers as they are


@instruction("mbarrier.init", operands=2, modifiers=SCOPES)
def init(m, i) -> Action:
    place, count = m.shared_address(i.operands[0]), m.value(i.operands[1], "u32")

    def run(mask) -> None:
        for t in m.active(mask):
            m.mbarriers.make(int(place()[t]), int(count[t]), int(t), i)

    return run


@instruction("mbarrier.inval", operands=1, modifiers=SCOPES)
def inval(m, i) -> Action:
    place = m.shared_address(i.operands[0])

    def run(mask) -> None:
        for t in m.active(mask):
            m.mbarriers.destroy(int(place()[t]), int(t), i)

    return run


@instruction("mbarrier.arrive", operands=(2, 3), modifiers=f"{SCOPES} expect_tx")
def arrive(m, i) -> Action:
    """With .expect_tx the number is one of bytes, and the arrival is one."""
    place = m.shared_address(i.operands[1])
    number = m.value(i.operands[2], "u32") if len(i.operands) > 2 else np.ones(m.threads, np.uint32)
    expect = "expect_tx" in i.parts

    def run(mask) -> None:
        for t in m.active(mask):
            n = int(number[t])
            m.mbarriers.arrive(int(place()[t]), 1 if expect else n, n if expect else 0, int(t), i)

    return run


@instruction("fence.proxy.async", operands=0, modifiers="shared::cta global")
def fence_proxy_async(m, i) -> Action:
    """ "Memory Consistency Model: Proxies": TMA and wgmma see memory by another way than loads and stores do."""
    return lambda mask: m.races and m.races.fence(m.warps_of(mask))


@instruction("fence.mbarrier_init", operands=0, modifiers="release cluster")
@instruction("fence", "membar", operands=0, modifiers="acq_rel sc cta gpu sys gl cluster")
def fence(m, i) -> None:
    return None  # orders what is in order here anyway
