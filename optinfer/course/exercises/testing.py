# ruff: noqa: E501 (the hints are prose)
"""Exercises in which the reader writes the test inputs of a kernel, by chapter: each chapter's module takes its own."""

import math
from typing import Any

import torch
from torch import Tensor

from optinfer.course.exercise import Draw, Exercise, Wrong, source_of
from optinfer.course.exercises.kernels import launched, tl, triton
from optinfer.course.exercises.planted_bugs import MOST, STEPS, Input, PlantedBugs

_BLOCK = 16  # of all tiles: the least that tl.dot takes
_FLAGS = [False, True]

_ASKED = """\
Write no kernel this time: write what finds the bugs in one. A test of a kernel is its inputs, and a good set of them is small:
each input is there because some bug shows nowhere else. The kernel below is right."""

_JUDGED = f"""\
The course has more of this kernel, each with one bug: a mask dropped, a bound off by one, a stride of something else, a step
left out. Return at most {MOST} inputs, so small that all their programs together take at most {STEPS} steps of the loop. The
course fills tensors of these sizes with numbers, runs all kernels interpreted with their memory watched, and compares with
float64. You pass when your inputs catch every wrong kernel and spare the right one."""


def _shown(kernel: Any) -> str:
    return source_of(kernel).replace("  # fmt: skip", "")


def _exercise(bugs: PlantedBugs, **text: Any) -> Exercise:
    """What is asked of the reader; its inputs are the kernels."""
    return Exercise(
        cases=bugs.cases,
        reference=bugs.expected,
        run=bugs.run,
        runs_the_package=True,
        noun="kernel",
        verb="judged rightly",
        **text,
    )


# --------------------------------------------------------------------------------------------------- a 4-bit product
@triton.jit
def int4_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, tokens, rows, columns, group,
    ZERO_POINTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x @ weight.T in float32, the weight in 4 bits; one program makes a tile of BLOCK tokens and BLOCK rows.

    x_ptr: [tokens, columns]; packed_ptr: uint8 [rows, half of the columns, rounded up], the first code in the high half
    scale_ptr, zero_ptr: [rows, groups of `group` columns, the last perhaps shorter]; out_ptr: [tokens, rows]
    a weight is (code - zero point) * scale; without ZERO_POINTS it is (code - 8) * scale
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = (columns + 1) // 2
    groups = (columns + group - 1) // group
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x_inside = (t[:, None] < tokens) & (c[None, :] < columns)
        x = tl.load(x_ptr + t[:, None] * columns + c[None, :], mask=x_inside, other=0.0)
        inside = (r[:, None] < rows) & (c[None, :] < columns)
        byte = tl.load(packed_ptr + r[:, None] * width + c[None, :] // 2, mask=inside, other=0)
        code = tl.where(c[None, :] % 2 == 0, byte >> 4, byte & 15).to(tl.float32)
        at = r[:, None] * groups + c[None, :] // group
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0)
        zero = 8.0
        if ZERO_POINTS:
            zero = tl.load(zero_ptr + at, mask=inside, other=0.0)
        weight = (code - zero) * scale
        total += tl.dot(x, tl.trans(weight), input_precision="ieee")
    tl.store(out_ptr + t[:, None] * rows + r[None, :], total, mask=(t[:, None] < tokens) & (r[None, :] < rows))


