"""Tensor cores: mma of one warp ("Warp Level Matrix Instructions"), wgmma of four ("Asynchronous Warpgroup Level ...").

Products are sums in float32, one instruction at a time; integers are exact there (below 2**24).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .formats import TYPES, accumulator, decode, fragment_a, fragment_b
from .instructions import Action, Unsupported, instruction
from .memory import SHARED_BASE
from .ptx import Instruction, Vector
from .tensor_copies import swizzled, watch_operand

GROUP = 128  # threads that share a wgmma
ROW = 32  # bytes of K that one wgmma takes
SWIZZLE = {1: 3, 2: 2, 3: 1}  # of a matrix descriptor -> of a tensor map


@instruction("mma", operands=4, modifiers="sync aligned m16n8k8 m16n8k16 m16n8k32 row col satfinite")
def multiply(m, i) -> Action:
    kinds = [part for part in i.parts if part in TYPES or part in ("bf16", "tf32")]
    total = kinds[0]
    if total not in ("f32", "s32"):
        raise Unsupported(f"sums in {total}")
    d, c = ([m.value(o, total) for o in i.operands[k].items] for k in (0, 3))
    a, b = ([m.registers[o.name] for o in i.operands[k].items] for k in (1, 2))

    def run(mask) -> None:
        m.expect_whole_warps(mask, i)
        product = accumulator(fragment_a(a, kinds[1]) @ fragment_b(b, kinds[2]))
        for target, addend, x in zip(d, c, product):
            if total == "s32":
                limits = np.iinfo(np.int32)
                x = np.clip(addend.astype(np.int64) + x.astype(np.int64), limits.min, limits.max).astype(np.int32)
                np.copyto(target, x, where=mask)
            else:
                np.add(addend, x, out=target, where=mask)

    return run


# ---- wgmma ------------------------------------------------------------------------------------------------------


@dataclass
class Operand:
    """Rows [rows, 32 bytes of K] in shared memory, and what was there when the product was issued."""

    address: np.ndarray
    chunks: np.ndarray  # the rows of 16 bytes that hold them
    versions: np.ndarray | None


@dataclass
class Product:
    i: Instruction
    operands: list[Operand]
    compute: Callable[[], None]


@dataclass
class Queue:
    """Of one group of four warps: products of closed groups, and those of the group still open."""

    closed: list[list[Product]] = field(default_factory=list)
    open: list[Product] = field(default_factory=list)


def one_of_each_warp(group: int) -> range:
    """Threads on whose behalf a group reads: its warps pass a wait one by one, and each knows of its own part only."""
    return range(group * GROUP, (group + 1) * GROUP, 32)


class Products:
    """Products that are on their way. They are computed when somebody waits for them, from what is then in memory."""

    def __init__(self, m):
        self.m = m

    def start(self) -> None:
        self.queues = [Queue() for _ in range(-(-self.m.threads // GROUP))]

    def groups(self, mask) -> list[int]:
        return np.unique(self.m.active(mask) // GROUP).tolist()

    def operand(self, descriptor: int, rows: int, transposed: bool, kind: str, group: int, i: Instruction) -> Operand:
        """ "Matrix Descriptor": start, and the strides between pieces of 8 rows. transposed: K is not contiguous."""
        start, leading, stride = ((descriptor >> k & 0x3FFF) << 4 for k in (0, 16, 32))
        if descriptor >> 49 & 7 or descriptor >> 62 not in SWIZZLE:
            raise Unsupported(f"{i.where}: descriptor {descriptor:#x} has a base offset, or no swizzle")
        mode = SWIZZLE[descriptor >> 62]
        width, item = 16 << mode, TYPES[kind]().itemsize if kind in TYPES else 2
        row, k = np.arange(rows)[:, None], np.arange(ROW // item)
        if transposed:
            per = width // item
            address = start + row // per * leading + row % per * item + k // 8 * stride + k % 8 * width
        else:
            address = start + row // 8 * stride + row % 8 * width + k * item
        address = swizzled(address, mode) - SHARED_BASE
        chunks = np.unique(address // 16) * 16
        if not self.m.shared.allows(chunks, 16, i, "wgmma"):
            return Operand(np.zeros_like(address), chunks[:0], None)
        return Operand(address, chunks, watch_operand(self.m, chunks, one_of_each_warp(group), i))

    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """float32 [rows, K]"""
        item = 1 if kind == "s8" else 2
        return decode(self.m.shared.views[item][operand.address // item], kind)[..., 0]

    def wait(self, mask, left: int) -> None:
        for group in self.groups(mask):
            closed = self.queues[group].closed
            done = max(0, len(closed) - left)
            for product in itertools.chain(*closed[:done]):
                for operand in product.operands:
                    if operand.versions is None:
                        continue
                    if (
                        watch_operand(self.m, operand.chunks, one_of_each_warp(group), product.i) != operand.versions
                    ).any():
                        self.m.findings.add("race: operand of a product overwritten before its wait", product.i)
                product.compute()
            del closed[:done]

    def finish(self) -> None:
        for queue in self.queues:
            for product in itertools.chain(*queue.closed, queue.open):
                self.m.findings.add("block ends with products not waited for", product.i)


@instruction("wgmma.fence", operands=0, modifiers="sync aligned")
def fence(m, i) -> None:
    return None  # registers are in order here


@instruction("wgmma.commit_group", operands=0, modifiers="sync aligned")
def commit(m, i) -> Action:
    def run(mask) -> None:
        for group in m.products.groups(mask):
            queue = m.products.queues[group]
            queue.closed.append(queue.open)
            queue.open = []

    return run


@instruction("wgmma.wait_group", operands=1, modifiers="sync aligned")
def wait(m, i) -> Action:
    left = m.constant(i.operands[0])
    return lambda mask: m.products.wait(mask, left)


@instruction(
    "wgmma.mma_async", operands=tuple(range(4, 9)),
    modifiers=" ".join(["sync", "aligned", "satfinite"] + [f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (16, 32)]),
)  # fmt: skip
def multiply_async(m, i) -> Action:
    n = int(i.parts[4].partition("n")[2].partition("k")[0])
    total, kind = i.parts[5], i.parts[6]
    if total not in ("f32", "s32") or kind not in ("f16", "bf16", "s8"):
        raise Unsupported(f"sums of {kind} in {total}")
    d = [m.value(o, total) for o in i.operands[0].items]
    in_registers = isinstance(i.operands[1], Vector)
    a = [m.registers[o.name] for o in i.operands[1].items] if in_registers else m.value(i.operands[1], "u64")
    b, keep = m.value(i.operands[2], "u64"), m.value(i.operands[3], "pred")
    flags = [m.constant(o) for o in i.operands[4:]]
    if total == "f32" and flags[:2] != [1, 1]:
        raise Unsupported("negated operands")
    transposed = [False, False, *flags[2:]][-2:]  # A in registers has no flag

    def issue(group: int) -> Product:
        threads, first = slice(GROUP * group, GROUP * (group + 1)), GROUP * group
        right = m.products.operand(int(b[first]), n, bool(transposed[1]), kind, group, i)
        if in_registers:
            values, operands = fragment_a([r[threads] for r in a], kind).reshape(64, -1), [right]
        else:
            left = m.products.operand(int(a[first]), 64, bool(transposed[0]), kind, group, i)
            operands = [left, right]
        adds = bool(keep[first])

        def compute() -> None:
            x = values if in_registers else m.products.read(operands[0], kind)
            product = x @ m.products.read(right, kind).T  # [64, n]: 16 rows of each warp
            pieces = product.reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, GROUP)
            for target, piece in zip(d, pieces.astype(TYPES[total])):
                target[threads] = target[threads] + piece if adds else piece

        return Product(i, operands, compute)

    def run(mask) -> None:
        for group in m.products.groups(mask):
            m.products.queues[group].open.append(issue(group))

    return run
