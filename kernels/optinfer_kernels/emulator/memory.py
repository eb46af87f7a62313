"""Memory: the launch's tensors at their real addresses, every access held to their elements; and a block's shared memory."""

import ctypes
from collections.abc import Iterator

import numpy as np
import torch

from .checks import Findings
from .formats import UNSIGNED
from .ptx import Instruction

SHARED_BASE = 1024  # where shared memory begins in its window; not at 0, so that a null pointer is noticed
LOCAL_BASE = 1 << 48  # where the window of local memory begins among generic addresses; no tensor lies there
SECTOR = 32  # bytes: the least that a GPU moves between memory and cache
GARBAGE = 0xA5  # what shared memory holds before anybody writes


class Region:
    """The bytes from a tensor's first element to its last: what a kernel may touch. Its storage may be larger."""

    def __init__(self, name: str, low: int, nbytes: int, owner: object):
        self.name, self.low, self.high = name, low, low + nbytes
        self.owner = owner  # keeps the memory alive
        self.base = low // SECTOR * SECTOR  # views begin here, so that an aligned address is an aligned index
        length = -(-(self.high - self.base) // SECTOR) * SECTOR
        self.octets = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.base))
        self.views = {size: self.octets.view(kind) for size, kind in UNSIGNED.items()}
        self.read, self.written = (np.zeros(length // SECTOR, bool) for _ in range(2))


class GlobalMemory:
    def __init__(self, findings: Findings):
        self.findings = findings
        self.regions: list[Region] = []

    def add(self, name: str, tensor: torch.Tensor | np.ndarray) -> int:
        """Let the kernel touch a torch tensor or an array; returns its address."""
        if isinstance(tensor, np.ndarray):
            address, nbytes = tensor.ctypes.data, tensor.nbytes
        else:
            address = tensor.data_ptr()
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
            nbytes = (last + 1) * tensor.element_size() if tensor.numel() else 0
        if nbytes:
            self.regions.append(Region(name, address, nbytes, tensor))
        return address

    def find(
        self, address: np.ndarray, size: int, i: Instruction, what: str
    ) -> Iterator[tuple[Region, slice | np.ndarray, np.ndarray]]:
        """(region, which of the addresses, byte offsets from its base); what lies in no region is reported."""
        if (address % np.uint64(min(size, 16))).any():
            self.findings.add("misaligned global access", i, f"{what} of {size} bytes at {int(address.min()):#x}")
            return
        low, high = int(address.min()), int(address.max()) + size
        for region in self.regions:
            if region.low <= low and high <= region.high:
                yield region, slice(None), (address - np.uint64(region.base)).astype(np.int64)
                return
        left = np.ones(len(address), bool)
        for region in self.regions:
            inside = left & (address >= np.uint64(region.low)) & (address + np.uint64(size) <= np.uint64(region.high))
            if inside.any():
                left &= ~inside
                yield region, inside, (address[inside] - np.uint64(region.base)).astype(np.int64)
        if left.any():
            self._report(address[left], size, i, what)

    def _report(self, address: np.ndarray, size: int, i: Instruction, what: str) -> None:
        first = int(address[0])
        near = min(self.regions, key=lambda r: max(r.low - first, first - r.high))
        place = f"{what} of {size} bytes at byte {first - near.low} of {near.name}, which has {near.high - near.low}"
        self.findings.add("global out of bounds", i, place, len(address))

    def load(self, address: np.ndarray, size: int, i: Instruction, what: str = "load") -> np.ndarray:
        """[lanes, pieces of at most 8 bytes] as unsigned; zero where nothing may be read."""
        piece = min(size, 8)
        out = np.zeros((len(address), size // piece), UNSIGNED[piece])
        for region, lanes, offset in self.find(address, size, i, what):
            region.read[offset // SECTOR] = True
            region.read[(offset + size - 1) // SECTOR] = True
            out[lanes] = region.views[piece][(offset // piece)[:, None] + np.arange(size // piece)]
        return out

    def store(self, address: np.ndarray, values: np.ndarray, i: Instruction) -> None:
        """values: [lanes, pieces]."""
        piece, pieces = values.dtype.itemsize, values.shape[1]
        for region, lanes, offset in self.find(address, piece * pieces, i, "store"):
            region.written[offset // SECTOR] = True
            region.views[piece][(offset // piece)[:, None] + np.arange(pieces)] = values[lanes]

    def row(self, address: int, nbytes: int, i: Instruction, what: str) -> np.ndarray | None:
        """The bytes of one row of a tensor copy, as a view, or None (and a finding) if not all of them may be touched."""
        for region in self.regions:
            if region.low <= address and address + nbytes <= region.high:
                first = address - region.base
                touched = region.written if what == "tensor store" else region.read
                touched[first // SECTOR : -(-(first + nbytes) // SECTOR)] = True
                return region.octets[first : first + nbytes]
        self._report(np.array([address]), nbytes, i, what)
        return None

    def distinct_bytes(self) -> tuple[int, int]:
        """(read, written) in distinct sectors: the traffic if a cache held everything."""
        read, written = (
            SECTOR * sum(int(r.__dict__[kind].sum()) for r in self.regions) for kind in ("read", "written")
        )
        return read, written


class SharedMemory:
    """The bytes of one block, and views of them as numbers of 1, 2, 4 and 8 bytes."""

    def __init__(self, nbytes: int, findings: Findings):
        self.nbytes, self.findings = nbytes, findings
        self.octets = np.empty(-(-max(nbytes, 16) // 16) * 16, np.uint8)
        self.views = {size: self.octets.view(kind) for size, kind in UNSIGNED.items()}
        self.rows = self.octets.reshape(-1, 16)

    def clear(self) -> None:
        self.octets[:] = GARBAGE

    def allows(self, offset: np.ndarray, size: int, i: Instruction, what: str) -> bool:
        low, high = int(offset.min()), int(offset.max()) + size
        if low < 0 or high > self.nbytes:
            self.findings.add("shared out of bounds", i, f"{what} of bytes {low} to {high} of {self.nbytes}")
            return False
        if (offset % size).any():
            self.findings.add("misaligned shared access", i, f"{what} of {size} bytes")
            return False
        return True

    def load(self, offset: np.ndarray, piece: int, pieces: int) -> np.ndarray:
        """[lanes, pieces]"""
        return self.views[piece][(offset // piece)[:, None] + np.arange(pieces)]

    def store(self, offset: np.ndarray, values: np.ndarray) -> None:
        piece = values.dtype.itemsize
        self.views[piece][(offset // piece)[:, None] + np.arange(values.shape[1])] = values
