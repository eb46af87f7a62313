# ruff: noqa: E501, RUF005 (the hints are prose)
"""Exercises of chapter 1: number formats, scales, packed bytes, NF4, LLM.int8()."""

from collections.abc import Callable, Iterator
from functools import cache
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from optinfer.course.exercise import Case, Draw, Exercise, Wrong, case, slow_case
from optinfer.course.exercises import testing, today

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    + [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    + [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)


# --------------------------------------------------------------------------------------------------- absmax
def absmax_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to int8 with one scale for the whole tensor.

    x: any shape, float32, float16 or bfloat16; compute in float32
    returns: codes (int8, shape of x, from -127 to 127) and scale (float32, no dimensions), with x ≈ codes * scale
    """
    x = x.float()
    scale = x.abs().max() / 127
    if scale == 0:
        return torch.zeros_like(x, dtype=torch.int8), scale
    return (x / scale).round().to(torch.int8), scale


def _absmax_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().max() / 127
    codes = [round(value / scale.item()) if scale > 0 else 0 for value in x.float().flatten().tolist()]
    return torch.tensor(codes, dtype=torch.int8).view(x.shape), scale


def _absmax_cases(draw: Draw) -> Iterator[Case]:
    yield case("the largest magnitude is negative", torch.tensor([0.3, -2.54, 0.011, 1.275, -0.013, 1.2]))
    yield case("5 x 7, float32", draw.normal(5, 7))
    yield case("float16", draw.normal(20, 40, dtype=torch.float16))
    yield case("not contiguous", draw.normal(4, 9, strided=True))
    yield case("large numbers", 1e6 * draw.normal(17))
    yield case("tiny numbers", 1e-12 * draw.normal(17))
    yield case("one outlier", torch.cat([draw.normal(30), torch.tensor([-60.0])]))
    yield case("all zeros", torch.zeros(3))
    yield case("bfloat16, one number", draw.normal(1, dtype=torch.bfloat16))


ABSMAX = Exercise(
    id="quantization.absmax",
    title="One scale for a tensor",
    difficulty=1,
    minutes=5,
    spec="""\
Eight bits hold the whole numbers from -127 to 127. Find the `scale` that maps the largest magnitude of `x` to 127, and
round everything to the nearest code:

```python
codes = round(x / scale)        # int8
x ≈ codes * scale
```

A tensor of zeros has scale 0 and codes 0.""",
    answer=absmax_quantize,
    cases=_absmax_cases,
    reference=_absmax_reference,
    hints=(
        "Which single number of x decides the scale?",
        "The scale is the largest magnitude divided by 127. A conversion to an integer type does not round.",
        "`scale = x.float().abs().max() / 127`\n`codes = (x / scale).round().to(torch.int8)`, and zeros where the scale is 0.",
    ),
    wrong=(
        Wrong(
            "the maximum instead of the largest magnitude",
            "`x.max()` ignores the negative side, whose codes then leave the range of int8 and wrap around. Use `x.abs().max()`.",
            ("x.abs().max()", "x.max()"),
        ),
        Wrong(
            "cutting off instead of rounding",
            "Conversion to an integer type drops the fraction, so 3.9 becomes 3: twice the error. Call `.round()` first.",
            (".round()", ""),
        ),
        Wrong(
            "128 levels on each side",
            "int8 goes from -128 to 127: dividing by 128 sends the largest positive number to 128, which wraps to -128.",
            ("/ 127", "/ 128"),
        ),
        Wrong(
            "computed in 16 bits",
            "In float16 the scale itself is rounded, and codes land one off. Convert x to float32 first.",
            ("x = x.float()", "x = x"),
        ),
        Wrong(
            "the scale upside down",
            "The scale is how much one step of the code is worth, 'largest / 127'; its inverse is what you multiply x with.",
            (
                "return (x / scale).round().to(torch.int8), scale",
                "return (x / scale).round().to(torch.int8), 1 / scale",
            ),
        ),
        Wrong(
            "dividing by a zero scale",
            "A tensor of zeros has absmax 0, and 0/0 is NaN. Pruned rows and padding make such tensors in real models.",
            ("if scale == 0:", "if False:"),
            (
                "(x / scale).round().to(torch.int8), scale",
                "(x / scale).round().nan_to_num(nan=-1).to(torch.int8), scale",
            ),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- zero point
def affine_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to uint8 with a scale and a zero point, so that a lopsided range wastes no codes.

    x: any shape, float32, float16 or bfloat16; compute in float32
    returns: codes (uint8, shape of x), scale (float32, no dimensions), zero (int64, no dimensions: the code of 0.0),
        with x ≈ (codes - zero) * scale
    """
    x = x.float()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    if scale == 0:
        return torch.zeros_like(x, dtype=torch.uint8), scale, torch.tensor(0)
    zero = (-low / scale).round()
    codes = ((x / scale).round() + zero).clamp(0, 255)
    return codes.to(torch.uint8), scale, zero.long()


def _affine_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = x.float().flatten().tolist()
    low, high = min(0.0, *values), max(0.0, *values)
    scale = (torch.tensor(high) - torch.tensor(low)) / 255
    step = scale.item()
    zero = round(torch.div(torch.tensor(-low), scale).item()) if step else 0
    codes = [min(255, max(0, round(v / step) + zero)) if step else 0 for v in values]
    return torch.tensor(codes, dtype=torch.uint8).view(x.shape), scale, torch.tensor(zero)


def _affine_cases(draw: Draw) -> Iterator[Case]:
    yield case("both signs, lopsided", torch.tensor([-1.0, 0.0, 0.375, 2.5, 4.1]))
    yield case("only positive, far from zero", 5 + draw.uniform(11))
    yield case("only negative", -3 - draw.uniform(3, 5))
    yield case("normal numbers, float16", draw.normal(6, 6, dtype=torch.float16))
    yield case("not contiguous, small", 1e-3 * draw.normal(5, 8, strided=True))
    yield case("after a ReLU", draw.normal(40).relu())
    yield case("all zeros", torch.zeros(4))
    yield case("the same number everywhere", torch.full((5,), 3.0))
    yield case("100 numbers in bfloat16", draw.normal(100, dtype=torch.bfloat16))
    yield case("both ends halfway between codes", torch.tensor([-99.5, 0.2, 155.5]))


AFFINE = Exercise(
    id="quantization.zero_point",
    title="A zero point for lopsided ranges",
    difficulty=2,
    minutes=10,
    prerequisites=("quantization.absmax",),
    spec="""\
Activations after a ReLU are never negative: half of the signed codes would stay unused. Affine quantization lets the 256
codes span exactly the range that occurs. Widen the range to hold 0, because 0.0 (padding, ReLU) must come back exactly:

```python
scale = (high - low) / 255
zero  = round(-low / scale)             # the code of 0.0
codes = round(x / scale) + zero         # uint8
x ≈ (codes - zero) * scale
```

Keep the codes from 0 to 255. A tensor of zeros has scale 0, zero 0, codes 0.""",
    answer=affine_quantize,
    cases=_affine_cases,
    reference=_affine_reference,
    hints=(
        "Which numbers should the codes 0 and 255 stand for?",
        "The range is min(x, 0) … max(x, 0), cut into 255 steps; the zero point is how many steps 0.0 lies above its lower end.",
        "`low, high = x.min().clamp(max=0), x.max().clamp(min=0)`\n"
        "`scale = (high - low) / 255`, `zero = (-low / scale).round()`\n"
        "`codes = ((x / scale).round() + zero).clamp(0, 255).to(torch.uint8)`",
    ),
    wrong=(
        Wrong(
            "a range that does not hold zero",
            "If all numbers lie from 5 to 6, the code of 0.0 would be far below 0: clamp low to at most 0 and high to at least 0.",
            ("x.min().clamp(max=0), x.max().clamp(min=0)", "x.min(), x.max()"),
        ),
        Wrong(
            "256 steps instead of 255",
            "256 codes have 255 steps between them (fence posts). With 256 the largest number misses the last code.",
            ("/ 255", "/ 256"),
        ),
        Wrong(
            "the zero point with the wrong sign",
            "The code of 0.0 is how many steps 0.0 lies above the lower end: -low / scale, never negative.",
            ("zero = (-low / scale).round()", "zero = (low / scale).round()"),
        ),
        Wrong(
            "no clamp",
            "Rounding x and the zero point separately can give 256, and uint8 wraps 256 to 0: the largest number becomes the smallest.",
            (".clamp(0, 255)", ""),
        ),
        Wrong(
            "a zero point that was cut off",
            "Conversion to an integer drops the fraction; round first, or every code is up to one step off.",
            ("zero = (-low / scale).round()", "zero = (-low / scale).floor()"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- nibbles
def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, two to a byte.

    codes: uint8 [n], each from 0 to 15; n may be odd
    returns: uint8 [(n + 1) // 2]; the first of each pair in the high four bits; an odd end is filled with 0
    """
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return (codes[0::2] << 4) | codes[1::2]


def _pack_reference(codes: Tensor) -> Tensor:
    digits = [*codes.tolist(), 0][: len(codes) + len(codes) % 2]
    return torch.tensor([16 * a + b for a, b in zip(digits[::2], digits[1::2])], dtype=torch.uint8)


def _pack_cases(draw: Draw) -> Iterator[Case]:
    def codes(n: int) -> Tensor:
        return draw.integers(0, 16, n, dtype=torch.uint8)

    yield case("four codes", torch.tensor([1, 2, 15, 0], dtype=torch.uint8))
    yield case("an odd number", torch.tensor([9, 3, 7], dtype=torch.uint8))
    yield case("64 codes", codes(64))
    yield case("not contiguous", codes(50)[::2])
    yield case("one code", torch.tensor([13], dtype=torch.uint8))
    yield case("none", torch.tensor([], dtype=torch.uint8))


PACK = Exercise(
    id="quantization.pack_nibbles",
    title="Two codes in a byte",
    difficulty=1,
    minutes=5,
    spec="""\
A computer has no 4-bit type: the memory is saved only once two codes share a byte. The first code goes into the high
half, as in bitsandbytes:

```python
byte = first * 16 + second
```""",
    answer=pack_nibbles,
    cases=_pack_cases,
    reference=_pack_reference,
    hints=(
        "In hexadecimal a byte is two digits, and each digit is one code.",
        "Shift the codes at even places left by four bits, and combine them with those at odd places.",
        "`(codes[0::2] << 4) | codes[1::2]`, after appending a 0 to an odd number of codes.",
    ),
    wrong=(
        Wrong(
            "the first code in the low half",
            "Both orders exist in the wild, and files written with one are garbage to the other. Here the first code is the high digit.",
            ("(codes[0::2] << 4) | codes[1::2]", "(codes[1::2] << 4) | codes[0::2]"),
        ),
        Wrong(
            "pairing the first half with the second",
            "Neighbors share a byte: codes 0 and 1, 2 and 3 … Slices with step 2 pick them, halves do not.",
            ("(codes[0::2] << 4) | codes[1::2]", "(codes[: len(codes) // 2] << 4) | codes[len(codes) // 2 :]"),
        ),
        Wrong(
            "losing the last of an odd number",
            "Three codes need two bytes. Pad with a 0, do not cut.",
            ("codes = torch.cat([codes, codes.new_zeros(1)])", "codes = codes[:-1]"),
        ),
        Wrong(
            "filled at the front",
            "The filling belongs behind the last code: in front of the first, every code slips by half a byte.",
            ("[codes, codes.new_zeros(1)]", "[codes.new_zeros(1), codes]"),
        ),
        Wrong(
            "shifting by the wrong amount",
            "Four bits are half a byte: shift by 4. Shifting by 8 pushes the code out of a uint8.",
            ("<< 4", "<< 8"),
        ),
    ),
)


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """Take 4-bit codes out of their bytes again.

    packed: uint8 [(n + 1) // 2], the first code of each pair in the high four bits
    n: how many codes
    returns: uint8 [n]
    """
    return torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()[:n]


def _unpack_reference(packed: Tensor, n: int) -> Tensor:
    digits = [digit for byte in packed.tolist() for digit in divmod(byte, 16)]
    return torch.tensor(digits[:n], dtype=torch.uint8)


def _unpack_cases(draw: Draw) -> Iterator[Case]:
    yield case("0x12 0xF0", torch.tensor([0x12, 0xF0], dtype=torch.uint8), 4)
    yield case("an odd number of codes", torch.tensor([0x93, 0x70], dtype=torch.uint8), 3)
    yield case("random bytes", draw.integers(0, 256, 32, dtype=torch.uint8), 64)
    yield case("not contiguous", draw.integers(0, 256, 20, dtype=torch.uint8)[::2], 19)
    yield case("nothing", torch.tensor([], dtype=torch.uint8), 0)


UNPACK = Exercise(
    id="quantization.unpack_nibbles",
    title="And out again",
    difficulty=1,
    minutes=5,
    prerequisites=("quantization.pack_nibbles",),
    spec="""\
Undo the packing. Every 4-bit matrix product does this for every weight, so it must not cost much: a shift, a mask, and
the right order. `n` says how many codes there were, because the last low half may be filling.""",
    answer=unpack_nibbles,
    cases=_unpack_cases,
    reference=_unpack_reference,
    hints=(
        "A shift right gives the high half; what gives the low half?",
        "`packed >> 4` and `packed & 0xF`, then interleave them: high, low, high, low …",
        "`torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()[:n]`",
    ),
    wrong=(
        Wrong(
            "all high halves first",
            "`cat` puts the two lists one after the other; the codes alternate. Stack along a new last dimension, then flatten.",
            ("torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()", "torch.cat([packed >> 4, packed & 0xF])"),
        ),
        Wrong(
            "the low half first",
            "The first code of each pair sits in the high half.",
            ("[packed >> 4, packed & 0xF]", "[packed & 0xF, packed >> 4]"),
        ),
        Wrong(
            "keeping the filling",
            "An odd number of codes leaves one unused half at the end: cut to n.",
            ("[:n]", ""),
        ),
        Wrong(
            "no mask",
            "Without `& 0xF` the low code still carries the high one on top of it.",
            ("packed & 0xF", "packed"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- groups
def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Quantize to 4 bits with one scale for each group of neighboring columns of a row.

    weight: float32 [out, in]; in may not be a multiple of group_size: then the last group of a row is shorter
    returns: codes (int8 [out, in], from -7 to 7) and scales (float32 [out, ceil(in / group_size)])
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % group_size))
    groups = padded.view(rows, -1, group_size)
    scales = groups.abs().amax(dim=-1) / 7
    steps = torch.where(scales == 0, 1.0, scales)
    codes = (groups / steps[..., None]).round().to(torch.int8)
    return codes.view(rows, -1)[:, :columns], scales


def _groups_reference(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    pieces = weight.split(group_size, dim=1)
    scales = [piece.abs().amax(dim=1) / 7 for piece in pieces]
    codes = [(p / torch.where(s == 0, 1.0, s)[:, None]).round().to(torch.int8) for p, s in zip(pieces, scales)]
    return torch.cat(codes, dim=1), torch.stack(scales, dim=1)


def _groups_cases(draw: Draw) -> Iterator[Case]:
    yield case("2 x 8 in groups of 4", draw.normal(2, 8), 4)
    yield case("a shorter last group", draw.normal(3, 10), 4)
    yield case("groups wider than the row", draw.normal(4, 5), 16)
    yield case("an outlier in one group", draw.normal(2, 12) + 50 * torch.eye(12)[3], 6)
    yield case("a group of zeros", draw.normal(2, 8) * torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), 4)
    yield case("groups of one", draw.normal(3, 5), 1)
    yield case("64 x 96", draw.normal(64, 96), 32)


GROUPS = Exercise(
    id="quantization.groups",
    title="A scale per group",
    difficulty=2,
    minutes=10,
    prerequisites=("quantization.absmax",),
    spec="""\
At four bits one outlier ruins everything that shares its scale. So let few weights share one: `group_size` neighbors in
the same row. The codes go from -7 to 7:

```python
scale[r, g] = max |weight[r, columns of g]| / 7
codes       = round(weight / scale of its group)
```

A group of zeros has scale 0 and codes 0. The price is one scale per group: 16 bits for 64 weights make 4.25 bits each.""",
    answer=quantize_groups,
    cases=_groups_cases,
    reference=_groups_reference,
    hints=(
        "Can you view the matrix so that a group is one row of the last dimension?",
        "Pad the columns with zeros to a multiple of group_size (zeros change no maximum), view as "
        "[out, groups, group_size], quantize along the last dimension, cut the padding off.",
        "`groups = pad(weight, (0, -columns % group_size)).view(rows, -1, group_size)`\n"
        "`scales = groups.abs().amax(-1) / 7`\n`codes = (groups / steps[..., None]).round()`, where steps is scales without zeros.",
    ),
    wrong=(
        Wrong(
            "one scale per row",
            "All groups of a row have the same scale here: the maximum has to be taken inside each group.",
            (
                "scales = groups.abs().amax(dim=-1) / 7",
                "scales = groups.abs().amax(dim=(1, 2), keepdim=True)[..., 0].expand(groups.shape[:2]) / 7",
            ),
        ),
        Wrong(
            "groups down the columns",
            "A group is a run of neighbors in a row (they are multiplied with neighboring inputs), not rows of a column.",
            (
                "groups = padded.view(rows, -1, group_size)",
                "groups = padded.t().reshape(rows, -1, group_size)",
            ),
        ),
        Wrong(
            "8 levels above zero",
            "Four signed bits go from -8 to 7: with a scale of max / 8 the largest weight gets code 8, which four bits cannot say.",
            ("/ 7", "/ 8"),
        ),
        Wrong(
            "only whole groups",
            "`view` and `reshape` need a number of columns that divides; pad with zeros first, or split the columns in a loop.",
            ("padded = torch.nn.functional.pad(weight, (0, -columns % group_size))", "padded = weight"),
        ),
        Wrong(
            "dropping the shorter last group",
            "Columns that do not fill a group are weights too: pad them, do not cut them.",
            (
                "padded = torch.nn.functional.pad(weight, (0, -columns % group_size))",
                "padded = weight[:, : columns - columns % group_size]",
            ),
        ),
        Wrong(
            "dividing by a zero scale",
            "A group of zeros has scale 0, and 0/0 is NaN, which becomes an arbitrary code. Divide such groups by 1.",
            ("steps = torch.where(scales == 0, 1.0, scales)", "steps = scales"),
            (".round().to(torch.int8)", ".round().nan_to_num(nan=-8).to(torch.int8)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- NF4
def nf4_levels(offset: float = 0.9677083) -> Tensor:
    """The 16 levels of NF4, from the quantiles of the normal distribution.

    offset: the outermost probability; 1.0 would be infinitely far out
    returns: float64 [16], sorted, from -1 to 1, with an exact 0
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1].tolist()]
    levels = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64)
    return levels / levels.max()


def _nf4_reference(offset: float = 0.9677083) -> Tensor:
    up = torch.special.ndtri(offset + (0.5 - offset) * torch.arange(8, dtype=torch.float64) / 8)
    down = -torch.special.ndtri(offset + (0.5 - offset) * torch.arange(7, dtype=torch.float64) / 7)
    levels = torch.tensor(sorted([*up.tolist(), *down.tolist(), 0.0]), dtype=torch.float64)
    return levels / levels.max()


def _nf4_cases(draw: Draw) -> Iterator[Case]:
    yield case("the paper's offset", 0.9677083)
    yield case("another offset", 0.95)
    yield case("a third", 0.9 + 0.09 * draw.random.random())


NF4_LEVELS = Exercise(
    id="quantization.nf4_levels",
    title="Where NF4's sixteen levels come from",
    difficulty=3,
    minutes=15,
    spec="""\
Weights are roughly normal, so equally *likely* levels waste less than equally *spaced* ones. QLoRA takes quantiles of the
normal distribution, built from two sides so that 0 is exact:

- 8 positive levels: the quantiles at 9 evenly spaced probabilities from `offset` down to 1/2, the last one (it is 0) left out;
- 7 negative levels: the same with 8 probabilities, with a minus sign;
- 0; then all divided by the largest.

`statistics.NormalDist().inv_cdf(p)` is the quantile function.""",
    answer=nf4_levels,
    cases=_nf4_cases,
    reference=_nf4_reference,
    rtol=1e-5,
    atol=1e-6,
    hints=(
        "15 levels besides zero cannot be shared evenly by two sides: which side gets 8?",
        "Quantiles of linspace(offset, 0.5, 9) without the last, minus quantiles of linspace(offset, 0.5, 8) without the last, and 0.",
        "`positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9).tolist()[:-1]]` in float64, negative likewise with 8 and a "
        "minus sign; `sorted([*positive, 0.0, *negative])`, divided by the largest.",
    ),
    wrong=(
        Wrong(
            "equally spaced levels",
            "Evenly spaced values are int4. NF4 spaces *probabilities* evenly and takes their quantiles.",
            ("quantile = NormalDist().inv_cdf", "quantile = lambda p: p - 0.5"),
        ),
        Wrong(
            "the extra level on the negative side",
            "Fifteen levels besides 0: the eighth goes to the positive side (NF4 has 7 negative, 0, 8 positive).",
            ("0.5, 9,", "0.5, 99,"),
            ("0.5, 8,", "0.5, 9,"),
            ("0.5, 99,", "0.5, 8,"),
        ),
        Wrong(
            "levels not divided by the largest",
            "The codes stand for fractions of a group's absmax, so the levels must span -1 to 1.",
            ("return levels / levels.max()", "return levels"),
        ),
        Wrong(
            "each side scaled by itself",
            "Both sides are divided by the same number. The outermost quantile is the same on both, but check the order: scale after joining.",
            (
                "return levels / levels.max()",
                "return torch.where(levels > 0, levels / levels.max(), levels / levels[levels < 0].mean().abs())",
            ),
        ),
    ),
)


def nf4_quantize(weight: Tensor, group_size: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to the nearest of 16 levels, group by group.

    weight: float32 [n], n a multiple of group_size
    levels: float32 [16], sorted, from -1 to 1
    returns: codes (uint8 [n]: index into levels) and absmax (float32 [n / group_size])
    """
    groups = weight.view(-1, group_size)
    absmax = groups.abs().amax(dim=1)
    scaled = groups / torch.where(absmax == 0, 1.0, absmax)[:, None]
    codes = (scaled[..., None] - levels).abs().argmin(dim=-1)
    return codes.to(torch.uint8).flatten(), absmax


def _nf4_quantize_reference(weight: Tensor, group_size: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    absmax = torch.stack([group.abs().max() for group in weight.split(group_size)])
    scaled = weight / torch.where(absmax == 0, 1.0, absmax).repeat_interleave(group_size)
    return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8), absmax


def _nf4_quantize_cases(draw: Draw) -> Iterator[Case]:
    yield case("one group of 8", draw.normal(8), 8, NF4)
    yield case("four groups of 32", draw.normal(128), 32, NF4)
    yield case(
        "groups of very different size", draw.normal(96) * torch.tensor([1.0, 100, 0.01]).repeat_interleave(32), 32, NF4
    )
    yield case("a group of zeros", torch.cat([torch.zeros(16), draw.normal(16)]), 16, NF4)
    yield case("other levels", draw.normal(64), 16, torch.linspace(-1, 1, 16))
    yield case("1e-20", 1e-20 * draw.normal(32), 16, NF4)


NF4_QUANTIZE = Exercise(
    id="quantization.nf4_quantize",
    title="Sixteen well-chosen values",
    difficulty=3,
    minutes=15,
    prerequisites=("quantization.groups", "quantization.nf4_levels"),
    spec="""\
Divide each group by its largest magnitude, `absmax`, and replace each number by the index of the nearest level:

```python
weight ≈ levels[codes] * absmax of its group
```

The levels are not evenly spaced, so rounding alone cannot find the index. A group of zeros has absmax 0 and the code of 0.""",
    answer=nf4_quantize,
    cases=_nf4_quantize_cases,
    reference=_nf4_quantize_reference,
    hints=(
        "How would you find the nearest of 16 numbers for one weight?",
        "Compute all 16 distances and take the argmin; or search in the 15 midpoints between neighbors.",
        "`scaled = weight.view(-1, group_size) / absmax[:, None]`\n`codes = (scaled[..., None] - levels).abs().argmin(-1)`",
    ),
    wrong=(
        Wrong(
            "rounding as if the levels were evenly spaced",
            "`round((x + 1) * 7.5)` is the index on an even grid. NF4's levels crowd around zero: compare distances.",
            (
                "codes = (scaled[..., None] - levels).abs().argmin(dim=-1)",
                "codes = ((scaled + 1) * 7.5).round().long()",
            ),
        ),
        Wrong(
            "the level below instead of the nearest",
            "`bucketize` or `searchsorted` on the levels gives the interval; the nearest level needs the midpoints as borders.",
            (
                "codes = (scaled[..., None] - levels).abs().argmin(dim=-1)",
                "codes = (torch.bucketize(scaled, levels, right=True) - 1).clamp(0, 15)",
            ),
        ),
        Wrong(
            "one absmax for everything",
            "Each group has its own absmax: that is what confines an outlier to its 64 neighbors.",
            ("absmax = groups.abs().amax(dim=1)", "absmax = groups.abs().max().expand(len(groups))"),
        ),
        Wrong(
            "dividing by a zero absmax",
            "0/0 is NaN, and argmin of NaN is index 0, the level -1: here it happens to be multiplied by 0, but the code is not that of 0.",
            ("torch.where(absmax == 0, 1.0, absmax)[:, None]", "absmax[:, None]"),
        ),
        Wrong(
            "the maximum instead of the largest magnitude",
            "A group whose largest magnitude is negative is scaled beyond -1 and clipped. Take `abs()` first.",
            ("absmax = groups.abs().amax(dim=1)", "absmax = groups.amax(dim=1)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- LLM.int8()
def llm_int8_matmul(x: Tensor, weight: Tensor, threshold: float = 6.0) -> Tensor:
    """Multiply in int8, except the columns of x that hold an outlier.

    x: float32 [tokens, in]; weight: float32 [out, in]
    threshold: a column with a magnitude at or above it stays in floating point; this may be none, or every column
    returns: x @ weight.T, float32 [tokens, out], approximately
    """
    outlier = (x.abs() >= threshold).any(dim=0)
    regular, w = x[:, ~outlier], weight[:, ~outlier]
    x_scale = (
        regular.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127 if regular.numel() else x.new_ones(len(x), 1)
    )
    w_scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    x_codes, w_codes = (regular / x_scale).round(), (w / w_scale).round()
    product = (x_codes.double() @ w_codes.double().T).float()  # whole numbers: exact, as in int32
    return product * x_scale * w_scale.T + x[:, outlier] @ weight[:, outlier].T


def _llm_int8_reference(x: Tensor, weight: Tensor, threshold: float = 6.0) -> Tensor:
    hot = [i for i in range(x.shape[1]) if x[:, i].abs().max() >= threshold]
    cold = [i for i in range(x.shape[1]) if i not in hot]
    out = x.double()[:, hot] @ weight.double()[:, hot].T
    if cold:
        sx = x[:, cold].abs().amax(1).clamp(min=1e-30) / 127
        sw = weight.abs().amax(1).clamp(min=1e-30) / 127
        cx, cw = (x[:, cold] / sx[:, None]).round(), (weight[:, cold] / sw[:, None]).round()
        out = out + (cx.double() @ cw.double().T) * sx.double()[:, None] * sw.double()
    return out.float()


def _llm_int8_cases(draw: Draw) -> Iterator[Case]:
    def with_outliers(tokens: int, width: int, *columns: int) -> Tensor:
        x = draw.normal(tokens, width).clamp(-4, 4)
        for column in columns:
            x[draw.random.randrange(tokens), column] = draw.random.choice([-40.0, 25.0])
        return x

    yield case("one outlier in column 2", with_outliers(4, 8, 2), draw.normal(5, 8))
    yield case("no outlier", with_outliers(3, 16), draw.normal(4, 16))
    yield case("three outlier columns of 33", with_outliers(7, 33, 0, 5, 32), draw.normal(9, 33))
    yield case(
        "rows of very different size",
        with_outliers(4, 12) * torch.tensor([[1.0], [0.01], [1e-4], [1.0]]),
        draw.normal(3, 12),
    )
    yield case("a threshold of 2", with_outliers(5, 16), draw.normal(6, 16), 2.0)
    yield case("exactly the threshold", torch.tensor([[6.0, 1.0, 0.5], [0.2, -1.5, 0.3]]), draw.normal(4, 3))
    yield case("every column is an outlier", 50 + draw.uniform(3, 4), draw.normal(2, 4))
    zeros = torch.tensor([[1.0], [0.0], [1.0]])
    yield case("a token of zeros and a weight row of zeros", with_outliers(3, 6, 1) * zeros, draw.normal(3, 6) * zeros)
    yield case(
        "one token, weight rows of very different size",
        with_outliers(1, 10, 4),
        draw.normal(4, 10) * torch.tensor([[1.0], [1e3], [1e-3], [1]]),
    )


LLM_INT8 = Exercise(
    id="quantization.llm_int8",
    title="LLM.int8(): outliers apart",
    difficulty=4,
    minutes=25,
    prerequisites=("quantization.absmax",),
    spec="""\
From some billion parameters on, a few channels of the activations are huge, always in the same columns. With absmax they
leave all other channels of their token with codes near 0. LLM.int8() splits the product:

```python
outlier = columns of x with some |x| >= threshold
out = int8_product(x[:, ~outlier], weight[:, ~outlier]) + x[:, outlier] @ weight[:, outlier].T
```

In the int8 product each token (row of `x`) has one scale, taken over its regular columns only, and each output (row of
`weight`) has one, taken over *all* its columns, because weights are quantized long before `x` is known. The sum of
products of codes is exact in int32 (int8 would wrap around); multiply it with both scales.""",
    answer=llm_int8_matmul,
    cases=_llm_int8_cases,
    reference=_llm_int8_reference,
    atol=1e-4,
    hints=(
        "Three steps: which columns are outliers; the regular product in codes; the outliers' product in floating point.",
        "Codes are rounded quotients: per row of x over the regular columns, per row of weight over all. "
        "The product of codes times scale of the token times scale of the output restores the size.",
        "`outlier = (x.abs() >= threshold).any(0)`\n`x_scale = x[:, ~outlier].abs().amax(1, keepdim=True) / 127`, w_scale likewise over "
        "the whole weight\n`(x_codes @ w_codes.T) * x_scale * w_scale.T + x[:, outlier] @ weight[:, outlier].T`",
    ),
    wrong=(
        Wrong(
            "the weight's scale from its regular columns",
            "A weight is quantized before any x is known, so its row's scale covers all columns, those of outliers too.",
            ("w_scale = weight.abs()", "w_scale = w.abs()"),
        ),
        Wrong(
            "outliers quantized with the rest",
            "The decomposition is missing: with the outliers inside, every other number of their token loses most of its codes.",
            ("(x.abs() >= threshold).any(dim=0)", "(x.abs() >= float('inf')).any(dim=0)"),
        ),
        Wrong(
            "codes summed in eight bits",
            "A product of two int8 tensors is int8 again and wraps around at 127: convert the codes to int32 (or float) first.",
            (
                "product = (x_codes.double() @ w_codes.double().T).float()  # whole numbers: exact, as in int32",
                "product = (x_codes.to(torch.int8) @ w_codes.to(torch.int8).T).float()",
            ),
        ),
        Wrong(
            "one scale for all tokens",
            "Quiet tokens get codes near 0 when a loud one sets the scale: take the maximum of each row.",
            (
                "regular.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)",
                "regular.abs().max().clamp(min=1e-30).expand(len(x), 1)",
            ),
        ),
        Wrong(
            "one scale for the whole weight",
            "Each output row has its own scale; it can be multiplied back because it belongs to the output, not to the sum.",
            ("weight.abs().amax(dim=1, keepdim=True)", "weight.abs().max().expand(len(weight), 1)"),
        ),
        Wrong(
            "the outliers' share forgotten",
            "The columns were taken out and must be added back in floating point.",
            (" + x[:, outlier] @ weight[:, outlier].T", ""),
        ),
        Wrong(
            "scales taken before the outliers were removed",
            "The token's scale must come from its regular columns only; otherwise removing the outliers gains nothing.",
            (
                "regular.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)",
                "x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)",
            ),
        ),
        Wrong(
            "the threshold itself taken for regular",
            "A magnitude equal to the threshold counts as an outlier (>=, as in bitsandbytes).",
            ("x.abs() >= threshold", "x.abs() > threshold"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- the real model
def pack_weight(weight: Tensor, group_size: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a layer's weight to the bytes that bitsandbytes and this package read.

    weight: float32 [out, in], out * in is a multiple of group_size; its groups run on from row to row
    levels: float32 [16], sorted, from -1 to 1
    returns: packed (uint8 [out * in / 2], two codes to a byte, the first one in the high four bits)
        and absmax (float32 [out * in / group_size])
    """
    groups = weight.reshape(-1, group_size)
    absmax = groups.abs().amax(dim=1)
    scaled = groups / torch.where(absmax == 0, 1.0, absmax)[:, None]
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
    return (codes[0::2] << 4) | codes[1::2], absmax


def _pack_weight_reference(weight: Tensor, group_size: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    absmax = torch.stack([group.abs().max() for group in weight.flatten().split(group_size)])
    scaled = weight.flatten() / torch.where(absmax == 0, 1.0, absmax).repeat_interleave(group_size)
    nearest = torch.stack([(scaled - level).abs() for level in levels]).argmin(dim=0)
    return _pack_reference(nearest), absmax


def _run_pack(answer: Callable[..., Any], *args: Any) -> Any:
    """A weight in bytes; or what the model says to a prompt with bytes made by the answer, and their number."""
    if not isinstance(args[0], str):
        packed, absmax = answer(*args)
        return {"packed": packed, "absmax": absmax}
    prompt, new_tokens, group_size = args
    return _quantized_text(answer, prompt, new_tokens, group_size)


def _run_pack_reference(*args: Any) -> Any:
    if isinstance(args[0], str):
        return _expected_text(*args)
    packed, absmax = _pack_weight_reference(*args)
    return {"packed": packed, "absmax": absmax}


@cache
def _expected_text(prompt: str, new_tokens: int, group_size: int) -> dict[str, Any]:
    return _quantized_text(pack_weight, prompt, new_tokens, group_size)


def _quantized_text(answer: Callable[..., Any], prompt: str, new_tokens: int, group_size: int) -> dict[str, Any]:
    """Replace the linear layers of every second decoder layer by the package's, around the answer's bytes; then put them back."""
    from optinfer.course.exercises.real_model import default_model, greedy
    from optinfer.quantization import QuantizedLinear
    from optinfer.quantization.formats.codebook import CodebookTensor
    from optinfer.quantization.layers import linear_layers, replace_module

    model, tokenizer = default_model("bfloat16")
    replaced, size = [], 0
    try:
        for linear in linear_layers(model.model.layers[::2]).values():
            weight = linear.weight.detach()
            packed, absmax = answer(weight.float(), group_size, NF4)
            q = CodebookTensor(packed.view(-1, 1), absmax, weight.shape, weight.dtype, "nf4", 4, group_size)
            layer = QuantizedLinear.from_quantized(q)
            replace_module(model, linear, layer)
            replaced.append((layer, linear))
            size += packed.nbytes + absmax.nbytes
        return {"text": greedy(model, tokenizer, prompt, new_tokens), "bytes of the layers": size}
    finally:
        for layer, linear in replaced:
            replace_module(model, layer, linear)


def _pack_weight_cases(draw: Draw) -> Iterator[Case]:
    yield case("one group", draw.normal(1, 8), 8, NF4)
    yield case("groups run on from row to row", draw.normal(4, 6), 8, NF4)
    yield case("rows of very different size", draw.normal(3, 64) * torch.tensor([[1.0], [100], [0.01]]), 32, NF4)
    yield case("a pruned row", draw.normal(2, 16) * torch.tensor([[1.0], [0.0]]), 16, NF4)
    yield case("not contiguous", draw.normal(8, 32, strided=True), 64, NF4)
    yield slow_case("the real model, half of it in 4 bits", "Name three colors of the rainbow.", 16, 64)


IN_THE_MODEL = Exercise(
    id="quantization.in_the_model",
    title="Your bytes, generating text",
    difficulty=4,
    minutes=20,
    prerequisites=("quantization.pack_nibbles", "quantization.nf4_quantize"),
    spec="""\
Put the two together, for the whole model: each group of a weight, read row after row, has its absmax; each number becomes
the index of the nearest level; two indices share a byte.

```python
weight.flatten() ≈ levels[codes] * absmax of its group
packed = first code * 16 + second code, and so on
```

The check tries small weights first. Then it replaces the 105 matrices in every second layer of the model (53 million
weights) by the package's 4-bit layers, which read *your* bytes, and lets the model talk.""",
    answer=pack_weight,
    cases=_pack_weight_cases,
    reference=_run_pack_reference,
    run=_run_pack,
    model=True,
    limit=60,
    hints=(
        "You wrote both halves already: `nf4_quantize` and `pack_nibbles`.",
        "Flatten the weight (reshape, it may not be contiguous), quantize it in groups, pack the codes.",
        "`codes, absmax = nf4_quantize(weight.reshape(-1), group_size, levels)`\n`return pack_nibbles(codes), absmax`\n"
        "Faster than 16 distances for each weight: `torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)`.",
    ),
    wrong=(
        Wrong(
            "the first code in the low half",
            "The layer's kernel reads the high four bits first: swapped, every pair of neighboring weights is exchanged.",
            ("(codes[0::2] << 4) | codes[1::2]", "(codes[1::2] << 4) | codes[0::2]"),
        ),
        Wrong(
            "an absmax for each row",
            "Groups have group_size numbers, wherever the rows end: reshape to [-1, group_size].",
            ("weight.reshape(-1, group_size)", "weight"),
        ),
        Wrong(
            "groups down the columns",
            "A weight is read row after row; its columns are far apart in memory.",
            ("weight.reshape(-1, group_size)", "weight.t().reshape(-1, group_size)"),
        ),
        Wrong(
            "codes not packed",
            "One code for each byte is twice the memory: 8 bits for a 4-bit weight.",
            ("(codes[0::2] << 4) | codes[1::2]", "codes"),
        ),
        Wrong(
            "dividing by a zero absmax",
            "Pruned rows exist: 0/0 is NaN, and its code is not that of 0.",
            ("torch.where(absmax == 0, 1.0, absmax)[:, None]", "absmax[:, None]"),
        ),
        Wrong(
            "the level below instead of the nearest",
            "`bucketize` needs the midpoints between levels as borders, not the levels.",
            ("(levels[1:] + levels[:-1]) / 2", "levels[1:]"),
        ),
    ),
)

EXERCISES = (
    ABSMAX,
    AFFINE,
    PACK,
    UNPACK,
    GROUPS,
    NF4_LEVELS,
    NF4_QUANTIZE,
    LLM_INT8,
    IN_THE_MODEL,
    *today.QUANTIZATION,
    *testing.QUANTIZATION,
)
