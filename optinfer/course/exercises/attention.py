# ruff: noqa: E501 (the hints are prose)
"""Exercises on attention: stable softmax, the online softmax, tiles, Triton kernels, and the real model."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from optinfer.course.exercise import Case, Draw, Exercise, Wrong, case, slow_case
from optinfer.course.exercises import testing
from optinfer.course.exercises.kernels import launched, launched_reference, tl, triton

INF = math.inf


# --------------------------------------------------------------------------------------------------- softmax
def stable_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, for scores of any size.

    scores: float32 [rows, columns]; -inf means masked
    returns: float32 [rows, columns]; a row that is masked everywhere is all zeros
    """
    largest = scores.amax(dim=-1, keepdim=True)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    weights = torch.exp(scores - largest)
    total = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def _softmax_reference(scores: Tensor) -> Tensor:
    return scores.double().softmax(-1).nan_to_num(0.0).float()


def _softmax_cases(draw: Draw) -> Iterator[Case]:
    yield case("2 x 5", draw.normal(2, 5))
    yield case("scores around 1000", 1000 + 3 * draw.normal(3, 4))
    yield case("scores around -1000", -1000 + draw.normal(3, 7))
    yield case("rows of different size", draw.normal(4, 6) + torch.tensor([[0.0], [80.0], [-90.0], [700.0]]))
    yield case("from -100 to 100 in one row", torch.tensor([[-100.0, 0.0, 99.0, 100.0], [100.0, -100.0, 1.0, 2.0]]))
    yield case("some masked", torch.where(draw.uniform(5, 9) < 0.4, -INF, draw.normal(5, 9)))
    yield case("a row masked everywhere", torch.tensor([[1.0, 2.0], [-INF, -INF]]))
    yield case("not contiguous", draw.normal(6, 3, strided=True))


