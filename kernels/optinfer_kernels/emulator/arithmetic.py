"""What one thread does by itself, and shuffles. Names in quotes are sections of NVIDIA's PTX ISA, chapter Instruction Set.

Where hardware approximates (ex2, lg2, rcp, division) NumPy rounds correctly; fma is computed in float64 and rounded.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import PACKED, REGISTERS, TYPES, UNSIGNED, bf16_to_f32, f32_to_bf16, pack, size_of, unpack, unsigned
from .instructions import Action, Unsupported, instruction, last_type
from .memory import LOCAL_BASE
from .ptx import Immediate, Instruction, Pair, Register, Vector

ROUNDING = "rn rna rz approx full ftz"
TINY = np.finfo(np.float32).tiny
TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
u32, u64 = np.uint32, np.uint64


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zero: the modifier .ftz."""
    return np.where(np.abs(x) < TINY, x.dtype.type(0), x)


def elementwise(m, i: Instruction, function: Callable, kind: str) -> Action:
    """d = function(a, b, ...), every operand of one type."""
    if kind in PACKED:
        register = PACKED[kind][0]
        packed = [m.bits(o, register) for o in i.operands[1:]]
        d = m.bits(i.operands[0], register)
        return lambda mask: np.copyto(d, pack(function(*(unpack(s, kind) for s in packed)), kind), where=mask)
    d, *sources = (m.value(o, kind) for o in i.operands)
    if "ftz" in i.parts:
        return lambda mask: np.copyto(d, flushed(function(*map(flushed, sources))), where=mask)
    if isinstance(function, np.ufunc):
        return lambda mask: function(*sources, out=d, where=mask)
    return lambda mask: np.copyto(d, function(*sources), where=mask)


# ---- "Integer Arithmetic", "Floating Point", "Half Precision Floating Point" -------------------------------------

BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf")


def is_mixed(i: Instruction) -> bool:
    """ "Mixed Precision Floating Point": add.f32.bf16 and the like."""
    return i.parts[-2] == "f32" and last_type(i) in ("f16", "bf16")


def mixed(m, i: Instruction, function: Callable, narrow: int) -> Action:
    """The first `narrow` sources are of 16 bits, the last and the result float32."""
    sources = [m.bits(o, np.uint16) for o in i.operands[1 : 1 + narrow]]
    d, last = m.value(i.operands[0], "f32"), m.value(i.operands[-1], "f32")
    kind = last_type(i)

    def run(mask):
        wide = function(*(unpack(s, kind) for s in sources), last.astype(np.float64))
        np.copyto(d, wide.astype(np.float32), where=mask)

    return run


@instruction("add", "sub", operands=3, modifiers=f"{ROUNDING} s16x2 u16x2")
def add(m, i):
    if i.parts[-1] in ("s16x2", "u16x2"):  # two sums of 16 bits in one register
        both = BINARY[i.parts[0]]
        return elementwise(m, i, lambda a, b: both(a.view(np.uint16), b.view(np.uint16)).view(u32), "u32")
    kind = last_type(i)
    if is_mixed(i):
        return mixed(m, i, BINARY[i.parts[0]], 1)
    return elementwise(m, i, BINARY[i.parts[0]], kind if _is_float(kind) else unsigned(kind))


@instruction("mul", operands=3, modifiers=f"{ROUNDING} lo hi wide")
def multiply(m, i):
    kind = last_type(i)
    if "wide" in i.parts:
        return multiply_wide(m, i, kind)
    if "hi" in i.parts:
        return elementwise(m, i, high_half, kind)
    return elementwise(m, i, np.multiply, kind if _is_float(kind) else unsigned(kind))


@instruction("mad", operands=4, modifiers="lo wide")
def multiply_add(m, i):
    kind = last_type(i)
    return (
        multiply_wide(m, i, kind) if "wide" in i.parts else elementwise(m, i, lambda a, b, c: a * b + c, unsigned(kind))
    )