def _int4_tensors(one: Input, draw: Draw) -> tuple[Tensor, ...]:
    """x, codes [rows, columns], scales and zero points [rows, groups]."""
    tokens, rows, columns, groups = one["tokens"], one["rows"], one["columns"], -(-one["columns"] // one["group"])
    scales, zeros = 0.1 + 0.2 * draw.uniform(rows, groups), draw.integers(0, 16, rows, groups, dtype=torch.float32)
    return draw.normal(tokens, columns), draw.integers(0, 16, rows, columns), scales, zeros


def _launch_int4(kernel: Any, one: Input, draw: Draw) -> dict[str, Any]:
    x, codes, scales, zeros = _int4_tensors(one, draw)
    tokens, rows, columns = one["tokens"], one["rows"], one["columns"]
    pairs = torch.nn.functional.pad(codes, (0, columns % 2)).to(torch.uint8)
    packed = (pairs[:, ::2] << 4) | pairs[:, 1::2]
    grid, flags = (-(-tokens // _BLOCK), -(-rows // _BLOCK)), {"ZERO_POINTS": one["zero_points"], "BLOCK": _BLOCK}
    sizes = (tokens, rows, columns, one["group"])
    return launched(kernel, grid, torch.empty(tokens, rows), x, packed, scales, zeros, ..., *sizes, **flags)


def _int4_reference(one: Input, draw: Draw) -> Tensor:
    x, codes, scales, zeros = (t.double() for t in _int4_tensors(one, draw))
    of_column = torch.arange(one["columns"]) // one["group"]
    zero = zeros[:, of_column] if one["zero_points"] else 8
    return (x @ ((codes - zero) * scales[:, of_column]).T).float()


_INT4 = PlantedBugs(
    kernel=int4_kernel,
    fields={
        "tokens": range(1, 41),
        "rows": range(1, 41),
        "columns": range(1, 65),
        "group": range(1, 65),
        "zero_points": _FLAGS,
    },
    promise="It takes all sizes allowed here: something is wrong with this machine's Triton.",
    steps=lambda one: math.prod(-(-one[size] // _BLOCK) for size in ("tokens", "rows", "columns")),
    launch=_launch_int4,
    reference=_int4_reference,
    bugs=(
        Wrong(
            "the load of x has no mask",
            "When does a tile reach past the last number of x?",
            (", mask=x_inside, other=0.0", ""),
        ),
        Wrong(
            "the load of the scales has no mask",
            "When does a tile reach past the last scale?",
            ("scale_ptr + at, mask=inside, other=0.0", "scale_ptr + at"),
        ),
        Wrong(
            "the store has no mask",
            "When does a tile reach past the last number of the result?",
            (", mask=(t[:, None] < tokens) & (r[None, :] < rows)", ""),
        ),
        Wrong(
            "a row's bytes rounded down",
            "Two codes share a byte. When is a byte left half empty, and who notices that it was forgotten?",
            ("(columns + 1) // 2", "columns // 2"),
        ),
        Wrong(
            "always one byte for what is left over",
            "When is nothing left over?",
            ("(columns + 1) // 2", "columns // 2 + 1"),
        ),
        Wrong(
            "the last, shorter group not counted",
            "When is the last group shorter than the others?",
            ("(columns + group - 1) // group", "columns // group"),
        ),
        Wrong(
            "always one group for what is left over",
            "When do the groups come out even?",
            ("(columns + group - 1) // group", "columns // group + 1"),
        ),
        Wrong(
            "the columns after the last whole tile skipped",
            "When is there a column after the last whole tile?",
            ("range(0, columns, BLOCK)", "range(0, columns // BLOCK * BLOCK, BLOCK)"),
        ),
        Wrong(
            "one scale for a whole tile",
            "A tile has 16 columns. When do they not all have the same scale?",
            ("c[None, :] // group", "start // group"),
        ),
        Wrong(
            "rows of x as far apart as those of the result",
            "Two sizes are confused. When are they different, and is there a second row?",
            ("x_ptr + t[:, None] * columns", "x_ptr + t[:, None] * rows"),
        ),
        Wrong(
            "rows of the result as far apart as those of x",
            "Two sizes are confused. When are they different, and is there a second row?",
            ("out_ptr + t[:, None] * rows", "out_ptr + t[:, None] * columns"),
        ),
        Wrong(
            "all programs work on the first tokens",
            "When is there a second program along the tokens?",
            ("t = tl.program_id(0) * BLOCK + tl.arange", "t = tl.arange"),
        ),
        Wrong(
            "all programs work on the first rows",
            "When is there a second program along the rows?",
            ("r = tl.program_id(1) * BLOCK + tl.arange", "r = tl.arange"),
        ),
        Wrong(
            "a tile's sum replaces the one before", "When is there one before?", ("total += tl.dot", "total = tl.dot")
        ),
        Wrong("the scale forgotten", "Whatever you return should show it.", ("(code - zero) * scale", "(code - zero)")),
        Wrong("zero points never read", "When are there any?", ("if ZERO_POINTS:", "if False:")),
        Wrong("codes centered at 7.5", "When is the middle of the codes used at all?", ("zero = 8.0", "zero = 7.5")),
    ),
)


def int4_inputs() -> list[dict[str, int]]:
    """Inputs that tell the right kernel from every wrong one.

    returns: at most 6 dicts, each with tokens and rows (1 to 40), columns and group (1 to 64), zero_points (True or False)
    """
    return [
        {"tokens": 17, "rows": 5, "columns": 17, "group": 8, "zero_points": True},
        {"tokens": 2, "rows": 18, "columns": 32, "group": 16, "zero_points": False},
    ]


INT4_INPUTS = _exercise(
    _INT4,
    id="quantization.int4_inputs",
    title="Find the bugs of a 4-bit product",
    difficulty=3,
    minutes=25,
    prerequisites=("quantization.pack_nibbles", "quantization.groups"),
    spec=f"""\
{_ASKED} It is Triton, and can be read as torch: `t`, `r` and `c` are the tokens, rows and columns of a tile, `tl.load` with a
mask reads only what the mask allows.

```python
{_shown(int4_kernel)}
```

BLOCK is {_BLOCK}. {_JUDGED}""",
    answer=int4_inputs,
    hints=(
        "Go through the kernel line by line. For which sizes would the line do the same if it were wrong?",
        "What is whole, even, square or 1 hides bugs: masks need sizes that end inside a tile, strides need sizes that differ and more than one row. But what is never whole hides bugs too: some round up where nothing is left over.",
        "Two inputs do. One with an odd number of columns just past a tile, groups that end inside it, the last one shorter, and more than a tile of tokens. One with even columns and whole groups, more than a tile of rows, and the other value of zero_points.",
    ),
    wrong=(
        Wrong(
            "only whole tiles",
            "Where every size is a multiple of the tile, no mask does anything, and nothing is left over.",
            ('"tokens": 17, "rows": 5, "columns": 17', '"tokens": 32, "rows": 16, "columns": 32'),
            ('"tokens": 2, "rows": 18', '"tokens": 16, "rows": 32'),
        ),
        Wrong(
            "only what leaves a rest",
            "Rounding up by hand goes wrong where nothing is left over: test even columns and whole groups as well.",
            ('"columns": 32', '"columns": 35'),
        ),
        Wrong(
            "only square weights",
            "Where rows and columns are equal, one may stand for the other.",
            ('"rows": 5', '"rows": 17'),
            ('"rows": 18', '"rows": 32'),
        ),
        Wrong(
            "one token at a time",
            "A second row of x, and a second tile of tokens, are never looked for.",
            ('"tokens": 17', '"tokens": 1'),
            ('"tokens": 2', '"tokens": 1'),
        ),
        Wrong(
            "everything in one tile",
            "One program, and one step of its loop: nothing that follows from a second one is tested.",
            ('"tokens": 17, "rows": 5, "columns": 17, "group": 8', '"tokens": 7, "rows": 5, "columns": 13, "group": 4'),
            ('"rows": 18, "columns": 32, "group": 16', '"rows": 6, "columns": 14, "group": 7'),
        ),
        Wrong(
            "one group for a whole row",
            "Then a row has one scale, whichever column asks for it.",
            ('"group": 8', '"group": 64'),
            ('"group": 16', '"group": 64'),
        ),
        Wrong(
            "zero points in every input",
            "The flag has two values, and each has a line of its own.",
            ("False", "True"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- flash attention
@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, q_len, kv_len, group, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Flash attention in float32; program (i, h) makes rows i * BLOCK … of head h.

    q_ptr, out_ptr: [heads, q_len, DIM]; k_ptr, v_ptr: [heads / group, kv_len, DIM]; `group` heads share keys and values
    CAUSAL: the last query sees all keys, each one before it one key less; every query must see a key
    """
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    at = (head * q_len + rows[:, None]) * DIM + dims[None, :]
    q = tl.load(q_ptr + at, mask=rows[:, None] < q_len, other=0.0)
    m = tl.full([BLOCK], -1e30, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, DIM], tl.float32)
    for start in range(0, kv_len, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        kv_at = (head // group * kv_len + columns[:, None]) * DIM + dims[None, :]
        inside = columns[:, None] < kv_len
        k = tl.load(k_ptr + kv_at, mask=inside, other=0.0)
        v = tl.load(v_ptr + kv_at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = columns[None, :] < kv_len
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None] + kv_len - q_len)
        scores = tl.where(visible, scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        weights = tl.exp(scores - m_new[:, None])
        shrink = tl.exp(m - m_new)
        l = l * shrink + tl.sum(weights, axis=1)
        o = o * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
        m = m_new
    tl.store(out_ptr + at, o / l[:, None], mask=rows[:, None] < q_len)


_DIM = 16


def _attention_tensors(one: Input, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: normal numbers; the first dimension of q and k adds `scores` to every score."""
    q = draw.normal(one["kv_heads"] * one["group"], one["q_len"], _DIM)
    k, v = (draw.normal(one["kv_heads"], one["kv_len"], _DIM) for _ in range(2))
    q[..., 0], k[..., 0] = math.sqrt(_DIM), one["scores"]
    return q, k, v


def _launch_attention(kernel: Any, one: Input, draw: Draw) -> dict[str, Any]:
    q, k, v = _attention_tensors(one, draw)
    sizes = (one["q_len"], one["kv_len"], one["group"], 1 / math.sqrt(_DIM))
    constants = {"CAUSAL": one["causal"], "DIM": _DIM, "BLOCK": _BLOCK}
    return launched(
        kernel, (-(-one["q_len"] // _BLOCK), len(q)), torch.empty_like(q), q, k, v, ..., *sizes, **constants
    )


def _attention_reference(one: Input, draw: Draw) -> Tensor:
    q, k, v = (t.double() for t in _attention_tensors(one, draw))
    k, v = k.repeat_interleave(one["group"], 0), v.repeat_interleave(one["group"], 0)
    scores = q @ k.mT / math.sqrt(_DIM)
    if one["causal"]:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + one["kv_len"] - one["q_len"])
        scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).float()  # a query that sees nothing: zeros


_ATTENTION = PlantedBugs(
    kernel=attention_kernel,
    fields={
        "q_len": range(1, 49),
        "kv_len": range(1, 49),
        "kv_heads": range(1, 4),
        "group": range(1, 4),
        "causal": _FLAGS,
        "scores": range(-200, 201),
    },
    promise="Even the right kernel fails on that input, so it is no test. Has every query a key to see?",
    steps=lambda one: (
        one["kv_heads"] * one["group"] * math.prod(-(-one[size] // _BLOCK) for size in ("q_len", "kv_len"))
    ),
    launch=_launch_attention,
    reference=_attention_reference,
    bugs=(
        Wrong(
            "the load of the keys has no mask",
            "When does a tile of keys reach past the last one?",
            ("k_ptr + kv_at, mask=inside, other=0.0", "k_ptr + kv_at"),
        ),
        Wrong(
            "the store has no mask",
            "When does a tile of queries reach past the last one?",
            ("o / l[:, None], mask=rows[:, None] < q_len", "o / l[:, None]"),
        ),
        Wrong(
            "keys past the last one are counted",
            "When does a tile reach past the last key, and what else may hide those keys?",
            ("visible = columns[None, :] < kv_len", "visible = columns[None, :] >= 0"),
        ),
        Wrong(
            "a query does not see its own key",
            "When is there a diagonal?",
            ("columns[None, :] <= rows", "columns[None, :] < rows"),
        ),
        Wrong(
            "the causal mask aligned at the top left",
            "When do the last query and the last key not meet on the diagonal of a square?",
            (" + kv_len - q_len)", ")"),
        ),
        Wrong("every input taken for causal", "When should the future be seen?", ("if CAUSAL:", "if True:")),
        Wrong(
            "the old sums are not rescaled",
            "When is there an old sum?",
            ("shrink = tl.exp(m - m_new)", "shrink = tl.full([BLOCK], 1.0, tl.float32)"),
        ),
        Wrong(
            "no maximum subtracted",
            "exp is 0 far below and infinite far above: how far from 0 are your scores?",
            ("m_new = tl.maximum(m, tl.max(scores, axis=1))", "m_new = tl.zeros([BLOCK], tl.float32)"),
        ),
        Wrong(
            "the running maximum starts at 0",
            "When is 0 larger than every score, and by so much that it matters?",
            ("-1e30", "0.0"),
        ),
        Wrong(
            "the loop ends one key early",
            "The loop goes in steps of 16. For which lengths does one key less save a step?",
            ("range(0, kv_len, BLOCK)", "range(0, kv_len - 1, BLOCK)"),
        ),
        Wrong(
            "every query head with keys of its own",
            "When are there fewer heads of keys than of queries?",
            ("head // group", "head"),
        ),
        Wrong(
            "key heads dealt out in turn",
            "0 1 0 1 instead of 0 0 1 1: how many heads of each kind does it take to see that?",
            ("head // group", "head % (tl.num_programs(1) // group)"),
        ),
        Wrong(
            "heads of keys as far apart as those of queries",
            "Two lengths are confused. When are they different, and is there a second head of keys?",
            ("head // group * kv_len", "head // group * q_len"),
        ),
        Wrong(
            "all programs work on the first queries",
            "When is there a second program for a head?",
            ("rows = tl.program_id(0) * BLOCK + tl.arange", "rows = tl.arange"),
        ),
        Wrong(
            "the scale forgotten",
            "Two keys with different scores show it.",
            (' input_precision="ieee") * scale', ' input_precision="ieee")'),
        ),
        Wrong(
            "rescaled after the new tile is added",
            "Two steps in the wrong order. What does the first tile shrink by?",
            (
                'o * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")',
                '(o + tl.dot(weights, v, input_precision="ieee")) * shrink[:, None]',
            ),
        ),
    ),
)


def flash_inputs() -> list[dict[str, int]]:
    """Inputs that tell the right kernel from every wrong one.

    returns: at most 6 dicts, each with q_len and kv_len (1 to 48), kv_heads and group (1 to 3; together kv_heads * group
        query heads), causal (True or False), scores (-200 to 200: the number around which all scores lie)
    """
    return [
        {"q_len": 3, "kv_len": 17, "kv_heads": 2, "group": 2, "causal": True, "scores": 0},
        {"q_len": 20, "kv_len": 27, "kv_heads": 1, "group": 1, "causal": False, "scores": -200},
    ]


FLASH_INPUTS = _exercise(
    _ATTENTION,
    id="attention.flash_inputs",
    title="Find the bugs of a flash attention kernel",
    difficulty=3,
    minutes=25,
    prerequisites=("attention.triton_flash",),
    spec=f"""\
{_ASKED}

```python
{_shown(attention_kernel)}
```

BLOCK and DIM are {_BLOCK}. {_JUDGED}""",
    answer=flash_inputs,
    hints=(
        "Go through the kernel line by line. For which sizes, and for which scores, would the line do the same if it were wrong?",
        "What is whole, square or single hides bugs: lengths that end inside a tile, q_len and kv_len that differ, more than one head of keys with more than one query head each. A causal mask hides what lies past the last key. Scores near 0 need no maximum.",
        "Two inputs do. One causal: few queries, kv_len one past a tile, two heads of keys for four of queries. One that is not causal: more than a tile of queries, keys that end inside a tile, and scores far below 0.",
    ),
    wrong=(
        Wrong(
            "only whole tiles",
            "Where every length is a multiple of the tile, no mask but the causal one does anything.",
            ('"q_len": 3, "kv_len": 17', '"q_len": 16, "kv_len": 32'),
            ('"q_len": 20, "kv_len": 27', '"q_len": 32, "kv_len": 16'),
        ),
        Wrong(
            "always causal",
            "The causal mask hides what lies past the last key, and the flag has two values.",
            ("False", "True"),
        ),
        Wrong(
            "only prompts",
            "With as many queries as keys, one length may stand for the other, and both corners of the mask are one.",
            ('"q_len": 3, "kv_len": 17', '"q_len": 5, "kv_len": 5'),
            ('"q_len": 20, "kv_len": 27', '"q_len": 17, "kv_len": 17'),
        ),
        Wrong(
            "one head of keys",
            "All query heads share it then, in whichever order heads are dealt out.",
            ('"kv_heads": 2', '"kv_heads": 1'),
        ),
        Wrong(
            "as many heads of keys as of queries",
            "Then nothing is shared, and each head may keep to its own.",
            ('"group": 2', '"group": 1'),
        ),
        Wrong(
            "scores near 0 alone",
            "There exp needs no maximum. A model's scores lie anywhere.",
            ("-200", "0"),
        ),
        Wrong(
            "everything in one tile",
            "One program for a head, and one step of its loop: nothing that follows from a second one is tested.",
            ('"kv_len": 17', '"kv_len": 9'),
            ('"q_len": 20, "kv_len": 27', '"q_len": 6, "kv_len": 6'),
        ),
    ),
)

QUANTIZATION = (INT4_INPUTS,)
ATTENTION = (FLASH_INPUTS,)
EXERCISES = (*QUANTIZATION, *ATTENTION)
