"""Loads, stores, atomics, cp.async, and matrices between shared memory and registers ("Data Movement and Conversion")."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .formats import TYPES, UNSIGNED, size_of
from .instructions import Action, Unsupported, instruction, last_type
from .ptx import Instruction, Register, Vector

CACHE = (
    "global shared shared::cta param local v2 v4 v8 nc relaxed volatile acquire release weak gpu cta sys ca cg cs wb "
    "L1::evict_first L1::evict_last L1::no_allocate L2::cache_hint L2::evict_first L2::evict_last L2::128B L2::256B"
)


def _shape(i: Instruction) -> tuple[str, int, int]:
    """(type, bytes of one, how many)"""
    kind = last_type(i)
    return kind, size_of(kind), next((int(part[1:]) for part in i.parts if part in ("v2", "v4", "v8")), 1)


def _items(operand) -> list:
    return list(operand.items) if isinstance(operand, Vector) else [operand]


@instruction("ld", operands=(2, 3), modifiers=CACHE)
def load(m, i) -> Action:
    kind, size, count = _shape(i)
    targets = [None if t is None else m.registers[t.name] for t in _items(i.operands[0])]

    def put(lanes: np.ndarray, values: np.ndarray) -> None:
        """values: unsigned [lanes, count]. A signed one fills a wider register with its sign."""
        values = values.view(f"i{size}") if kind[0] == "s" else values
        for target, column in zip(targets, values.T):
            if target is not None:
                target[lanes] = column.astype(target.dtype)

    if "param" in i.parts:
        first = m.offsets[i.operands[1].base.name] + i.operands[1].offset
        constant = m.parameters[first : first + size * count].view(UNSIGNED[size])
        return lambda mask: put(m.active(mask), np.tile(constant, (len(m.active(mask)), 1)))
    if "global" in i.parts:
        address = m.global_address(i.operands[1])

        def load_global(mask) -> None:
            lanes = m.active(mask)
            at = address()[lanes]
            m.counters.global_access(i, at, size * count, lanes)
            put(lanes, m.memory.load(at, size * count, i).view(UNSIGNED[size]))

        return load_global
    if not any(part.startswith("shared") for part in i.parts):
        own = m.local_address(i.operands[1], generic="local" not in i.parts)

        def load_local(mask) -> None:
            lanes = m.active(mask)
            octets = _octets(m, i, own()[lanes], size * count)
            put(lanes, m.local[lanes[:, None], octets].view(UNSIGNED[size]))

        return load_local
    place = m.shared_address(i.operands[1])

    def load_shared(mask) -> None:
        lanes = m.active(mask)
        offset = place()[lanes]
        if not m.shared.allows(offset, size * count, i, "load"):
            return put(lanes, np.zeros((len(lanes), count), UNSIGNED[size]))
        if m.races:
            m.races.read(offset, size * count, lanes, i)
        m.counters.shared_access(i, offset, size * count, lanes)
        return put(lanes, m.shared.load(offset, size, count))

    return load_shared


def _octets(m, i: Instruction, offset: np.ndarray, nbytes: int) -> np.ndarray:
    """[lanes, nbytes]: places in each thread's own arrays."""
    if offset.min() < 0 or offset.max() + nbytes > m.local.shape[1] or (offset % nbytes).any():
        raise Unsupported(f"{i.where}: a generic address that is not one of the thread's own arrays")
    return offset[:, None] + np.arange(nbytes)