def multiply_wide(m, i, kind):
    """The whole product, twice as wide, and perhaps an addend of that width."""
    wide = f"{kind[0]}{16 * size_of(kind)}"
    a, b = (m.value(o, kind) for o in i.operands[1:3])
    d = m.value(i.operands[0], wide)
    addend = [m.value(o, wide) for o in i.operands[3:]]

    def run(mask):
        product = np.multiply(a, b, dtype=d.dtype)
        np.copyto(d, product + addend[0] if addend else product, where=mask)

    return run


def high_half(a, b):
    """The upper half of a product of integers."""
    if a.dtype.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else u64
        return (a.astype(wide) * b.astype(wide) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)
    if a.dtype.kind == "i":
        raise Unsupported("mul.hi.s64")
    low, half = u64(0xFFFFFFFF), u64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + (a0 * b1 + (middle & low) >> half)


@instruction("fma", operands=4, modifiers="rn ftz")
def fused_multiply_add(m, i):
    kind = last_type(i)
    if is_mixed(i):
        return mixed(m, i, lambda a, b, c: a * b + c, 2)
    if kind != "f32":
        return elementwise(m, i, lambda a, b, c: a * b + c, kind)  # packed ones are float64 inside
    d, a, b, c = (m.value(o, kind) for o in i.operands)
    exact = np.empty(m.threads)
    flush = "ftz" in i.parts

    def run(mask):
        np.multiply(a, b, out=exact, dtype=np.float64)  # exact: 24 + 24 bits
        np.add(exact, c, out=exact, dtype=np.float64)
        rounded = exact.astype(np.float32)
        np.copyto(d, flushed(rounded) if flush else rounded, where=mask)

    return run


@instruction("div", operands=3, modifiers=ROUNDING)
def divide(m, i):
    kind = last_type(i)
    return elementwise(m, i, np.divide if kind[0] == "f" else lambda a, b: quotient_and_remainder(a, b)[0], kind)


@instruction("rem", operands=3)
def remainder(m, i):
    return elementwise(m, i, lambda a, b: quotient_and_remainder(a, b)[1], last_type(i))


def quotient_and_remainder(a, b):
    """Towards zero, as in C; a division by zero gives all bits set."""
    by_zero = b == 0
    b = np.where(by_zero, b.dtype.type(1), b)
    q = a // b
    if a.dtype.kind == "i":
        q += (q * b != a) & ((a < 0) != (b < 0))
    ones = np.array(-1).astype(a.dtype)
    return np.where(by_zero, ones, q), np.where(by_zero, a, a - q * b)


@instruction("min", "max", operands=(3, 4), modifiers="ftz NaN")
def extreme(m, i):
    """Of two, or on sm_100 and later of three. NaN loses, with .NaN it wins."""
    kind, least = last_type(i), i.parts[0] == "min"
    function: Callable[..., Any]
    if not _is_float(kind) or "NaN" in i.parts:
        function = np.minimum if least else np.maximum
    else:
        function = np.fmin if least else np.fmax
    return elementwise(m, i, function if len(i.operands) == 3 else lambda a, b, c: function(function(a, b), c), kind)


UNARY: dict[str, Callable[..., Any]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh,
    "rcp": lambda x: np.float32(1) / x, "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
}  # fmt: skip


@instruction(*UNARY, operands=2, modifiers=ROUNDING)
def unary(m, i):
    return elementwise(m, i, UNARY[i.parts[0]], last_type(i))


# ---- "Logic and Shift", "Integer Arithmetic": bits --------------------------------------------------------------

BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@instruction("and", "or", "xor", operands=3)
@instruction("not", operands=2)
def bitwise(m, i):
    return elementwise(m, i, BITWISE[i.parts[0]], unsigned(last_type(i)))


@instruction("shl", "shr", operands=3)
def shift(m, i):
    """Amounts past the width give 0, or the sign: NumPy does the same."""
    kind = last_type(i) if last_type(i)[0] == "s" else unsigned(last_type(i))
    d, a, amount = m.value(i.operands[0], kind), m.value(i.operands[1], kind), m.value(i.operands[2], "u32")
    function = np.left_shift if i.parts[0] == "shl" else np.right_shift
    return lambda mask: np.copyto(d, function(a, np.minimum(amount, 64).astype(a.dtype)), where=mask)