SOFTMAX = Exercise(
    id="attention.stable_softmax",
    title="A softmax that cannot overflow",
    difficulty=1,
    minutes=10,
    spec="""\
`exp(89)` is already infinite in float32, and attention scores get there. Softmax does not change when a constant is
subtracted from a row: subtract its maximum. A row in which everything is masked (-inf) shall give zeros, not NaN.

```python
softmax(s) = exp(s - max(s)) / sum(exp(s - max(s)))
```""",
    answer=stable_softmax,
    cases=_softmax_cases,
    reference=_softmax_reference,
    forbidden=("softmax", "log_softmax", "logsumexp"),
    hints=(
        "What is -inf minus -inf?",
        "Subtract the row's maximum, or 0 where that is -inf; divide by the sum, or by 1 where that is 0.",
        "`m = scores.amax(-1, keepdim=True)`; `m = torch.where(m == -inf, 0.0, m)`; `e = torch.exp(scores - m)`; divide by its sum, zeros replaced by 1.",
    ),
    wrong=(
        Wrong(
            "no maximum subtracted",
            "exp overflows beyond 88 and vanishes below -104: inf/inf and 0/0.",
            ("torch.exp(scores - largest)", "torch.exp(scores)"),
        ),
        Wrong(
            "NaN for a masked row",
            "-inf - (-inf) is NaN: replace the maximum by 0 where everything is masked.",
            ("largest = torch.where(largest == -math.inf, 0.0, largest)", "pass"),
        ),
        Wrong(
            "one maximum for all rows",
            "A row 700 below the overall maximum vanishes altogether: each row has its own.",
            ("scores.amax(dim=-1, keepdim=True)", "scores.amax().expand(len(scores), 1)"),
        ),
        Wrong(
            "normalized over the wrong dimension",
            "Each row, the last dimension, sums to one.",
            ("weights.sum(dim=-1, keepdim=True)", "weights.sum(dim=0, keepdim=True)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- masks and heads
def causal_mask(q_len: int, kv_len: int) -> Tensor:
    """Which key may each query see?

    q_len: new tokens; kv_len: all tokens, of which the queries are the last q_len (q_len may exceed kv_len)
    returns: bool [q_len, kv_len], True where the key is not later than the query
    """
    rows = torch.arange(q_len)[:, None] + (kv_len - q_len)
    return torch.arange(kv_len) <= rows


def _mask_reference(q_len: int, kv_len: int) -> Tensor:
    return torch.tensor([[j <= i + kv_len - q_len for j in range(kv_len)] for i in range(q_len)]).view(q_len, kv_len)


def _mask_cases(draw: Draw) -> Iterator[Case]:
    yield case("a prompt of 4", 4, 4)
    yield case("one new token after 6", 1, 7)
    yield case("three new tokens after 5", 3, 8)
    yield case("more queries than keys", 5, 3)
    yield case("random", draw.random.randrange(2, 20), draw.random.randrange(20, 40))


CAUSAL_MASK = Exercise(
    id="attention.causal_mask",
    title="Who may look at whom?",
    difficulty=1,
    minutes=5,
    spec="""\
With a KV cache the queries are the *last* `q_len` of `kv_len` tokens. Query 0 is therefore token `kv_len - q_len`, and it
sees itself and everything before it. The last query sees everything.""",
    answer=causal_mask,
    cases=_mask_cases,
    reference=_mask_reference,
    hints=(
        "Draw the mask for one new token after six old ones.",
        "Query i stands at position i + kv_len - q_len. It sees keys up to and including that.",
        "`torch.arange(kv_len) <= torch.arange(q_len)[:, None] + kv_len - q_len`",
    ),
    wrong=(
        Wrong(
            "aligned at the top left",
            "The queries are the last tokens, not the first: in decoding the one new token would see only key 0.",
            (" + (kv_len - q_len)", ""),
        ),
        Wrong(
            "a token that does not see itself", "The diagonal belongs to the mask: <=, not <.", ("<= rows", "< rows")
        ),
        Wrong("the mask upside down", "True means visible here.", ("<= rows", "> rows")),
        Wrong(
            "everything visible",
            "Later tokens must stay hidden within the new ones.",
            ("return torch.arange(kv_len) <= rows", "return torch.ones(q_len, kv_len, dtype=torch.bool)"),
        ),
    ),
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in which several query heads share one key/value head (GQA); no mask.

    q: float32 [heads, q_len, dim]; k, v: float32 [kv_heads, kv_len, dim], heads is a multiple of kv_heads;
        query heads 0, 1, … heads/kv_heads - 1 use key/value head 0, the next ones head 1, and so on
    returns: float32 [heads, q_len, dim]
    """
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1) @ v


def _grouped_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = len(q) // len(k)
    heads = [
        ((q[h].double() @ k[h // group].double().T) / q.shape[-1] ** 0.5).softmax(-1) @ v[h // group].double()
        for h in range(len(q))
    ]
    return torch.stack(heads).float()


def _grouped_cases(draw: Draw) -> Iterator[Case]:
    for label, heads, kv_heads, n, m, d in (
        ("9 query heads, 3 key heads", 9, 3, 4, 6, 8),
        ("4 and 2", 4, 2, 5, 5, 16),
        ("one key head for all", 6, 1, 2, 9, 4),
        ("as many as query heads", 3, 3, 7, 7, 8),
    ):
        yield case(label, draw.normal(heads, n, d), draw.normal(kv_heads, m, d), draw.normal(kv_heads, m, d))
    yield case("large scores", 20 * draw.normal(4, 3, 8), 5 * draw.normal(2, 4, 8), draw.normal(2, 4, 8))


GROUPED = Exercise(
    id="attention.grouped_heads",
    title="Heads that share a cache",
    difficulty=2,
    minutes=10,
    spec="""\
SmolLM2 has 9 query heads and 3 key/value heads: its cache is three times smaller. Neighbors share: query heads 0, 1, 2 use
key/value head 0.

```python
out[h] = softmax(q[h] @ k[h // group].T / sqrt(dim)) @ v[h // group]        # group = heads // kv_heads
```""",
    answer=grouped_attention,
    cases=_grouped_cases,
    reference=_grouped_reference,
    forbidden=("scaled_dot_product_attention",),
    hints=(
        "`repeat` and `repeat_interleave` put copies in different orders.",
        "Each key/value head is repeated group times in a row: 0 0 0 1 1 1 2 2 2.",
        "`k = k.repeat_interleave(group, dim=0)`, v likewise, then plain attention with scale 1/sqrt(dim).",
    ),
    wrong=(
        Wrong(
            "0 1 2 0 1 2 instead of 0 0 1 1 2 2",
            "`repeat` tiles the whole list; neighbors share a head, so each must be repeated in place: repeat_interleave.",
            (
                "k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)",
                "k.repeat(group, 1, 1), v.repeat(group, 1, 1)",
            ),
        ),
        Wrong(
            "no scale", "Scores of dim products grow like sqrt(dim): divide by it.", (" / math.sqrt(q.shape[-1])", "")
        ),
        Wrong(
            "divided by dim instead of its root",
            "The standard deviation of a sum of dim products is sqrt(dim).",
            ("math.sqrt(q.shape[-1])", "q.shape[-1]"),
        ),
        Wrong(
            "softmax over the queries",
            "Each query spreads its weight over the keys: the last dimension.",
            ("scores.softmax(dim=-1)", "scores.softmax(dim=-2)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- online softmax
def online_step(m: Tensor, l: Tensor, o: Tensor, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take one more block of keys into a running attention.

    m: [rows], largest score so far (-inf at the start); l: [rows], sum of exp(score - m) so far
    o: [rows, dim], sum of exp(score - m) * value so far, not yet divided by l
    scores: [rows, block], -inf where masked; v: [block, dim]; everything float32
    returns: the new m, l, o
    """
    m_new = torch.maximum(m, scores.amax(dim=1))
    m_use = torch.where(m_new == -math.inf, 0.0, m_new)  # nothing seen yet: avoid -inf - -inf
    weights = torch.exp(scores - m_use[:, None])
    shrink = torch.exp(m - m_use)
    return m_new, l * shrink + weights.sum(dim=1), o * shrink[:, None] + weights @ v


def _online_state(answer: Callable[..., Any], scores: Tensor, values: Tensor, block: int) -> dict[str, Tensor]:
    """m, l and o after all blocks of a row of scores."""
    rows = len(scores)
    m, l, o = torch.full((rows,), -INF), torch.zeros(rows), torch.zeros(rows, values.shape[1])
    for start in range(0, scores.shape[1], block):
        m, l, o = answer(m, l, o, scores[:, start : start + block].clone(), values[start : start + block].clone())
    return {"m": m, "l": l, "o": o}


def _online_reference(scores: Tensor, values: Tensor, block: int) -> dict[str, Tensor]:
    m = scores.double().amax(1)
    weights = torch.exp(scores.double() - m.nan_to_num(neginf=0.0)[:, None])
    return {"m": m.float(), "l": weights.sum(1).float(), "o": (weights @ values.double()).float()}


def _online_cases(draw: Draw) -> Iterator[Case]:
    yield case("one block", draw.normal(3, 4), draw.normal(4, 2), 4)
    yield case("the largest score comes last", torch.tensor([[0.0, 1.0, 2.0, 9.0]]), draw.normal(4, 3), 2)
    yield case("the largest score comes first", torch.tensor([[9.0, 1.0, 2.0, 0.0]]), draw.normal(4, 3), 2)
    yield case("5 rows, blocks of 4, a shorter last one", 3 * draw.normal(5, 14), draw.normal(14, 8), 4)
    yield case("scores around 200", 200 + 10 * draw.normal(4, 12), draw.normal(12, 4), 3)
    yield case(
        "the first block is masked", torch.cat([torch.full((2, 3), -INF), draw.normal(2, 3)], 1), draw.normal(6, 4), 3
    )
    yield case("everything is masked", torch.full((2, 4), -INF), draw.normal(4, 2), 2)


ONLINE = Exercise(
    id="attention.online_step",
    title="Softmax without seeing the end",
    difficulty=3,
    minutes=20,
    prerequisites=("attention.stable_softmax",),
    spec="""\
Flash attention sees the keys block by block and never the whole row. It keeps the largest score `m`, and two sums relative
to it. When a block brings a larger score, the old sums must shrink to the new scale:

```python
m_new = max(m, max(scores))
l_new = l * exp(m - m_new) + sum(exp(scores - m_new))
o_new = o * exp(m - m_new) + exp(scores - m_new) @ v
```

While everything so far is masked, `m` stays -inf and the sums stay 0, without NaN. The check feeds a row of scores through
your step, block by block.""",
    answer=online_step,
    cases=_online_cases,
    reference=_online_reference,
    run=_online_state,
    forbidden=("softmax", "logsumexp"),
    atol=1e-4,
    hints=(
        "By which factor are the old sums too large once the maximum has grown?",
        "Both l and o are multiplied by exp(m - m_new). Use 0 in place of m_new inside the exponentials where it is -inf.",
        "`m_new = torch.maximum(m, scores.amax(1))`; `p = torch.exp(scores - m_use[:, None])`; `c = torch.exp(m - m_use)`; return m_new, l*c + p.sum(1), o*c[:, None] + p @ v.",
    ),
    wrong=(
        Wrong(
            "the old sums are not rescaled",
            "They are relative to the old maximum: multiply both by exp(m_old - m_new).",
            ("shrink = torch.exp(m - m_use)", "shrink = torch.ones_like(m)"),
        ),
        Wrong(
            "the output is not rescaled",
            "o holds the same exponentials as l: whatever shrinks one shrinks the other.",
            ("o * shrink[:, None]", "o"),
        ),
        Wrong(
            "rescaled the wrong way round",
            "The maximum grows, so the old sums shrink: exp(m_old - m_new) is at most 1.",
            ("torch.exp(m - m_use)", "torch.exp(m_use - m).nan_to_num(posinf=0.0)"),
        ),
        Wrong(
            "the block's maximum instead of the running one",
            "m must never fall: compare with what was there before.",
            ("m_new = torch.maximum(m, scores.amax(dim=1))", "m_new = scores.amax(dim=1)"),
        ),
        Wrong(
            "NaN while everything is masked",
            "-inf - (-inf) is NaN: use 0 as the maximum until something was seen.",
            ("m_use = torch.where(m_new == -math.inf, 0.0, m_new)", "m_use = m_new"),
        ),
    ),
)


def merge_partials(outs: Tensor, lses: Tensor) -> Tensor:
    """Join attention results over different parts of the keys.

    outs: float32 [parts, rows, dim], each the finished attention over its part
    lses: float32 [parts, rows], log of the sum of exp(scores) of its part; -inf for a part with no visible key
    returns: float32 [rows, dim], attention over all keys; zeros for a row that saw none
    """
    largest = lses.amax(dim=0)
    weights = torch.exp(lses - torch.where(largest == -math.inf, 0.0, largest))
    total = weights.sum(dim=0)
    return (weights[..., None] * outs).sum(dim=0) / torch.where(total == 0, 1.0, total)[:, None]


def _merge_reference(outs: Tensor, lses: Tensor) -> Tensor:
    return torch.einsum("pr,prd->rd", lses.double().softmax(0).nan_to_num(0.0), outs.double()).float()


def _merge_cases(draw: Draw) -> Iterator[Case]:
    yield case("two halves", draw.normal(2, 3, 4), draw.normal(2, 3))
    yield case("five parts, large scores", draw.normal(5, 4, 8), 300 + 20 * draw.normal(5, 4))
    empty = draw.normal(3, 2)
    empty[1] = -INF
    yield case("an empty part", draw.normal(3, 2, 4), empty)
    yield case("a row that saw nothing", draw.normal(2, 2, 3), torch.tensor([[0.5, -INF], [1.5, -INF]]))
    yield case("one part", draw.normal(1, 5, 2), draw.normal(1, 5))
    yield case("rows of very different size", draw.normal(2, 2, 3), torch.tensor([[300.0, 0.0], [299.0, 1.0]]))
    yield case("log-sum-exps 300 and 0 in one row", draw.normal(2, 1, 3), torch.tensor([[300.0], [0.0]]))
    yield case(
        "four parts of nearly the same weight, far below 0", draw.normal(4, 2, 3), -300 + 0.1 * draw.normal(4, 2)
    )


MERGE = Exercise(
    id="attention.merge_partials",
    title="Split the keys, join the answers",
    difficulty=3,
    minutes=15,
    prerequisites=("attention.online_step",),
    spec="""\
While decoding there is one query and a long cache. Flash-decoding cuts the cache into parts, lets different cores work on
them, and joins the results. Each part returns its output and the log-sum-exp of its scores, which is its weight on a log
scale:

```python
out = sum(exp(lse[p]) * out[p]) / sum(exp(lse[p]))
```

Subtract the largest lse first; parts without any visible key have -inf.""",
    answer=merge_partials,
    cases=_merge_cases,
    reference=_merge_reference,
    forbidden=("softmax", "logsumexp"),
    hints=(
        "This is a softmax over the parts, applied to their outputs.",
        "Weights exp(lse - max lse), summed over parts; divide by the sum of the weights, or by 1 where that is 0.",
        "`w = torch.exp(lses - m)`, m as in stable_softmax along dim 0; `(w[..., None] * outs).sum(0) / total[:, None]`",
    ),
    wrong=(
        Wrong(
            "the plain mean of the parts",
            "A part whose keys score high must count more: weight it by exp(lse).",
            (
                "weights = torch.exp(lses - torch.where(largest == -math.inf, 0.0, largest))",
                "weights = torch.ones_like(lses)",
            ),
        ),
        Wrong(
            "weighted by the lse itself",
            "lse is a logarithm: take exp.",
            (
                "weights = torch.exp(lses - torch.where(largest == -math.inf, 0.0, largest))",
                "weights = lses.nan_to_num(neginf=0.0)",
            ),
        ),
        Wrong(
            "no maximum subtracted",
            "lse is as large as the scores: exp overflows.",
            ("torch.exp(lses - torch.where(largest == -math.inf, 0.0, largest))", "torch.exp(lses)"),
        ),
        Wrong(
            "one maximum for all rows",
            "A row far below the largest one of all has only weights of 0 then: take the maximum over the parts, row by row.",
            ("largest = lses.amax(dim=0)", "largest = lses.amax()"),
        ),
        Wrong(
            "not divided by the total",
            "The outputs were normalized within their parts; across parts that has to be done again.",
            (" / torch.where(total == 0, 1.0, total)[:, None]", ""),
        ),
        Wrong(
            "NaN for a row that saw nothing",
            "Where every part has -inf, the maximum is -inf too: use 0 in its place.",
            ("torch.where(largest == -math.inf, 0.0, largest)", "largest"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- tiles
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Causal attention, block by block; nothing as large as [length, length] is ever made.

    q, k, v: float32 [length, dim]
    block: keys at a time
    returns: float32 [length, dim]
    """
    length, dim = q.shape
    m = torch.full((length,), -math.inf)
    l, o = torch.zeros(length), torch.zeros(length, dim)
    rows = torch.arange(length)
    for start in range(0, length, block):
        columns = torch.arange(start, min(start + block, length))
        scores = q @ k[columns].T / math.sqrt(dim)
        scores = scores.masked_fill(columns > rows[:, None], -math.inf)
        m_new = torch.maximum(m, scores.amax(dim=1))
        m_use = torch.where(m_new == -math.inf, 0.0, m_new)
        weights, shrink = torch.exp(scores - m_use[:, None]), torch.exp(m - m_use)
        m, l, o = m_new, l * shrink + weights.sum(dim=1), o * shrink[:, None] + weights @ v[columns]
    return o / l[:, None]


class _Largest(TorchFunctionMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


class TooMuchMemory(RuntimeError):
    """An answer made a tensor as large as the matrix it should do without."""


def _run_tiled(answer: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    with _Largest() as largest:
        out = answer(q, k, v, block)
    length, dim = q.shape
    if largest.numel >= length * length and length > max(dim, block):
        raise TooMuchMemory(
            f"a tensor of {largest.numel} numbers was made; the {length} x {length} matrix has {length * length}"
        )
    return out


def _causal_reference(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    scores = q.double() @ k.double().T / math.sqrt(q.shape[1])
    scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -INF)
    return (scores.softmax(-1) @ v.double()).float()


def _tiled_cases(draw: Draw) -> Iterator[Case]:
    for label, length, dim, block, size in (
        ("one block", 8, 4, 8, 1.0),
        ("64 tokens in blocks of 16", 64, 8, 16, 1.0),
        ("37 tokens in blocks of 8", 37, 4, 8, 1.0),
        ("large scores", 40, 8, 10, 12.0),
        ("blocks of one", 8, 3, 1, 1.0),
    ):
        yield case(
            label, size * draw.normal(length, dim), size * draw.normal(length, dim), draw.normal(length, dim), block
        )
    yield case("scores around -200", draw.normal(12, 16) - 10, draw.normal(12, 16) + 5, draw.normal(12, 16), 5)


TILED = Exercise(
    id="attention.tiled",
    title="Attention without the matrix",
    difficulty=4,
    minutes=25,
    prerequisites=("attention.online_step", "attention.causal_mask"),
    spec="""\
Put the online step into a loop over blocks of keys (you may call your `online_step`). Start with m = -inf and sums of 0,
mask what lies in the future, and divide by `l` once at the very end. The result is that of plain causal attention,

```python
softmax(mask(q @ k.T / sqrt(dim))) @ v
```

not an approximation; but no tensor of `length × length` may appear on the way. The check measures that.""",
    answer=tiled_attention,
    cases=_tiled_cases,
    reference=_causal_reference,
    run=_run_tiled,
    forbidden=("softmax", "scaled_dot_product_attention", "logsumexp"),
    atol=1e-4,
    hints=(
        "What are the columns of the block that starts at `start`, and which rows may see them?",
        "For each block: scores of all rows against its keys, -inf where column > row, one online step. At the end o / l.",
        "`for start in range(0, length, block): cols = torch.arange(start, min(start + block, length))`; scores = q @ k[cols].T / sqrt(dim), masked where `cols > rows[:, None]`; online_step; finally `o / l[:, None]`.",
    ),
    wrong=(
        Wrong(
            "the whole matrix at once",
            "One block of all keys gives the right numbers and the N × N matrix with them: the point is to do without.",
            ("range(0, length, block)", "range(0, length, length)"),
            ("min(start + block, length)", "length"),
        ),
        Wrong(
            "the old sums are not rescaled",
            "When the maximum grows, l and o must shrink by exp(m_old - m_new).",
            ("torch.exp(m - m_use)\n", "torch.ones(length)\n"),
        ),
        Wrong(
            "the future is visible",
            "Mask the columns that come after the row.",
            ("scores = scores.masked_fill(columns > rows[:, None], -math.inf)", "pass"),
        ),
        Wrong(
            "the columns counted from the block's start",
            "Inside a block, column 0 is token `start`: compare positions in the whole sequence.",
            ("columns > rows[:, None]", "columns - start > rows[:, None]"),
        ),
        Wrong(
            "not divided by l",
            "o is a sum of exp(score) × value; it becomes an average only when divided by l.",
            ("return o / l[:, None]", "return o"),
        ),
        Wrong("no scale", "Divide the scores by sqrt(dim).", (" / math.sqrt(dim)", "")),
    ),
)


def attention_traffic(length: int, dim: int, itemsize: int) -> tuple[int, int]:
    """Bytes that one attention head moves between HBM and the chip, forward, at least.

    length: tokens, queries as well as keys; dim: of the head; itemsize: bytes of a number, also of scores
    returns: (standard, flash). Standard attention is three kernels: scores, softmax, product with the values; each reads
        its inputs from HBM and writes its output there. Flash attention is one kernel that reads q, k, v and writes out.
    """
    vectors, matrix = length * dim, length * length
    scores = 2 * vectors + matrix
    softmax = matrix + matrix
    product = matrix + vectors + vectors
    return (scores + softmax + product) * itemsize, 4 * vectors * itemsize


def _traffic_reference(length: int, dim: int, itemsize: int) -> tuple[int, int]:
    return 4 * itemsize * length * (length + dim), 4 * itemsize * length * dim


def _traffic_cases(draw: Draw) -> Iterator[Case]:
    yield case("1024 tokens, dim 64, 16 bits", 1024, 64, 2)
    yield case("10,000 tokens", 10_000, 128, 2)
    yield case("one token", 1, 64, 4)
    yield case("random", draw.random.randrange(10, 5000), draw.random.choice([32, 64, 80, 128]), 2)


TRAFFIC = Exercise(
    id="attention.traffic",
    title="Count the bytes",
    difficulty=2,
    minutes=10,
    spec="""\
Attention is slow because of what it moves. Count for one head, forward:

- kernel 1 reads q and k, writes the scores;
- kernel 2 reads the scores, writes the probabilities;
- kernel 3 reads the probabilities and v, writes the output.

Flash attention keeps scores and probabilities on the chip. Count K and V once here: that is the least it can move (the
lesson's 3.9x counts them again for each block of queries). Return the bytes of both.""",
    answer=attention_traffic,
    cases=_traffic_cases,
    reference=_traffic_reference,
    hints=(
        "How many times does a matrix of length × length cross the memory bus?",
        "Four times: scores written and read, probabilities written and read. q, k, v and the output cross once each.",
        "standard: (4·length² + 4·length·dim) · itemsize; flash: 4·length·dim · itemsize.",
    ),
    wrong=(
        Wrong(
            "written but never read back",
            "Each intermediate matrix is written by one kernel and read by the next: count both ways.",
            ("softmax = matrix + matrix", "softmax = 0"),
        ),
        Wrong(
            "numbers instead of bytes",
            "Each number takes itemsize bytes.",
            (" * itemsize, 4 * vectors * itemsize", ", 4 * vectors"),
        ),
        Wrong(
            "one of flash's four tensors forgotten",
            "Flash moves four tensors of length x dim: q, k and v in, the output back.",
            ("4 * vectors * itemsize", "3 * vectors * itemsize"),
        ),
        Wrong(
            "flash moves the matrix too",
            "The scores never leave the chip: flash moves q, k, v and out.",
            ("4 * vectors * itemsize", "(4 * vectors + matrix) * itemsize"),
        ),
        Wrong(
            "the output forgotten",
            "The result has to be written as well.",
            ("product = matrix + vectors + vectors", "product = matrix + vectors"),
            ("4 * vectors * itemsize", "3 * vectors * itemsize"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- Triton
@triton.jit
def softmax_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """Softmax of one row per program.

    x_ptr, out_ptr: float32 [rows, columns], contiguous; program i works on row i
    columns: length of a row; BLOCK: the next power of two, the program's width
    """
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + offsets, mask=offsets < columns, other=-float("inf"))
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * columns + offsets, weights / tl.sum(weights, axis=0), mask=offsets < columns)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _launch_softmax(kernel: Any, x: Tensor) -> dict[str, Any]:
    """The result, and what the kernel touched that it should not have."""
    rows, columns = x.shape
    return launched(kernel, (rows,), torch.empty_like(x), x, ..., columns, BLOCK=_next_power_of_2(columns))


def _launch_softmax_reference(x: Tensor) -> dict[str, Any]:
    return launched_reference(x.double().softmax(-1).float())


def _triton_softmax_cases(draw: Draw) -> Iterator[Case]:
    yield case("2 rows of 8", draw.normal(2, 8))
    yield case("3 rows of 5: the program is wider than the row", draw.normal(3, 5))
    yield case("scores around 500", 500 + 10 * draw.normal(2, 12))
    yield case("all negative, 33 columns", -5 - draw.uniform(4, 33))
    yield case("scores around -300, 7 columns", -300 + draw.normal(2, 7))
    yield case("one column", draw.normal(3, 1))


TRITON_SOFTMAX = Exercise(
    id="attention.triton_softmax",
    title="Your first kernel: softmax in Triton",
    difficulty=4,
    minutes=25,
    prerequisites=("attention.stable_softmax",),
    spec="""\
One program per row. In torch, program `row` does

```python
out[row] = softmax(x[row])
```

Triton's blocks have sizes that are powers of two; rows do not. Load with a mask, and choose what stands in for the missing
numbers so that it changes neither the maximum nor the sum. Store with the mask too: the check runs the kernel interpreted,
its programs in shuffled order, and watches every number that it reads and writes.

All you need: `tl.program_id(0)`, `tl.arange(0, BLOCK)`, `tl.load(pointers, mask=…, other=…)`, `tl.max`, `tl.exp`, `tl.sum`,
`tl.store(pointers, values, mask=…)`. A pointer plus a block of offsets is a block of pointers.""",
    answer=softmax_kernel,
    cases=_triton_softmax_cases,
    reference=_launch_softmax_reference,
    run=_launch_softmax,
    forbidden=("softmax",),
    hints=(
        "Which number has exp(number) = 0?",
        "`tl.load(pointers, mask=offsets < columns, other=-float('inf'))`, then maximum, exp, sum, and a masked store.",
        "`row = tl.program_id(0)`; `offsets = tl.arange(0, BLOCK)`; pointers are `x_ptr + row * columns + offsets`; `w = tl.exp(x - tl.max(x, axis=0))`; store `w / tl.sum(w, axis=0)`.",
    ),
    wrong=(
        Wrong(
            "the maximum taken with zeros in the missing places",
            "In a row far below 0 the filling is the largest number, and exp of all others vanishes: 0/0. Fill with -inf.",
            ('other=-float("inf"))', "other=0.0)"),
            ("tl.exp(x - tl.max(x, axis=0))", "tl.where(offsets < columns, tl.exp(x - tl.max(x, axis=0)), 0.0)"),
        ),
        Wrong(
            "the missing numbers filled with 0",
            "exp(0 - max) is not 0: the filling joins the sum. Fill with -inf.",
            ('other=-float("inf")', "other=0.0"),
        ),
        Wrong(
            "no mask on the store",
            "The last programs write beyond their row, into the next row or past the end.",
            ("tl.sum(weights, axis=0), mask=offsets < columns)", "tl.sum(weights, axis=0))"),
        ),
        Wrong(
            "rows BLOCK apart",
            "The rows are `columns` apart in memory; BLOCK is only the program's width.",
            ("row * columns", "row * BLOCK"),
        ),
        Wrong("no maximum subtracted", "exp overflows beyond 88.", ("tl.exp(x - tl.max(x, axis=0))", "tl.exp(x)")),
        Wrong(
            "every program on row 0", "tl.program_id(0) says which row is yours.", ("row = tl.program_id(0)", "row = 0")
        ),
    ),
)


@triton.jit
def flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, length, scale, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Causal attention; program i makes rows i * BLOCK_M … of the result.

    q_ptr, k_ptr, v_ptr, out_ptr: float32 [length, DIM], contiguous; DIM, BLOCK_M, BLOCK_N are powers of two, at least 16
    scale: to multiply the scores with
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, DIM)
    q = tl.load(q_ptr + rows[:, None] * DIM + dims[None, :], mask=rows[:, None] < length, other=0.0)
    m = tl.full([BLOCK_M], -1e30, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(0, length, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + columns[:, None] * DIM + dims[None, :], mask=columns[:, None] < length, other=0.0)
        v = tl.load(v_ptr + columns[:, None] * DIM + dims[None, :], mask=columns[:, None] < length, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = (columns[None, :] <= rows[:, None]) & (columns[None, :] < length)
        scores = tl.where(visible, scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        weights = tl.exp(scores - m_new[:, None])
        shrink = tl.exp(m - m_new)
        l = l * shrink + tl.sum(weights, axis=1)
        o = o * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
        m = m_new
    tl.store(out_ptr + rows[:, None] * DIM + dims[None, :], o / l[:, None], mask=rows[:, None] < length)


def _launch_flash(kernel: Any, q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int) -> dict[str, Any]:
    """The result, and what the kernel touched that it should not have."""
    length, dim = q.shape
    grid, sizes = (-(-length // block_m),), {"DIM": dim, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return launched(kernel, grid, torch.empty_like(q), q, k, v, ..., length, 1 / math.sqrt(dim), **sizes)


def _launch_flash_reference(q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int) -> dict[str, Any]:
    return launched_reference(_causal_reference(q, k, v))


def _flash_cases(draw: Draw) -> Iterator[Case]:
    for label, length, dim, block_m, block_n, size in (
        ("one tile", 16, 16, 16, 16, 1.0),
        ("32 tokens, tiles of 16", 32, 16, 16, 16, 1.0),
        ("41 tokens: the tiles do not fit", 41, 16, 16, 32, 1.0),
        ("large scores", 32, 32, 16, 16, 15.0),
    ):
        yield case(
            label,
            size * draw.normal(length, dim),
            size * draw.normal(length, dim),
            draw.normal(length, dim),
            block_m,
            block_n,
        )
    yield case("scores around -200", draw.normal(16, 16) - 10, draw.normal(16, 16) + 5, draw.normal(16, 16), 16, 16)


TRITON_FLASH = Exercise(
    id="attention.triton_flash",
    title="Flash attention in Triton",
    difficulty=5,
    minutes=45,
    prerequisites=("attention.tiled", "attention.triton_softmax"),
    spec="""\
The same loop as in `attention.tiled`, as a kernel: one program holds BLOCK_M rows of q, walks over the keys in tiles of
BLOCK_N, and keeps m, l and o in registers. Only q, k, v and out touch memory.

`tl.dot(a, b, input_precision="ieee")` multiplies matrices (without the option a GPU rounds float32 to 10 bits);
`tl.trans` transposes; `tl.where(visible, scores, -float("inf"))` masks; `tl.full` and `tl.zeros` make m, l and o. A vector
of rows meets a matrix as `m[:, None]`. Start m at -1e30 rather than -inf: then no NaN can
arise. The length need not be a multiple of the tiles.""",
    answer=flash_kernel,
    cases=_flash_cases,
    reference=_launch_flash_reference,
    run=_launch_flash,
    atol=1e-4,
    hints=(
        "Write the torch loop first with rows instead of all queries; then translate line by line.",
        "rows = program_id · BLOCK_M + arange; in the loop columns = start + arange; mask loads by `< length`, scores by `column <= row`; one online step; store o / l.",
        'The loop body: load k and v; `scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale`; mask; `m_new = tl.maximum(m, tl.max(scores, axis=1))`; weights, shrink; update l, o, m.',
    ),
    wrong=(
        Wrong(
            "the old sums are not rescaled",
            "When the maximum grows, l and o must shrink by exp(m_old - m_new).",
            ("shrink = tl.exp(m - m_new)", "shrink = tl.full([BLOCK_M], 1.0, tl.float32)"),
        ),
        Wrong(
            "the future is visible",
            "Mask the columns that come after the row.",
            ("(columns[None, :] <= rows[:, None]) & (columns[None, :] < length)", "columns[None, :] < length"),
        ),
        Wrong(
            "the tiles before the diagonal left out",
            "A row sees everything before it: the loop over the keys begins at 0, not at the program's own rows.",
            ("range(0, length, BLOCK_N)", "range(tl.program_id(0) * BLOCK_M, length, BLOCK_N)"),
        ),
        Wrong(
            "the running maximum is never kept",
            "m must carry over to the next tile: m = m_new.",
            ("        m = m_new\n", ""),
        ),
        Wrong(
            "the maximum subtracted along the wrong axis",
            "`scores - m_new` lines m_new up with the columns; it belongs to the rows: `m_new[:, None]`.",
            ("tl.exp(scores - m_new[:, None])", "tl.exp(scores - m_new[None, :])"),
        ),
        Wrong(
            "no scale",
            "Multiply the scores with scale.",
            (' input_precision="ieee") * scale', ' input_precision="ieee")'),
        ),
        Wrong("not divided by l", "o is a sum; the average needs the division at the end.", ("o / l[:, None]", "o")),
        Wrong(
            "no mask on the store",
            "The last program's rows reach past the end of the result.",
            ("o / l[:, None], mask=rows[:, None] < length)", "o / l[:, None])"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- the real model
def model_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention as a language model calls it.

    q: [batch, heads, q_len, dim]; k, v: [batch, kv_heads, kv_len, dim]; the queries are the last q_len tokens
    scale: to multiply the scores with
    returns: [batch, heads, q_len, dim]; causal, key/value head h // (heads // kv_heads) for query head h
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    q_len, kv_len = q.shape[2], k.shape[2]
    scores = q @ k.transpose(2, 3) * scale
    visible = torch.arange(kv_len) <= torch.arange(q_len)[:, None] + kv_len - q_len
    return scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v


def _attend(attention: Callable[..., Tensor], *args: Any) -> Any:
    """The answer on tensors q, k, v and a scale; or a prompt and a number of tokens, and what the model says then."""
    return attention(*args) if len(args) == 4 else _generate(attention, *args)


def _attend_reference(*args: Any) -> Any:
    if len(args) == 2:
        from optinfer.course.exercises.real_model import plain_text

        return {"text": plain_text(*args)}
    q, k, v, scale = args
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1))
    scores = (scores * scale).masked_fill(~_mask_reference(q.shape[2], k.shape[2]), -INF)
    return (scores.softmax(-1) @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)).float()


def _generate(attention: Callable[..., Tensor], prompt: str, new_tokens: int) -> dict[str, str]:
    """What the default model says to a prompt, with this attention in all its layers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from optinfer.course.exercises.real_model import default_model, greedy

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> Any:
        return attention(query, key, value, scaling).transpose(1, 2).contiguous(), None

    model, tokenizer = default_model()
    AttentionInterface.register("exercise", forward)
    AttentionMaskInterface.register("exercise", lambda *args, **kwargs: None)
    model.set_attn_implementation("exercise")
    try:
        return {"text": greedy(model, tokenizer, prompt, new_tokens)}
    finally:
        model.set_attn_implementation("sdpa")


def _model_attention_cases(draw: Draw) -> Iterator[Case]:
    def tensors(heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, batch: int = 1) -> list[Tensor]:
        keys = [draw.normal(batch, kv_heads, kv_len, dim) for _ in range(2)]
        return [draw.normal(batch, heads, q_len, dim), *keys]

    yield case("a prompt of 5, as many key heads as query heads", *tensors(2, 2, 5, 5, 8), 8**-0.5)
    yield case("a prompt of 7, 6 query heads and 2 key heads", *tensors(6, 2, 7, 7, 8), 8**-0.5)
    yield case("one new token after 9", *tensors(6, 2, 1, 10, 8), 8**-0.5)
    yield case("three new tokens after 4, two sequences, another scale", *tensors(4, 2, 3, 7, 16, batch=2), 0.4)
    yield slow_case("the real model, a short prompt", "What is a GPU?", 12)
    yield slow_case("the real model, another", "Name three colors of the rainbow.", 8)


MODEL_ATTENTION = Exercise(
    id="attention.in_the_model",
    title="Your attention, generating text",
    difficulty=4,
    minutes=20,
    prerequisites=("attention.grouped_heads", "attention.causal_mask"),
    spec="""\
Plug your own attention into the real model. transformers calls it in each of 30 layers: with the whole prompt at first,
then with one new query and all keys of the cache. Use everything so far: grouped heads, the mask aligned at the end, the
scale. The check tries your function on small tensors, then lets the model talk with it and compares the text with what it
says otherwise.""",
    answer=model_attention,
    cases=_model_attention_cases,
    reference=_attend_reference,
    run=_attend,
    rtol=1e-3,
    forbidden=("scaled_dot_product_attention",),
    model=True,
    limit=60,
    hints=(
        "The shapes differ between the prompt (q_len = kv_len) and decoding (q_len = 1): write it for both.",
        "repeat_interleave k and v along dim 1, scores times scale, mask with kv_len - q_len, softmax, times v.",
        "As attention.grouped_heads with one more dimension in front, and `visible` from attention.causal_mask.",
    ),
    wrong=(
        Wrong(
            "0 1 2 0 1 2 instead of 0 0 0 1 1 1",
            "Neighboring query heads share a key head: repeat_interleave, not repeat.",
            (
                "k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)",
                "k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)",
            ),
        ),
        Wrong(
            "a mask aligned at the top left",
            "While decoding, the one query is the last token; aligned at the top it sees only the first key.",
            (" + kv_len - q_len", ""),
        ),
        Wrong(
            "its own scale instead of the given one",
            "Some models scale by something else than 1/sqrt(dim): use what you are given.",
            ("* scale", "/ math.sqrt(q.shape[-1])"),
        ),
        Wrong(
            "the future is visible in the prompt",
            "The model was trained never to see later tokens: its keys mean nothing to earlier queries.",
            ("scores.masked_fill(~visible, -math.inf)", "scores"),
        ),
    ),
)

EXERCISES = (
    SOFTMAX,
    CAUSAL_MASK,
    GROUPED,
    ONLINE,
    MERGE,
    TILED,
    TRAFFIC,
    TRITON_SOFTMAX,
    TRITON_FLASH,
    *testing.ATTENTION,
    MODEL_ATTENTION,
)