@instruction("st", operands=(2, 3), modifiers=CACHE)
def store(m, i) -> Action:
    _, size, count = _shape(i)
    sources = [m.bits(s, UNSIGNED[s.width // 8 if isinstance(s, Register) else size]) for s in _items(i.operands[1])]

    def values(lanes: np.ndarray) -> np.ndarray:
        return np.stack([s[lanes].astype(UNSIGNED[size]) for s in sources], 1)

    if "global" in i.parts:
        address = m.global_address(i.operands[0])

        def store_global(mask) -> None:
            lanes = m.active(mask)
            at = address()[lanes]
            m.counters.global_access(i, at, size * count, lanes)
            m.memory.store(at, values(lanes).view(UNSIGNED[min(8, size * count)]), i)

        return store_global
    if not any(part.startswith("shared") for part in i.parts):
        own = m.local_address(i.operands[0], generic="local" not in i.parts)

        def store_local(mask) -> None:
            lanes = m.active(mask)
            octets = _octets(m, i, own()[lanes], size * count)
            m.local[lanes[:, None], octets] = values(lanes).view(np.uint8)

        return store_local
    place = m.shared_address(i.operands[0])

    def store_shared(mask) -> None:
        lanes = m.active(mask)
        write_shared(m, i, place()[lanes], values(lanes), lanes)

    return store_shared


def write_shared(m, i, offset: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
    """values: [lanes, pieces]"""
    size = values.dtype.itemsize * values.shape[1]
    if not m.shared.allows(offset, size, i, "store"):
        return
    if m.races:
        before = m.shared.load(offset, values.dtype.itemsize, values.shape[1])
        m.races.write(offset, size, lanes, i, (before != values).any(1))
        order = np.argsort(offset, kind="stable")
        same = np.diff(offset[order]) == 0
        if (same & (values[order][1:] != values[order][:-1]).any(1)).any():
            m.findings.add("race: one instruction writes two values to one place", i)
    m.counters.shared_access(i, offset, size, lanes)
    m.shared.store(offset, values)


@instruction("atom", operands=3, modifiers="global gpu cta sys relaxed acq_rel acquire release add")
@instruction("red", operands=2, modifiers="global gpu cta sys relaxed acq_rel acquire release add")
def atomic_add(m, i) -> Action:
    kind = last_type(i)
    *target, where, value = i.operands
    if "add" not in i.parts or "global" not in i.parts:
        raise Unsupported("an atomic other than add in global memory")
    address, x = m.global_address(where), m.value(_items(value)[0], kind)
    d = m.value(_items(target[0])[0], kind) if target else None
    size = size_of(kind)

    def run(mask) -> None:
        lanes = m.active(mask)
        at = address()[lanes]
        m.counters.global_access(i, at, size, lanes)
        for region, chosen, offset in m.memory.find(at, size, i, "atomic"):
            numbers, index = region.octets.view(TYPES[kind]), offset // size
            if d is not None:
                d[lanes[chosen]] = numbers[index]
            np.add.at(numbers, index, x[lanes[chosen]])
            region.written[offset // 32] = True

    return run


# ---- cp.async: "Data Movement and Conversion: Asynchronous Copy" ------------------------------------------------


@dataclass
class AsyncCopy:
    """What the threads [n] of one instruction copy; it has been read, and will be seen when they wait for its group."""

    i: Instruction
    thread: np.ndarray
    group: np.ndarray
    offset: np.ndarray
    data: np.ndarray  # [n, pieces]

    def part(self, chosen: np.ndarray) -> "AsyncCopy":
        return AsyncCopy(self.i, *(x[chosen] for x in (self.thread, self.group, self.offset, self.data)))


class AsyncCopies:
    def __init__(self, m):
        self.m = m

    def start(self) -> None:
        self.committed = np.zeros(self.m.threads, np.int64)  # groups, by thread
        self.in_flight: list[AsyncCopy] = []

    def issue(self, copy: AsyncCopy, size: int) -> None:
        if races := self.m.races:
            races.write(copy.offset, size, copy.thread, copy.i)
            races.in_flight[races.units(copy.offset, size)] += 1
        self.in_flight.append(copy)

    def wait(self, mask, left: int) -> None:
        """All but the last `left` groups of these threads arrive."""
        waits = np.broadcast_to(mask, self.m.threads)
        still = []
        for copy in self.in_flight:
            done = waits[copy.thread] & (copy.group < self.committed[copy.thread] - left)
            if done.any():
                self._arrive(copy.part(done))
            if not done.all():
                still.append(copy.part(~done))
        self.in_flight = still

    def _arrive(self, copy: AsyncCopy) -> None:
        size = copy.data.dtype.itemsize * copy.data.shape[1]
        if races := self.m.races:
            races.in_flight[races.units(copy.offset, size)] -= 1
            races.write(copy.offset, size, copy.thread, copy.i)
        self.m.counters.shared_access(copy.i, copy.offset, size, copy.thread)
        self.m.shared.store(copy.offset, copy.data)

    def finish(self) -> None:
        if self.in_flight and self.m.check:
            self.m.findings.add("block ends with asynchronous copies in flight", self.in_flight[0].i)


@instruction(
    "cp.async", operands=(3, 4, 5), modifiers="ca cg shared shared::cta global L2::128B L2::256B L2::cache_hint"
)
def copy_async(m, i) -> Action:
    place, address = m.shared_address(i.operands[0]), m.global_address(i.operands[1])
    size = m.constant(i.operands[2])
    take = m.value(i.operands[3], "u32") if len(i.operands) > 3 else np.full(m.threads, size, np.uint32)
    piece = min(size, 8)

    def run(mask) -> None:
        lanes = m.active(mask)
        offset, from_memory = place()[lanes], take[lanes] == size
        if not (from_memory | (take[lanes] == 0)).all():
            raise Unsupported(f"{i.where}: a part of a source")
        data = np.zeros((len(lanes), size // piece), UNSIGNED[piece])
        if from_memory.any():
            at = address()[lanes[from_memory]]
            data[from_memory] = m.memory.load(at, size, i)
            m.counters.global_access(i, at, size, lanes[from_memory])
        if m.shared.allows(offset, size, i, "cp.async"):
            m.async_copies.issue(AsyncCopy(i, lanes, m.async_copies.committed[lanes], offset, data), size)

    return run


@instruction("cp.async.commit_group", operands=0)
def commit_group(m, i) -> Action:
    def run(mask) -> None:
        m.async_copies.committed += np.broadcast_to(mask, m.threads)

    return run


@instruction("cp.async.wait_group", operands=1)
@instruction("cp.async.wait_all", operands=0)
def wait_group(m, i) -> Action:
    left = m.constant(i.operands[0]) if i.operands else 0
    return lambda mask: m.async_copies.wait(mask, left)


# ---- "Warp Level Matrix Instructions: ldmatrix, stmatrix": 8x8 matrices of 16 bits, a row of 16 bytes from each lane ----


def _matrices(i: Instruction) -> int:
    return next(int(part[1:]) for part in i.parts if part in ("x1", "x2", "x4"))


def _row_senders(m, count: int) -> Callable:
    """The threads of a mask that give the address of a row: 8 for each matrix."""
    gives = m.lane < 8 * count
    return lambda mask: np.flatnonzero(gives & mask)


@instruction("ldmatrix", operands=2, modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def load_matrix(m, i) -> Action:
    count = _matrices(i)
    targets = [m.registers[t.name] for t in i.operands[0].items]
    place, senders = m.shared_address(i.operands[1]), _row_senders(m, count)

    def run(mask) -> None:
        m.expect_whole_warps(mask, i)
        lanes = senders(mask)
        offset = place()[lanes]
        if not m.shared.allows(offset, 16, i, "ldmatrix"):
            return
        if m.races:
            m.races.read(offset, 16, lanes, i)
        m.counters.shared_access(i, offset, 16, lanes)
        rows = m.shared.load(offset, 2, 8).reshape(-1, count, 8, 8)  # [warps, matrix, row, column]
        if "trans" in i.parts:
            rows = rows.swapaxes(2, 3)
        words = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, count, 32)  # a lane holds two columns of a row
        threads = m.active(mask)
        for k, target in enumerate(targets):
            target[threads] = words[:, k].reshape(-1)

    return run


@instruction("stmatrix", operands=2, modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def store_matrix(m, i) -> Action:
    count = _matrices(i)
    sources = [m.registers[s.name] for s in i.operands[1].items]
    place, senders = m.shared_address(i.operands[0]), _row_senders(m, count)

    def run(mask) -> None:
        m.expect_whole_warps(mask, i)
        lanes = senders(mask)
        words = np.stack([s[m.active(mask)].reshape(-1, 32) for s in sources], 1)  # [warps, matrix, lane]
        rows = words.view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in i.parts:
            rows = rows.swapaxes(2, 3)
        write_shared(m, i, place()[lanes], np.ascontiguousarray(rows).reshape(-1, 8), lanes)

    return run
