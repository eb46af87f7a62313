"""The machine: registers, and a scheduler for the threads of one block.

    block of 256 threads, one array of 256 numbers per register

    all threads ──► actions of a basic block, one after the other, each for all threads at once (NumPy)
                       │ branch: the threads part
               ┌───────┴────────┐
            party A          party B        each a mask of threads, and a place in the program
               │                │           the one that is furthest behind runs next
               └───────┬────────┘           at the same place they are one again
                       ▼
             barrier: a party waits there until enough threads have come, so warps with different jobs are coroutines

Blocks of the grid run one after the other. Asynchronous engines (cp.async, TMA, wgmma) act as late as the rules
allow: when somebody waits for them, or when nothing else can run. So a missing wait gives a wrong answer.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from . import arithmetic  # noqa: F401  (fills the table of instructions)
from .checks import Findings, RaceCheck
from .counters import Counters
from .data_movement import AsyncCopies
from .formats import REGISTERS, TYPES, UNSIGNED, size_of
from .instructions import Action, Mask, Unsupported, compile_instruction, instruction
from .mbarriers import Mbarriers
from .memory import LOCAL_BASE, SHARED_BASE, GlobalMemory, SharedMemory
from .ptx import SCHEDULING, Address, Immediate, Instruction, Kernel, Not, Operand, Register, Special, Symbol
from .tensor_copies import TensorCopies
from .tensor_cores import Products


class Deadlock(RuntimeError):
    """Nobody can go on; the message says who waits where."""


@dataclass(eq=False)
class Party:
    """Threads that stand at the same place."""

    at: int  # block of instructions
    mask: np.ndarray
    waits_for: tuple[int, int] | None = None  # an mbarrier and the parity of the phase that must end

    @property
    def warps(self) -> np.ndarray:
        return np.flatnonzero(self.mask.reshape(-1, 32).any(1))


class Machine:
    """One kernel, ready to run on one grid; see `run`."""

    def __init__(
        self, kernel: Kernel, memory: GlobalMemory, parameters: np.ndarray, offsets: dict[str, int], shared_bytes: int,
        findings: Findings, check: bool = True,
    ):  # fmt: skip
        self.kernel, self.memory, self.findings, self.check = kernel, memory, findings, check
        self.parameters, self.offsets = parameters, offsets
        self.threads, self.warps = kernel.threads, kernel.threads // 32
        self.thread = np.arange(self.threads)
        self.lane = self.thread % 32
        self.shared = SharedMemory(shared_bytes, findings)
        self.counters = Counters()
        self.executed: Counter[int] = Counter()  # block of instructions -> warps that ran it
        self.torn: Counter[Instruction] = Counter()  # branches at which a warp parted
        self.registers: dict[str, np.ndarray] = {
            name: np.zeros(self.threads, REGISTERS[bits]) for name, bits in kernel.registers.items()
        }
        self.local = np.zeros(
            (self.threads, max((sum(place) for place in kernel.locals.values()), default=0)), np.uint8
        )
        self.special = self._special()
        instructions = [i for block in kernel.blocks for i in block]
        self.unit = min([4] + [_piece(i) for i in instructions if i.op.startswith(("ld.shared", "st.shared"))])
        self.async_copies, self.mbarriers = AsyncCopies(self), Mbarriers(self)
        self.tensor_copies, self.products = TensorCopies(self), Products(self)
        self.engines = (self.async_copies, self.mbarriers, self.tensor_copies, self.products)
        self.uses_tensor_copies = any(i.op.startswith("cp.async.bulk.tensor") for i in instructions)
        self.code = [self._compile(block) for block in kernel.blocks]

    def _special(self) -> dict[str, np.ndarray]:
        """ "Special Registers"."""
        names = [f"{what}.{axis}" for what in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
        special = {name: np.zeros(self.threads, np.uint32) for name in names}
        special["tid.x"][:] = self.thread
        for axis, size in zip("xyz", (self.threads, 1, 1)):
            special[f"ntid.{axis}"][:] = size
        special |= {"laneid": self.lane.astype(np.uint32), "warpid": (self.thread // 32).astype(np.uint32)}
        lane, others = self.lane[:, None], np.arange(32)
        for name, chosen in {"lt": others < lane, "le": others <= lane, "eq": others == lane, "ge": others >= lane,
                             "gt": others > lane}.items():  # fmt: skip
            special[f"lanemask_{name}"] = np.packbits(chosen, axis=1, bitorder="little").view(np.uint32)[:, 0]
        return special

    # ---- operands, as arrays [threads] that stay the same for the whole run

    def bits(self, operand: Operand, dtype: np.dtype | type) -> np.ndarray:
        """The operand as unsigned numbers: a register itself (so it can be written too), or a constant."""
        size = np.dtype(dtype).itemsize
        if operand is None:
            return np.zeros(self.threads, dtype)
        if isinstance(operand, Register):
            array = self.registers[operand.name]
            if array.dtype.itemsize != size:
                raise Unsupported(f"register {operand.name} of {operand.width} bits as {8 * size}")
            return array
        if isinstance(operand, Special):
            return self.special[operand.name]
        if isinstance(operand, Immediate):
            value = operand.value
        elif isinstance(operand, Symbol) and operand.name == "global_smem":
            value = SHARED_BASE + operand.offset
        elif isinstance(operand, Symbol) and operand.name in self.offsets:
            value = self.offsets[operand.name] + operand.offset  # in the space of parameters
        elif isinstance(operand, Symbol) and operand.name in self.kernel.locals:
            value = self.kernel.locals[operand.name][0] + operand.offset
        else:
            raise Unsupported(f"operand {operand}")
        return np.full(self.threads, value & (1 << 8 * size) - 1, dtype)

    def value(self, operand: Operand, kind: str) -> np.ndarray:
        """The same bits as numbers of a type."""
        if kind == "pred":
            if isinstance(operand, Immediate):
                return np.full(self.threads, operand.value != 0)
            return np.zeros(self.threads, bool) if operand is None else self.registers[operand.name]
        return self.bits(operand, UNSIGNED[size_of(kind)]).view(TYPES[kind])

    def predicate(self, operand: Operand) -> Callable[[], np.ndarray]:
        """Reads a predicate, or the opposite of one."""
        if isinstance(operand, Not):
            array = self.value(operand.register, "pred")
            return lambda: ~array
        array = self.value(operand, "pred")
        return lambda: array

    def constant(self, operand: Operand) -> int:
        if not isinstance(operand, Immediate):
            raise Unsupported(f"{operand} where only a constant is known")
        return operand.value

    def global_address(self, address: Address) -> Callable[[], np.ndarray]:
        base, offset = self.bits(address.base, np.uint64), np.uint64(address.offset & 2**64 - 1)
        return lambda: base + offset

    def local_address(self, address: Address, generic: bool) -> Callable[[], np.ndarray]:
        """Byte offsets from each thread's own arrays. Of generic addresses only those into them are known here."""
        wide = isinstance(address.base, Register) and address.base.width == 64
        base = self.bits(address.base, np.uint64 if wide else np.uint32)
        offset = address.offset - (LOCAL_BASE if generic else 0)
        return lambda: base.astype(np.int64) + offset

    def shared_address(self, address: Address) -> Callable[[], np.ndarray]:
        """Byte offsets from the block's shared memory; registers may be of 32 or 64 bits."""
        wide = isinstance(address.base, Register) and address.base.width == 64
        base = self.bits(address.base, np.uint64 if wide else np.uint32)
        offset = address.offset - SHARED_BASE
        return lambda: base.astype(np.int64) + offset

    # ---- masks

    def active(self, mask: Mask) -> np.ndarray:
        """The threads of a mask."""
        return self.thread if mask is True else np.flatnonzero(mask)

    def warps_of(self, mask: Mask) -> np.ndarray:
        return np.unique(self.active(mask) // 32)

    def expect_whole_warps(self, mask: Mask, i: Instruction) -> None:
        if mask is not True and not np.isin(mask.reshape(-1, 32).sum(1), (0, 32)).all():
            self.findings.add("divergent warp at an aligned instruction", i)

    # ---- the program: each block is (actions, control); control moves a party, and says whether it may go on at once

    def _compile(self, block: list[Instruction]) -> tuple[list[Action], Callable[[Party], bool]]:
        if block and block[0].op.startswith(SCHEDULING):
            return [], CONTROL[block[0].parts[0]](self, block[0])
        actions = (compile_instruction(self, i) for i in block)
        return [action for action in actions if action is not None], _go_on

    def run(self, grid: tuple[int, int, int]) -> None:
        for axis, size in zip("xyz", grid):
            self.special[f"nctaid.{axis}"][:] = size
        with np.errstate(all="ignore"):
            for z, y, x in itertools.product(*map(range, reversed(grid))):
                self.run_block(x, y, z)

    def run_block(self, *block: int) -> None:
        for axis, index in zip("xyz", block):
            self.special[f"ctaid.{axis}"][:] = index
        self.shared.clear()
        copies = 16 if self.uses_tensor_copies else 0
        self.races = RaceCheck(self.shared.nbytes, self.warps, copies, self.unit, self.findings) if self.check else None
        for engine in self.engines:
            engine.start()
        self.running = [Party(0, np.ones(self.threads, bool))]
        self.arrived: dict[tuple[int, int], list[Party]] = {}  # (barrier, threads) -> who waits there
        self.exited = np.zeros(self.threads, bool)
        while self.running or self.arrived:
            ready = [p for p in self.running if p.waits_for is None or self.mbarriers.is_past(*p.waits_for)]
            if ready:
                self._advance(self._merge(ready))
            elif not self.tensor_copies.land_one():
                raise Deadlock(self._who_waits())
        for engine in self.engines:
            engine.finish()

    def _merge(self, ready: list[Party]) -> Party:
        """The party that is furthest behind, with everybody who stands at the same place."""
        behind = min(ready, key=lambda p: p.at)
        for other in ready:
            if other is not behind and other.at == behind.at:
                behind.mask = behind.mask | other.mask
                self.running.remove(other)
        return behind

    def _advance(self, party: Party) -> None:
        while True:
            actions, control = self.code[party.at]
            everybody = party.mask.all()
            self.executed[party.at] += self.warps if everybody else len(party.warps)
            mask = True if everybody else party.mask
            for action in actions:
                action(mask)
            if not control(party) or len(self.running) > 1:
                return

    def _who_waits(self) -> str:
        lines = ["deadlock:"]
        for party in self.running:
            i = self.kernel.blocks[party.at][0]
            lines.append(f"warps {party.warps.tolist()} wait for mbarrier {party.waits_for} ({i.where})")
        for (number, count), parties in self.arrived.items():
            for party in parties:
                i = self.kernel.blocks[party.at - 1][0]
                lines.append(f"warps {party.warps.tolist()} wait for {count} threads at barrier {number} ({i.where})")
        return "\n".join(lines)


def _piece(i: Instruction) -> int:
    return size_of(next(part for part in reversed(i.parts) if part in TYPES))


# ---- "Control Flow", "Parallel Synchronization and Communication" -------------------------------------------------


def _go_on(party: Party) -> bool:
    party.at += 1
    return True


def branch(m: Machine, i: Instruction) -> Callable[[Party], bool]:
    target = m.kernel.labels[i.operands[0].name]
    guard = None if i.guard is None else m.registers[i.guard.name]

    def control(party: Party) -> bool:
        taken = party.mask if guard is None else party.mask & (guard != i.negated)
        if not taken.any():
            party.at += 1
        elif (taken == party.mask).all():
            party.at = target
        else:
            some, whole = (mask.reshape(-1, 32).sum(1) for mask in (taken, party.mask))
            if torn := int(((some > 0) & (some < whole)).sum()):
                m.torn[i] += torn
            m.running.append(Party(target, taken))
            party.mask = party.mask & ~taken
            party.at += 1
        return True

    return control


def leave(m: Machine, i: Instruction) -> Callable[[Party], bool]:
    if i.guard is not None:
        raise Unsupported(f"{i.where}: a guarded return")

    def control(party: Party) -> bool:
        m.exited |= party.mask
        m.running.remove(party)
        return False

    return control


def barrier(m: Machine, i: Instruction) -> Callable[[Party], bool]:
    """Warps with different jobs may meet at one barrier from different places."""
    number = m.constant(i.operands[0])
    count = m.constant(i.operands[1]) if len(i.operands) > 1 else m.threads

    def control(party: Party) -> bool:
        waiting = m.arrived.setdefault((number, count), [])
        waiting.append(Party(party.at + 1, party.mask))
        m.running.remove(party)
        mask = np.logical_or.reduce([p.mask for p in waiting])
        if mask.sum() >= count - (m.exited.sum() if count == m.threads else 0):
            if m.races:
                m.races.barrier(m.warps_of(mask), i)
            m.running += m.arrived.pop((number, count))
        return False

    return control


def wait_for_mbarrier(m: Machine, i: Instruction) -> Callable[[Party], bool]:
    """`mbarrier.try_wait` stands in a loop; here its threads sleep until the phase is over."""
    address, parity = m.shared_address(cast(Address, i.operands[1])), m.value(i.operands[2], "u32")
    done = m.value(i.operands[0], "pred")

    def control(party: Party) -> bool:
        first = int(party.mask.argmax())
        party.waits_for = (int(address()[first]), int(parity[first]) & 1)
        if not m.mbarriers.is_past(*party.waits_for):
            m.executed[party.at] -= len(party.warps)  # counted once, however long it takes
            return False
        m.mbarriers.acquire(party.waits_for[0], party.warps, i)
        party.waits_for = None
        done[party.mask] = True
        party.at += 1
        return True

    return control


CONTROL = {
    "bra": branch, "ret": leave, "exit": leave, "bar": barrier, "barrier": barrier, "mbarrier": wait_for_mbarrier,
}  # fmt: skip


@instruction("bar.warp.sync", operands=1)
def warp_barrier(m: Machine, i: Instruction) -> Action:
    def run(mask: Mask) -> None:
        if m.races:
            m.races.tick(m.warps_of(mask))

    return run
