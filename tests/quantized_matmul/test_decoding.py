"""The assembly that decodes nibbles, executed instruction by instruction: no GPU is needed to know that it is right."""

import functools
import random
import re
from collections.abc import Callable

import pytest
import torch

from optinfer.quantization.number_formats import CODEBOOKS
from optinfer_kernels.decoding import byte_decoding, nibble_decoding
from optinfer_kernels.quantized_arguments import INT4

MASK = 0xFFFFFFFF


def run_ptx(asm: str, packed: int) -> list[int]:
    """Execute the decoding's assembly on a 32-bit word, as the PTX manual defines each instruction.

    Returns the output registers, four of nibbles or two of bytes. Floats are emulated in float64, rounded at each step.
    """
    inputs = ("$4", "$2") if "$3" in asm else ("$2",)  # a register is an input until it is written
    registers = dict.fromkeys(inputs, packed) | {"%lanemask_gt": random.getrandbits(31) << 1}
    for line in asm.strip("{} \n").replace("\n", " ").split(";"):
        words = re.split(r"[\s,]+", line.strip())
        if words[0] in ("", ".reg"):
            continue
        operation, target, *sources = words
        values = [registers[name] if name in registers else int(name, 0) for name in sources]
        registers[target] = MEANINGS[operation](*values) & MASK
    return [registers[f"${i}"] for i in range(4 if "$3" in asm else 2)]


def permute(a: int, b: int, selector: int) -> int:
    octets = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    out = 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        octet = octets[pick & 7]
        if pick & 8:  # the sign bit, eight times
            octet = 255 * (octet >> 7)
        out |= octet << 8 * i
    return out


def look_up(a: int, b: int, c: int, table: int) -> int:
    """Bit i of the table is the result where (a, b, c) are the bits of i."""
    result = 0
    for i in range(8):
        if table >> i & 1:
            chosen = MASK
            for source, wanted in ((a, i >> 2), (b, i >> 1), (c, i)):
                chosen &= source if wanted & 1 else ~source
            result |= chosen & MASK
    return result


def multiply_add(dtype: torch.dtype, a: int, b: int, c: int) -> int:
    def floats(word: int) -> torch.Tensor:
        return torch.tensor([word & 0xFFFF, word >> 16]).to(torch.uint16).view(torch.int16).view(dtype).double()

    bits = (floats(a) * floats(b) + floats(c)).to(dtype).view(torch.int16).tolist()
    return (bits[0] & 0xFFFF) | (bits[1] & 0xFFFF) << 16


MEANINGS: dict[str, Callable[..., int]] = {  # an instruction that is not here is a KeyError
    "mov.u32": lambda a: a,
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b,
    "shr.b32": lambda a, b: a >> b,
    "lop3.b32": look_up,
    "prmt.b32": permute,
    "fma.rn.f16x2": functools.partial(multiply_add, torch.float16),
    "fma.rn.bf16x2": functools.partial(multiply_add, torch.bfloat16),
}


def decoded(asm: str, packed: int) -> list[int]:
    """16-bit patterns of the high nibbles of the 4 bytes, then of the low nibbles."""
    words = run_ptx(asm, packed)
    return [half for word in words for half in (word & 0xFFFF, word >> 16)]


BOOKS = {**CODEBOOKS, "int4": INT4, "random": tuple(random.Random(1).uniform(-2, 2) for _ in range(16))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BOOKS)
def test_machine_code_decodes_exactly(name, dtype):
    """Every pair of nibbles in every byte, among random neighbors: the codebook's value in `dtype`, to the bit."""
    expected = torch.tensor(BOOKS[name]).to(dtype).view(torch.int16).int().bitwise_and(0xFFFF).tolist()
    asm = nibble_decoding(tuple(BOOKS[name]), dtype)
    for octet in range(256):
        for place in range(4):
            packed = random.getrandbits(32) & ~(0xFF << 8 * place) | octet << 8 * place
            octets = [(packed >> 8 * i) & 0xFF for i in range(4)]
            patterns = [expected[o >> 4] for o in octets] + [expected[o & 15] for o in octets]
            found = decoded(asm, packed)
            assert [f & 0x7FFF or 0 for f in found] == [p & 0x7FFF or 0 for p in patterns]
            assert [f for f in found if f & 0x7FFF] == [p for p in patterns if p & 0x7FFF]  # signs, but for zeros


def test_the_emulation_can_fail():
    """One wrong table entry must be seen."""
    asm = nibble_decoding(tuple(CODEBOOKS["nf4"]), torch.bfloat16)
    constant = re.search(r"prmt.b32 a, t0, (0x[0-9a-f]+)", asm).group(1)
    broken = asm.replace(constant, hex(int(constant, 16) ^ 0x100))
    codes = range(16)
    whole = [decoded(asm, code * 0x11111111) for code in codes]
    assert any(decoded(broken, code * 0x11111111) != right for code, right in zip(codes, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bytes_decode_exactly(dtype):
    for octet in range(256):
        for place in range(4):
            packed = random.getrandbits(32) & ~(0xFF << 8 * place) | octet << 8 * place
            octets = torch.tensor([(packed >> 8 * i) & 0xFF for i in range(4)], dtype=torch.uint8)
            found = torch.tensor(decoded(byte_decoding(dtype), packed)).to(torch.uint16).view(torch.int16).view(dtype)
            assert torch.equal(found.float(), octets.view(torch.int8).float())


def test_bad_input():
    with pytest.raises(TypeError, match="dtype must be float16 or bfloat16"):
        nibble_decoding(INT4, torch.float32)