@instruction("shf", operands=4, modifiers="l r wrap clamp")
def funnel_shift(m, i):
    d, low, high, amount = (m.value(o, "u32") for o in i.operands)

    def run(mask):
        n = (amount & u32(31) if "wrap" in i.parts else np.minimum(amount, u32(32))).astype(u64)
        both = high.astype(u64) << u64(32) | low
        shifted = both << n >> u64(32) if "l" in i.parts else both >> n
        np.copyto(d, shifted.astype(u32), where=mask)

    return run


@instruction("bfe", operands=4)
def bit_field_extract(m, i):
    kind = last_type(i)
    d, a = (m.value(o, kind) for o in i.operands[:2])
    position, length = map(m.constant, i.operands[2:])
    number = a.dtype.type
    up = 8 * a.dtype.itemsize - min(position + length, 8 * a.dtype.itemsize)
    return lambda mask: np.copyto(d, a << number(up) >> number(up + position), where=mask)


@instruction("bfi", operands=5)
def bit_field_insert(m, i):
    kind = unsigned(last_type(i))
    d, a, b = (m.value(o, kind) for o in i.operands[:3])
    position, length = map(m.constant, i.operands[3:])
    number = a.dtype.type
    field = number((1 << length) - 1 << position & 2 ** (8 * a.dtype.itemsize) - 1)
    return lambda mask: np.copyto(d, b & ~field | a << number(position) & field, where=mask)


@instruction("lop3", operands=5)
def any_logic_of_three(m, i):
    d, a, b, c = (m.value(o, "u32") for o in i.operands[:4])
    table = m.constant(i.operands[4])
    rows = [row for row in range(8) if table >> row & 1]

    def run(mask):
        result = np.zeros_like(d)
        for row in rows:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        np.copyto(d, result, where=mask)

    return run


@instruction("prmt", operands=4)
def permute_bytes(m, i):
    """Four bytes out of the eight of a and b; the highest bit of a selector repeats the byte's sign instead."""
    d, a, b, selectors = (m.value(o, "u32") for o in i.operands)
    places = np.array([0, 4, 8, 12], u32)

    def run(mask):
        octets = np.stack([a, b], 1).view(np.uint8)  # [threads, 8]
        selector = selectors[:, None] >> places & u32(15)
        chosen = np.take_along_axis(octets, (selector & u32(7)).astype(np.int64), 1)
        chosen = np.where(selector & u32(8), (chosen >> 7) * np.uint8(255), chosen)
        np.copyto(d, chosen.view(u32)[:, 0], where=mask)

    return run


# ---- "Comparison and Selection" ---------------------------------------------------------------------------------

COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")


