"""Numbers that NumPy lacks, packed pairs, and how a matrix lies in the registers of a warp."""

import numpy as np

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "f16": np.float16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes
REGISTERS = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # by bits
# Floats of 16 bits, alone or two in a register, and two of 32 bits: -> (the register, one of them)
PACKED = {
    "f16": (np.uint16, "f16"), "bf16": (np.uint16, "bf16"), "f16x2": (np.uint32, "f16"), "bf16x2": (np.uint32, "bf16"),
    "f32x2": (np.uint64, "f32"),
}  # fmt: skip


def size_of(kind: str) -> int:
    return np.dtype(TYPES[kind]).itemsize


def unsigned(kind: str) -> str:
    """The type that wraps around: sums and products of integers have the same bits, signed or not."""
    return kind if kind == "pred" else "u" + kind[1:]


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of x, rounded to nearest, ties to even; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f32_to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def unpack(bits: np.ndarray, kind: str) -> np.ndarray:
    """float64, one or two per register, interleaved."""
    one = PACKED[kind][1]
    if one == "bf16":
        return bf16_to_f32(bits.view(np.uint16)).astype(np.float64)
    return bits.view(TYPES[one]).astype(np.float64)


def pack(values: np.ndarray, kind: str) -> np.ndarray:
    register, one = PACKED[kind]
    rounded = f32_to_bf16(values.astype(np.float32)) if one == "bf16" else values.astype(TYPES[one])
    return rounded.view(register)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Operands of tensor cores [..., registers] as float32 [..., registers, numbers in each]; exact for every kind."""
    if kind == "bf16":
        numbers = bf16_to_f32(bits.view(np.uint16))
    elif kind == "tf32":  # tensor cores do not look at the lower 13 bits
        numbers = (bits & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        numbers = bits.view(TYPES[kind]).astype(np.float32)
    return numbers.reshape(*bits.shape, -1)


# ---- fragments of mma.m16n8: "Matrix Fragments for mma" ---------------------------------------------------------
# A warp holds 8 rows (lane // 4) times 4 groups of columns (lane % 4); further registers hold further 8x4 pieces.


def fragment_a(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """A from 2 or 4 registers, each [threads] -> [warps, 16, K]."""
    x = decode(np.stack(registers).reshape(-1, 2, len(registers[0]) // 32, 8, 4), kind)
    x = x.transpose(2, 1, 3, 0, 4, 5)  # [half of K, half of rows, warp, row, group, number] -> warp, rows, K
    return x.reshape(len(x), 16, -1)


def fragment_b(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """B from 1 or 2 registers -> [warps, K, 8]."""
    x = decode(np.stack(registers).reshape(-1, len(registers[0]) // 32, 8, 4), kind)
    x = x.transpose(1, 2, 0, 3, 4)  # [half of K, warp, column, group, number] -> warp, column, K
    return x.reshape(len(x), 8, -1).transpose(0, 2, 1)


def accumulator(product: np.ndarray) -> np.ndarray:
    """[warps, 16, 8] -> the four registers [4, threads] that hold it."""
    warps = len(product)
    return product.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, 32 * warps)
