"""Counters: what each instruction moved, and the least that it could have taken."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from .memory import SECTOR
from .ptx import Instruction

BANKS, BANK_BYTES = 32, 4


@dataclass
class Traffic:
    """Of one instruction, over the whole run. `cost`: sectors of 32 bytes (global) or wavefronts (shared)."""

    requests: int = 0  # by warps
    nbytes: int = 0  # asked for, without repetition within a warp
    cost: int = 0
    ideal: int = 0  # sectors or wavefronts if the same bytes lay side by side

    def __iadd__(self, other: "Traffic") -> "Traffic":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class Counters:
    def __init__(self) -> None:
        self.rows: dict[tuple[str, Instruction], Traffic] = {}  # ("global" or "shared", instruction) -> traffic
        self._known: dict[Hashable, Traffic] = {}  # the same pattern of addresses comes again and again

    def global_access(self, i: Instruction, address: np.ndarray, size: int, thread: np.ndarray) -> None:
        """address, thread: [n], of the lanes that take part."""
        start = address - address.min() // np.uint64(SECTOR) * np.uint64(SECTOR)
        self._add("global", i, start.astype(np.int64), size, thread, _sectors)

    def shared_access(self, i: Instruction, offset: np.ndarray, size: int, thread: np.ndarray) -> None:
        start = offset - offset.min() // (BANKS * BANK_BYTES) * (BANKS * BANK_BYTES)
        self._add("shared", i, start, size, thread, _wavefronts)

    def add(self, memory: str, i: Instruction, traffic: Traffic) -> None:
        self.rows.setdefault((memory, i), Traffic()).__iadd__(traffic)

    def _add(
        self, memory: str, i: Instruction, start: np.ndarray, size: int, thread: np.ndarray, count: Callable
    ) -> None:
        key = (memory, size, start.tobytes(), thread.tobytes())
        if key not in self._known:
            self._known[key] = count(start, size, thread)
        self.add(memory, i, self._known[key])


def _pairs(group: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Distinct (group, place), as two rows."""
    both = np.stack(np.broadcast_arrays(group, place)).reshape(2, -1)
    return np.unique(both, axis=1)


def _sectors(start: np.ndarray, size: int, thread: np.ndarray) -> Traffic:
    """A warp's request takes each sector that it touches once."""
    warp = thread >> 5
    sectors = _pairs(warp[:, None], start[:, None] // SECTOR + np.arange(max(1, size // SECTOR))).shape[1]
    warps, bytes_of = np.unique(_pairs(warp, start)[0], return_counts=True)
    ideal = int((-(-bytes_of * size // SECTOR)).sum())
    return Traffic(len(warps), int(bytes_of.sum()) * size, sectors, ideal)


def _wavefronts(start: np.ndarray, size: int, thread: np.ndarray) -> Traffic:
    """Lanes go together that could move 128 bytes at once; each bank gives one word of 4 bytes per wavefront."""
    group = thread // min(32, BANKS * BANK_BYTES // max(size, BANK_BYTES))
    words = start[:, None] // BANK_BYTES + np.arange(max(1, size // BANK_BYTES))
    groups, words = _pairs(group[:, None], words)
    cost = ideal = 0
    for g in np.unique(groups):
        mine = words[groups == g]
        cost += int(np.bincount(mine % BANKS).max())
        ideal += -(-len(mine) // BANKS)
    return Traffic(len(np.unique(thread >> 5)), len(start) * size, cost, ideal)
