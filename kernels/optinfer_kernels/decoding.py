"""Machine instructions that turn packed codes into 16-bit floats, four bytes at a time.

A kernel for packed weights is only fast if restoring a weight costs hardly more than loading it. A look-up in memory
costs a load per weight, a tree of selects 15 selects; the instructions here cost 2.75 for any codebook of 16 values,
1.5 for int4, 1.25 or 2 for int8. They are written in PTX, NVIDIA's portable assembly, because no sequence of Triton
operations compiles to them.
"""

import functools

import torch

FLOATS = (torch.float16, torch.bfloat16)


# How the assembly names its registers: outputs first.
NIBBLE_REGISTERS = "=r,=r,=r,=r,r"
BYTE_REGISTERS = "=r,=r,r"

# Left to itself the assembler copies a constant into a register again at every use, up to one instruction per weight.
# So constants are built by adding a zero that it cannot see through: lanemask_gt has the bits of higher lanes, never
# bit 0. The sums are made once, before the loop.
OPAQUE_ZERO = ("mov.u32 zero, %lanemask_gt;", "and.b32 zero, zero, 1;")


@functools.cache
def nibble_decoding(codebook: tuple[float, ...], dtype: torch.dtype) -> str:
    """The assembly that restores 4-bit codes of `codebook` (16 values) as `dtype` (float16, bfloat16), rounded to it.

    Input: a register with 4 bytes of two codes each. Output: four registers with two floats each: the 4 high
    nibbles (even columns), then the 4 low nibbles (odd columns), in order of bytes. Use with
    ``tl.inline_asm_elementwise(asm, NIBBLE_REGISTERS, [packed], dtype=(dtype, dtype), is_pure=True, pack=4)``.
    """
    _check(dtype)
    return _int4(dtype) if tuple(codebook) == tuple(range(-8, 8)) else _table(codebook, dtype)


@functools.cache
def byte_decoding(dtype: torch.dtype) -> str:
    """The assembly that restores signed bytes as `dtype`, exactly: 4 bytes in a register to two registers of floats.

    The same trick as for int4. float16 has room for 8 bits behind the magic 1024. bfloat16 has room for 7 behind its
    128, so the sign bit goes into a second float, which it makes 256 instead of 128: the difference is the number.
    """
    _check(dtype)
    if dtype == torch.float16:
        lines = ["{ .reg .b32 one, minus, flip, pair;", "mov.b32 one, 0x3c003c00;", "mov.b32 minus, 0xe480e480;"]
        lines += ["xor.b32 flip, $2, 0x80808080;"]  # -128 ... 127 as 0 ... 255
        for register, spread in ((0, "0x4140"), (1, "0x4342")):
            lines += [f"prmt.b32 pair, flip, 0x64646464, {spread};", f"fma.rn.f16x2 ${register}, pair, one, minus;"]
    else:
        lines = ["{ .reg .b32 zero, minus, magic, pair, low, sign;", *OPAQUE_ZERO]
        lines += ["add.u32 minus, zero, 0xbf80bf80;", "add.u32 magic, zero, 0x43434343;"]
        for register, spread in ((0, "0x4140"), (1, "0x4342")):
            lines += [
                f"prmt.b32 pair, $2, magic, {spread};",
                "and.b32 low, pair, 0xff7fff7f;",
                "and.b32 sign, pair, 0xff80ff80;",
                f"fma.rn.bf16x2 ${register}, sign, minus, low;",
            ]
    return "\n".join([*lines, "}"])


def _check(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float16 or bfloat16, got {dtype}")


def _table(values: tuple[float, ...], dtype: torch.dtype) -> str:
    """Any codebook, by byte permutes (PRMT), exactly.

    PRMT picks 4 of the 8 bytes in two registers, by the low 3 bits of 4 nibbles: a look-up in a table of 8 bytes, four
    at a time. 16 entries take two of them and a third to choose, by each code's top bit. A 16-bit float is two bytes,
    so there are two tables, for low and high bytes; two more permutes put the bytes together.
    """
    patterns = torch.tensor(values).to(dtype).view(torch.int16).int().bitwise_and(0xFFFF).tolist()
    low = [_word(p & 0xFF for p in patterns[i : i + 4]) for i in range(0, 16, 4)]
    high = [_word(p >> 8 for p in patterns[i : i + 4]) for i in range(0, 16, 4)]
    registers = (low[0], low[2], high[0], high[2])
    setup = list(OPAQUE_ZERO)
    setup += [f"add.u32 t{i}, zero, {word:#x};" for i, word in enumerate(registers)]

    def half(source: str, first: str, second: str) -> list[str]:
        return [
            f"and.b32 pick, {source}, 0x7777;",  # entry within 8, for the 4 codes of two bytes
            f"shr.b32 upper, {source}, 1;",
            "lop3.b32 upper, upper, 0x4444, 0x3210, 0xEA;",  # byte i of the first eight entries, or of the last
            f"prmt.b32 a, t0, {low[1]:#x}, pick;",
            f"prmt.b32 b, t1, {low[3]:#x}, pick;",
            "prmt.b32 a, a, b, upper;",  # the low bytes of 4 values
            f"prmt.b32 b, t2, {high[1]:#x}, pick;",
            f"prmt.b32 c, t3, {high[3]:#x}, pick;",
            "prmt.b32 b, b, c, upper;",  # the high bytes
            f"prmt.b32 {first}, a, b, 0x7351;",  # codes 1 and 3: the high nibbles
            f"prmt.b32 {second}, a, b, 0x6240;",  # codes 0 and 2: the low nibbles
        ]

    lines = ["{ .reg .b32 zero, t0, t1, t2, t3, pick, upper, a, b, c, rest;", *setup]
    lines += [*half("$4", "$0", "$2"), "shr.b32 rest, $4, 16;", *half("rest", "$1", "$3"), "}"]
    return "\n".join(lines)


def _int4(dtype: torch.dtype) -> str:
    """Codes 0 ... 15 as -8 ... 7, by arithmetic on the bit pattern of a float.

    A float whose last 4 bits of mantissa count in ones, 128 in bfloat16 or 1024 in float16, becomes 128 + code when
    the code is put there with OR. One multiply-add on both halves of the register takes 136 away: exact.
    """
    magic, one, minus, kind = {
        torch.bfloat16: (0x4300, 0x3F80, 0xC308, "bf16x2"),  # 128, 1, -136
        torch.float16: (0x6400, 0x3C00, 0xE408, "f16x2"),  # 1024, 1, -1032
    }[dtype]

    def both(half: int) -> int:
        return half << 16 | half

    lines = ["{ .reg .b32 one, minus, pair, a;", f"mov.b32 one, {both(one):#x};", f"mov.b32 minus, {both(minus):#x};"]
    for register, spread in ((0, "0x4140"), (1, "0x4342")):  # bytes 0 and 1, then 2 and 3, one to each half
        lines += [
            f"prmt.b32 pair, $4, 0, {spread};",
            f"lop3.b32 a, pair, 0x000f000f, {both(magic):#x}, 0xEA;",
            f"fma.rn.{kind} ${register + 2}, a, one, minus;",
            "shr.b32 pair, pair, 4;",
            f"lop3.b32 a, pair, 0x000f000f, {both(magic):#x}, 0xEA;",
            f"fma.rn.{kind} ${register}, a, one, minus;",
        ]
    return "\n".join([*lines, "}"])


def _word(octets) -> int:
    """Four bytes as a 32-bit number, the first one lowest."""
    return sum(octet << 8 * i for i, octet in enumerate(octets))
