"""The TMA unit: tensor maps, and copies of whole tiles ("Asynchronous Copy: Tensor", "tensormap.replace").

A load lands only when nothing else can run; a store reads its tile only when somebody waits for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .counters import Traffic
from .instructions import Action, Unsupported, instruction, last_type
from .memory import SECTOR, SHARED_BASE
from .ptx import Instruction

ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)  # by the number that stands for the type in a tensor map
MAP_BYTES = 128


@dataclass
class TensorMap:
    """A tensor in global memory and the box that one copy moves; dimension 0 is the contiguous one."""

    address: int = 0
    rank: int = 1
    item: int = 1  # bytes of an element
    swizzle: int = 0  # 0: none, 1 to 3: 32, 64, 128 bytes
    fills_nan: int = 0
    dims: dict[int, int] = field(default_factory=dict)
    box: dict[int, int] = field(default_factory=dict)
    strides: dict[int, int] = field(default_factory=dict)  # bytes, of dimensions 1 and up: strides[0] is that of 1
    acquired: bool = False  # made in the kernel, and not yet fenced
    made_by: tuple[int, int] | None = None  # the warp that published it, and its time


def swizzled(address: np.ndarray, mode: int) -> np.ndarray:
    """ "Swizzling Modes": bits 4 to 6 of a byte address change with bits 7 to 9."""
    return address ^ (address >> 7 & (1 << mode) - 1) << 4


@dataclass
class Tile:
    """Where a box lies. Rows may be outside of the tensor, and so may the beginning and end of each row."""

    address: np.ndarray  # [rows] of the first element that exists
    inside: np.ndarray  # [rows]
    columns: slice  # bytes of a row that exist
    chunks: np.ndarray  # [rows, bytes / 16]: offsets in shared memory
    row_bytes: int

    @classmethod
    def at(cls, t: TensorMap, start: list[int], place: int) -> Tile:
        rows = int(np.prod([t.box[k] for k in range(1, t.rank)], dtype=np.int64))
        first, last = max(0, -start[0]), min(t.box[0], t.dims[0] - start[0])
        address = np.full(rows, t.address + (start[0] + first) * t.item, np.int64)
        inside = np.full(rows, last > first)
        index = np.arange(rows)
        for k in range(1, t.rank):
            coordinate = start[k] + index % t.box[k]
            index = index // t.box[k]
            inside &= (coordinate >= 0) & (coordinate < t.dims[k])
            address += coordinate * t.strides[k - 1]
        row_bytes = t.box[0] * t.item
        chunks = place + np.arange(rows)[:, None] * row_bytes + np.arange(0, row_bytes, 16)
        chunks = swizzled(chunks + SHARED_BASE, t.swizzle) - SHARED_BASE
        return cls(address, inside, slice(first * t.item, max(first, last) * t.item), chunks, row_bytes)

    def rows(self, memory, i: Instruction, what: str):
        """(row, its bytes in global memory)"""
        for row in np.flatnonzero(self.inside):
            there = memory.row(int(self.address[row]), self.columns.stop - self.columns.start, i, what)
            if there is not None:
                yield row, there

    @property
    def traffic(self) -> Traffic:
        length, rows = self.columns.stop - self.columns.start, int(self.inside.sum())
        sectors = rows * -(-length // SECTOR)
        return Traffic(1, rows * length, sectors, sectors)


@dataclass
class Store:
    thread: int
    group: int
    run: Callable[[], None]


class TensorCopies:
    def __init__(self, m):
        self.m = m
        self.from_host: dict[int, TensorMap] = {}  # those that came as parameters

    def start(self) -> None:
        self.maps: dict[int | tuple[str, int], TensorMap] = {}  # by address; ("shared", offset) in the making
        self.maps.update(self.from_host.items())
        self.loads: list[Callable[[], None]] = []
        self.stores: list[Store] = []
        self.committed = np.zeros(self.m.threads, np.int64)

    def find(self, at: int, thread: int, i: Instruction) -> TensorMap | None:
        t, races = self.maps.get(at), self.m.races
        if t is None:
            self.m.findings.add("tensor copy without a tensor map", i, f"at {at:#x}")
        elif not t.acquired:
            self.m.findings.add("tensor map used without fence.proxy.tensormap", i)
        elif races and t.made_by and not races.knows(thread // 32, *t.made_by):
            self.m.findings.add("tensor map used before its making is visible", i)
        elif t.address % 16 or any(t.strides[k] % 16 for k in range(t.rank - 1)):
            self.m.findings.add("tensor map of unaligned rows", i, f"address {t.address:#x}, strides {t.strides}")
        elif t.swizzle and t.box[0] * t.item > 16 << t.swizzle:
            self.m.findings.add("tensor map with a box wider than its swizzle", i, f"{t.box[0] * t.item} bytes")
        return t

    def tile(self, t: TensorMap, start: list[int], place: int, i: Instruction) -> Tile:
        alignment = 1024 if t.swizzle == 3 else 128 << max(0, t.swizzle - 1)
        if (place + SHARED_BASE) % alignment:
            self.m.findings.add("tensor copy to a misaligned place in shared memory", i, f"{place}, not of {alignment}")
        return Tile.at(t, start, place)

    def issue_load(self, t: TensorMap, start: list[int], place: int, barrier: int, thread: int, i: Instruction) -> None:
        m = self.m
        agent = m.races.start_copy(thread // 32) if m.races else None

        def land() -> None:
            tile = self.tile(t, start, place, i)
            data = np.zeros((len(tile.inside), tile.row_bytes), np.uint8)
            if t.fills_nan and (not tile.inside.all() or tile.columns != slice(0, tile.row_bytes)):
                raise Unsupported("a tensor map that fills with NaN")
            for row, there in tile.rows(m.memory, i, "tensor load"):
                data[row, tile.columns] = there
            m.counters.add("global", i, tile.traffic)
            offset = tile.chunks.reshape(-1)
            if not m.shared.allows(offset, 16, i, "tensor load"):
                return
            if m.races:
                m.races.write(offset, 16, np.full(len(offset), thread), i, agent=agent)
            m.shared.rows[offset // 16] = data.reshape(-1, 16)
            m.mbarriers.complete(barrier, data.size, agent, i)

        self.loads.append(land)

    def issue_store(self, t: TensorMap, start: list[int], place: int, thread: int, i: Instruction) -> None:
        m = self.m
        tile = self.tile(t, start, place, i)
        offset = tile.chunks.reshape(-1)
        if not m.shared.allows(offset, 16, i, "tensor store"):
            return
        seen = watch_operand(
            m, offset, [thread], i
        )  # what is ordered before the store's wait may not be before the store

        def leave() -> None:
            if m.races and (watch_operand(m, offset, [thread], i) != seen).any():
                m.findings.add("race: source of a tensor store overwritten before its wait", i)
            data = m.shared.rows[offset // 16].reshape(len(tile.inside), tile.row_bytes)
            for row, there in tile.rows(m.memory, i, "tensor store"):
                there[:] = data[row, tile.columns]
            m.counters.add("global", i, tile.traffic)

        self.stores.append(Store(thread, int(self.committed[thread]), leave))

    def wait(self, mask, left: int) -> None:
        waits = np.broadcast_to(mask, self.m.threads)
        due = [s for s in self.stores if waits[s.thread] and s.group < self.committed[s.thread] - left]
        self.stores = [s for s in self.stores if s not in due]
        for store in due:
            store.run()

    def land_one(self) -> bool:
        """The load that was asked for first; False if none is on its way."""
        if not self.loads:
            return False
        self.loads.pop(0)()
        return True

    def finish(self) -> None:
        for store in self.stores:
            self.m.findings.add("block ends while a tensor store may still read shared memory", None)
            store.run()
        while self.land_one():
            self.m.findings.add("block ends with a tensor load on its way", None)


def watch_operand(m, offset: np.ndarray, threads: Iterable[int], i: Instruction) -> np.ndarray | None:
    """Rows of 16 bytes of shared memory are read by TMA on behalf of a thread, or by wgmma for one of each warp.

    Returns the versions that are there now; others at the end of the read say that it was too late.
    """
    if not m.races:
        return None
    for thread in threads:
        m.races.read(offset, 16, np.full(len(offset), thread), i)
    if m.races.unfenced[m.races.units(offset, 16)].any():
        m.findings.add("asynchronous read of an ordinary write without fence.proxy.async", i)
    return m.races.version[m.races.units(offset, 16)]


# ---- instructions -----------------------------------------------------------------------------------------------


@instruction(
    "cp.async.bulk.tensor", operands=(2, 3, 4),
    modifiers="1d 2d 3d 4d 5d tile shared::cta shared::cluster global mbarrier::complete_tx::bytes bulk_group L2::cache_hint",
)  # fmt: skip
def copy_tensor(m, i) -> Action:
    """From the tensor map in brackets to shared memory, or (.bulk_group) the other way."""
    is_load = "bulk_group" not in i.parts
    to, source = i.operands[:2]
    tensor, tile = (source, to) if is_load else (to, source)
    place, where = m.shared_address(tile), m.global_address(tensor)
    coordinates = [m.value(c, "s32") for c in tensor.coordinates[0].items]
    barrier = m.shared_address(i.operands[2]) if is_load else None

    def run(mask) -> None:
        for t in map(int, m.active(mask)):
            found = m.tensor_copies.find(int(where()[t]), t, i)
            if found is None:
                continue
            start, at = [int(c[t]) for c in coordinates], int(place()[t])
            if barrier is not None:
                m.tensor_copies.issue_load(found, start, at, int(barrier()[t]), t, i)
            else:
                m.tensor_copies.issue_store(found, start, at, t, i)

    return run


@instruction("cp.async.bulk.commit_group", operands=0)
def commit(m, i) -> Action:
    def run(mask) -> None:
        m.tensor_copies.committed += np.broadcast_to(mask, m.threads)

    return run


@instruction("cp.async.bulk.wait_group", operands=1, modifiers="read")
def wait(m, i) -> Action:
    left = m.constant(i.operands[0])
    return lambda mask: m.tensor_copies.wait(mask, left)


SCALARS = {
    "global_address": "address",
    "rank": "rank",
    "elemtype": "item",
    "swizzle_mode": "swizzle",
    "fill_mode": "fills_nan",
}
INDEXED = {"global_dim": "dims", "box_dim": "box", "global_stride": "strides"}


@instruction(
    "tensormap.replace", operands=(2, 3),
    modifiers=f"tile shared::cta {' '.join([*SCALARS, *INDEXED])} element_stride interleave_layout swizzle_atomicity b1024",
)  # fmt: skip
def replace_field(m, i) -> Action:
    """One field of a map in the making, whose 128 bytes the kernel has cleared: what it does not set is zero."""
    name, place = i.parts[3], m.shared_address(i.operands[0])
    index = m.constant(i.operands[1]) if len(i.operands) > 2 else None
    value = m.value(i.operands[-1], "u64" if last_type(i) == "b64" else "u32")

    def run(mask) -> None:
        for thread in m.active(mask):
            if m.races:
                m.races.write(place()[thread : thread + 1], MAP_BYTES, np.array([thread]), i)
            t = m.tensor_copies.maps.setdefault(("shared", int(place()[thread])), TensorMap())
            number = int(value[thread])
            if name in INDEXED:
                getattr(t, INDEXED[name])[index] = number
            elif name in SCALARS:
                number = number + 1 if name == "rank" else ELEMENT_BYTES[number] if name == "elemtype" else number
                setattr(t, SCALARS[name], number)

    return run


@instruction(
    "tensormap.cp_fenceproxy", operands=3,
    modifiers="global shared::cta tensormap::generic release gpu sync aligned",
)  # fmt: skip
def publish_map(m, i) -> Action:
    to, source = m.global_address(i.operands[0]), m.shared_address(i.operands[1])

    def run(mask) -> None:
        t = m.active(mask)[0]
        made = m.tensor_copies.maps.get(("shared", int(source()[t])))
        if made is None:
            m.findings.add("tensor map copied before it was made", i)
            return
        made = copy.deepcopy(made)
        if races := m.races:
            races.tick(int(t) // 32)  # `.sync`: the warp's threads have met here
            races.read(source()[m.active(mask)], MAP_BYTES, m.active(mask), i)
            made.made_by = (int(t) // 32, races.now(int(t) // 32))
            races.tick(int(t) // 32)
        for _ in m.memory.find(to()[t : t + 1], MAP_BYTES, i, "tensor map"):
            m.tensor_copies.maps[int(to()[t])] = made

    return run


@instruction("fence.proxy.tensormap::generic", operands=2, modifiers="acquire gpu")
def acquire_map(m, i) -> Action:
    where = m.global_address(i.operands[0])

    def run(mask) -> None:
        t = m.tensor_copies.maps.get(int(where()[m.active(mask)[0]]))
        if t is not None:
            t.acquired = True

    return run