def compare(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Ordered comparisons are false where an operand is NaN, unordered ones true."""
    if a.dtype.kind != "f":
        return COMPARE[how](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if how in ("num", "nan"):
        return nan == (how == "nan")
    return COMPARE[how](a, b) & ~nan if how in COMPARE else COMPARE[how[:-1]](a, b) | nan


@instruction("setp", operands=(3, 4), modifiers=" ".join([*COMPARE, *COMBINE, *UNORDERED, "ftz"]))
def set_predicate(m, i):
    how, combine = i.parts[1], COMBINE.get(i.parts[2])
    kind = last_type(i) if last_type(i)[0] in "sf" else unsigned(last_type(i))
    targets = i.operands[0]
    first, second = (targets.first, targets.second) if isinstance(targets, Pair) else (targets, None)
    d, complement = m.value(first, "pred"), m.value(second, "pred") if second else None
    a, b = (m.value(o, kind) for o in i.operands[1:3])
    also = m.predicate(i.operands[3]) if combine else None

    def run(mask):
        result = compare(how, a, b)
        if complement is not None:
            np.copyto(complement, combine(~result, also()) if combine and also else ~result, where=mask)
        np.copyto(d, combine(result, also()) if combine and also else result, where=mask)

    return run


@instruction("selp", operands=4)
def select(m, i):
    kind = unsigned(last_type(i))
    d, a, b = (m.value(o, kind) for o in i.operands[:3])
    chosen = m.predicate(i.operands[3])
    return lambda mask: np.copyto(d, np.where(chosen(), a, b), where=mask)


# ---- "Data Movement and Conversion" -----------------------------------------------------------------------------


@instruction("mov", operands=2)
def move(m, i):
    """Also packs a register from pieces, or takes it apart."""
    kind = unsigned(last_type(i))
    target, source = i.operands
    if isinstance(target, Vector):
        piece = UNSIGNED[size_of(kind) // len(target.items)]
        whole = m.value(source, kind)
        pieces = [m.bits(t, piece) for t in target.items]

        def unpack_register(mask):
            for d, value in zip(pieces, whole.copy().view(piece).reshape(m.threads, -1).T):
                np.copyto(d, value, where=mask)

        return unpack_register
    d = m.value(target, kind)
    if isinstance(source, Vector):
        parts = [m.bits(s, UNSIGNED[size_of(kind) // len(source.items)]) for s in source.items]
        return lambda mask: np.copyto(d, np.stack(parts, 1).view(d.dtype)[:, 0], where=mask)
    a = m.value(source, kind)
    return lambda mask: np.copyto(d, a, where=mask)


@instruction("cvta", operands=2, modifiers="to global shared param local")
def convert_address(m, i):
    """ "Generic Addressing": a parameter's address counts from where the parameters begin, and may have 32 bits."""
    d, a = (m.value(o, "u64") for o in i.operands)
    start = np.uint64(m.parameters.ctypes.data if "param" in i.parts else LOCAL_BASE if "local" in i.parts else 0)
    return lambda mask: np.copyto(d, a + start, where=mask)


@instruction("cvt", operands=(2, 3), modifiers=f"{' '.join(TO_INTEGER)} rn rna rz ftz satfinite")
def convert(m, i):
    to, source = [part for part in i.parts if part in TYPES or part in PACKED or part == "tf32"]
    rounding = next((part for part in i.parts if part in TO_INTEGER), None)
    if "rz" in i.parts and _is_float(to) and _is_float(source):
        raise Unsupported("rounding towards zero")
    if to.endswith("x2"):  # two float32, the first into the upper half
        upper, lower = (m.value(o, "f32") for o in i.operands[1:])
        d = m.bits(i.operands[0], u32)
        return lambda mask: np.copyto(d, pack(np.stack([lower, upper], 1).reshape(-1), to), where=mask)
    if "tf32" in (to, source):  # 10 bits of mantissa, to nearest
        d, a = m.value(i.operands[0], "u32"), m.value(i.operands[1], "u32")
        return lambda mask: np.copyto(d, a + u32(0x1000) & u32(0xFFFFE000), where=mask)
    read, d = reader(m, i.operands[1], source), writer(m, i.operands[0], to)
    number = REGISTERS[16] if to == "bf16" else TYPES[to]

    def run(mask):
        x = read()
        if rounding:
            x = TO_INTEGER[rounding](x)
        if x.dtype.kind == "f" and np.dtype(number).kind in "iu" and to != "bf16":  # saturates; NaN is 0
            limits = np.iinfo(number)
            x = np.clip(np.nan_to_num(x.astype(np.float64)), float(limits.min), float(limits.max))
        x = f32_to_bf16(x.astype(np.float32)) if to == "bf16" else x.astype(number)
        np.copyto(d, x.astype(d.dtype), where=mask)  # a signed integer fills a wider register with its sign

    return run


def reader(m, operand, kind: str) -> Callable[[], np.ndarray]:
    """Reads an operand in a type that may be narrower than its register."""
    if kind == "bf16":
        bits = m.bits(operand, np.uint16)
        return lambda: bf16_to_f32(bits)
    width = 8 * size_of(kind)
    if isinstance(operand, Register) and operand.width > width:
        whole = m.bits(operand, REGISTERS[operand.width])
        return lambda: whole.astype(REGISTERS[width]).view(TYPES[kind])
    value = m.value(operand, kind)
    return lambda: value


def writer(m, register: Register, kind: str) -> np.ndarray:
    """The array of a register that may be wider than the type."""
    if kind == "bf16" or register.width > 8 * size_of(kind):
        return m.bits(register, REGISTERS[register.width])
    return m.value(register, kind)


# ---- "Parallel Synchronization and Communication": across the lanes of a warp ------------------------------------


@instruction("shfl", operands=5, modifiers="sync bfly idx up down")
def shuffle(m, i):
    mode, target = i.parts[2], i.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    d, in_range = m.value(first, "u32"), m.value(second, "pred") if second else None
    a, by, clamp = (m.value(o, "u32") for o in i.operands[1:4])
    lane, warp = m.lane, m.thread - m.lane

    def source_lane():
        amount, limit = (by & u32(31)).astype(np.int64), (clamp & u32(31)).astype(np.int64)
        segment = (clamp >> u32(8) & u32(31)).astype(np.int64)
        last = lane & segment | limit & ~segment
        if mode == "up":
            return lane - amount, lane - amount >= last
        other = {"bfly": lane ^ amount, "down": lane + amount, "idx": lane & segment | amount & ~segment}[mode]
        return other, other <= last

    constant = source_lane() if all(isinstance(o, Immediate) for o in i.operands[2:4]) else None

    def run(mask):
        other, inside = constant or source_lane()
        np.copyto(d, a[warp + np.where(inside, other, lane)], where=mask)
        if in_range is not None:
            np.copyto(in_range, inside, where=mask)

    return run


@instruction("elect", operands=2, modifiers="sync")
def elect(m, i):
    d, chosen = m.value(i.operands[0].first, "u32"), m.value(i.operands[0].second, "pred")

    def run(mask):
        leader = np.broadcast_to(mask, m.threads).reshape(-1, 32).argmax(1).repeat(32)
        np.copyto(d, leader.astype(u32), where=mask)
        np.copyto(chosen, m.lane == leader, where=mask)

    return run


@instruction("vote", operands=3, modifiers="sync any all ballot")
def vote(m, i):
    mode = i.parts[2]
    opinion, d = m.predicate(i.operands[1]), m.value(i.operands[0], "u32" if mode == "ballot" else "pred")

    def run(mask):
        active = np.broadcast_to(mask, m.threads)
        votes = (opinion() | ~active if mode == "all" else opinion() & active).reshape(-1, 32)
        if mode == "ballot":
            result = np.packbits(votes, axis=1, bitorder="little").view(u32)[:, 0]
        else:
            result = votes.any(1) if mode == "any" else votes.all(1)
        np.copyto(d, result.repeat(32), where=mask)

    return run


@instruction("redux", operands=3, modifiers="sync add min max")
def reduce_warp(m, i):
    function = {"add": np.sum, "min": np.min, "max": np.max}[i.parts[2]]
    d, a = (m.value(o, last_type(i)) for o in i.operands[:2])

    def run(mask):
        if not np.all(mask):
            raise Unsupported(f"{i.where}: not all lanes take part")
        np.copyto(d, function(a.reshape(-1, 32), axis=1).astype(a.dtype).repeat(32))

    return run


# ---- no effect on results ---------------------------------------------------------------------------------------


@instruction("createpolicy", operands=(2, 3), modifiers="fractional L2::evict_last L2::evict_first")
@instruction("prefetch", operands=1, modifiers="global L1 L2 tensormap")
@instruction("griddepcontrol", operands=0, modifiers="wait launch_dependents")
@instruction("nanosleep", operands=1)
@instruction("setmaxnreg", operands=1, modifiers="inc dec sync aligned")
def hint(m, i):
    return None
