"""Exercises on formats, caches, traffic and trees of today, by chapter: each chapter's module takes its own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from optinfer.course.exercise import Case, Draw, Exercise, Wrong, case


# --------------------------------------------------------------------------------------------------- formats
def mx_scale(block: Tensor) -> int:
    """The E8M0 byte of a block of MXFP4 weights, as the OCP specification computes it.

    block: 32 numbers, not all zero
    returns: 127 + exponent of the largest magnitude - exponent of the largest E2M1 value (6 = 1.5 * 2**2)
    """
    exponent = torch.frexp(block.abs().max()).exponent.item() - 1
    return 127 + exponent - 2


def _mx_reference(block: Tensor) -> int:
    largest, exponent = float(block.abs().max()), 0
    while largest >= 2:
        largest, exponent = largest / 2, exponent + 1
    while largest < 1:
        largest, exponent = largest * 2, exponent - 1
    return 127 + exponent - 2


def _mx_cases(draw: Draw) -> Iterator[Case]:
    yield case("typical weights", draw.normal(32) * 0.02)
    yield case("a power of two is its own exponent", torch.cat([torch.tensor([4.0]), draw.uniform(31)]))
    yield case("the largest is negative", torch.cat([torch.tensor([-13.0]), draw.uniform(31)]))
    yield case("just below a power of two", torch.cat([torch.tensor([7.99]), draw.uniform(31)]))
    yield case("tiny", draw.normal(32) * 1e-6)


MX_SCALE = Exercise(
    id="quantization.mx_scale",
    title="A scale that is only an exponent",
    difficulty=2,
    minutes=10,
    spec="""\
MXFP4 gives 32 weights one byte of scale, E8M0: the byte `e` means `2 ** (e - 127)`. The specification takes the exponent of
the block's largest magnitude (that of 6.5 is 2, because 6.5 = 1.625 · 2²) and subtracts the exponent of the largest value that
E2M1 has. That is 6 = 1.5 · 2², so 2. Return the byte.""",
    answer=mx_scale,
    cases=_mx_cases,
    reference=_mx_reference,
    hints=(
        "Which power of two is just below, or at, the largest magnitude?",
        "`torch.frexp` writes x as m · 2**e with m in [0.5, 1): its exponent is one more than the one you want.",
        "`127 + (torch.frexp(block.abs().max()).exponent.item() - 1) - 2`",
    ),
    wrong=(
        Wrong("the largest, with its sign", "A block's largest magnitude may be a negative number.", (".abs()", "")),
        Wrong(
            "frexp's own exponent",
            "frexp's mantissa lies in [0.5, 1): its exponent is one too high for 1.xxx · 2**e.",
            (".item() - 1", ".item()"),
        ),
        Wrong(
            "the power of two above",
            "6.5 is 1.625 · 2**2: its exponent is that of the power of two below it, or equal to it. Round down.",
            ("torch.frexp(block.abs().max()).exponent.item() - 1", "block.abs().max().log2().ceil().int().item()"),
        ),
        Wrong(
            "the nearest power of two",
            "7.99 is 1.9975 · 2**2: its exponent is 2, however near 8 is. Round the logarithm down.",
            ("torch.frexp(block.abs().max()).exponent.item() - 1", "block.abs().max().log2().round().int().item()"),
        ),
        Wrong(
            "the element's exponent forgotten",
            "Divided by its own power of two alone, a block would end at 2, and E2M1 goes to 6.",
            ("exponent - 2", "exponent"),
        ),
        Wrong("no bias", "The byte is biased, as in a float: 127 means 2**0.", ("127 + ", "")),
    ),
)


def nvfp4_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of an NVFP4 matrix.

    weight: float32 [rows, columns], columns a multiple of 16
    returns: (scales, one per 16 columns, as the numbers that E4M3 stores, float32; tensor scale, float32 [])
    """
    tensor_scale = 448 * 6 / weight.abs().max()
    blocks = weight.unflatten(1, (-1, 16)).abs().amax(-1)
    return (blocks / 6 * tensor_scale).to(torch.float8_e4m3fn).float(), tensor_scale


def _nvfp4_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    tensor_scale = 2688 / weight.abs().max()
    rows = [[float(r[i : i + 16].abs().max()) / 6 for i in range(0, len(r), 16)] for r in weight]
    return (torch.tensor(rows) * tensor_scale).to(torch.float8_e4m3fn).float(), tensor_scale


def _nvfp4_cases(draw: Draw) -> Iterator[Case]:
    yield case("typical weights", draw.normal(4, 64) * 0.02)
    yield case("one row much larger", draw.normal(3, 32) * torch.tensor([[1.0], [30.0], [0.1]]))
    yield case("large weights", draw.normal(2, 48) * 500)


NVFP4_SCALES = Exercise(
    id="quantization.nvfp4_scales",
    title="Two scales, one above the other",
    difficulty=3,
    minutes=15,
    spec="""\
NVFP4 stores the scale of 16 weights in E4M3, which ends at 448 and is coarse near zero. So scales are stored *times* one number
for the tensor, chosen such that the tensor's largest weight gets the largest scale: `448 * 6 / absmax`. A block's scale is its
absmax / 6 times that number, rounded to E4M3 (`torch.float8_e4m3fn`).""",
    answer=nvfp4_scales,
    cases=_nvfp4_cases,
    reference=_nvfp4_reference,
    hints=(
        "Compute the tensor's number first; then each block's absmax.",
        "Without rounding, scale / tensor_scale must be absmax / 6 of the block.",
        "`(weight.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * tensor_scale).to(torch.float8_e4m3fn).float()`",
    ),
    wrong=(
        Wrong(
            "one scale for a row",
            "Sixteen columns share a scale, not the whole row.",
            (".amax(-1)\n", ".amax((-2, -1), keepdim=True)[..., 0].expand(-1, weight.shape[1] // 16)\n"),
        ),
        Wrong(
            "scales not rounded",
            "One byte holds three bits of mantissa: what is stored is rounded.",
            (".to(torch.float8_e4m3fn).float(), tensor_scale", ", tensor_scale"),
        ),
        Wrong(
            "divided instead of multiplied",
            "Stored are scales *times* the tensor's number, so that the largest is 448.",
            ("/ 6 * tensor_scale", "/ 6 / tensor_scale"),
        ),
        Wrong(
            "without the values' own range",
            "The largest code means 6, not 1: a block's scale is absmax / 6.",
            ("blocks / 6 *", "blocks *"),
            ("448 * 6 /", "448 /"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- caches
def sequence_bytes(layers: list[str], length: int, window: int, per_token: int, state: int) -> int:
    """Bytes that a sequence keeps in a model whose layers keep different things.

    layers: kind of each layer, "full", "sliding" or "linear"; per_token: bytes of a token in a full or sliding layer;
    state: bytes of a linear layer's state
    """
    total = 0
    for kind in layers:
        if kind == "full":
            total += length * per_token
        elif kind == "sliding":
            total += min(length, window) * per_token
        else:
            total += state
    return total


def _kinds_reference(layers: list[str], length: int, window: int, per_token: int, state: int) -> int:
    kept = {"full": length * per_token, "sliding": sorted((length, window))[0] * per_token, "linear": state}
    return sum(kept[kind] for kind in layers)


def _kinds_cases(draw: Draw) -> Iterator[Case]:
    yield case("Gemma-like, a short text", ["sliding"] * 5 + ["full"], 100, 1024, 8192, 0)
    yield case("Gemma-like, a long text", ["sliding"] * 5 + ["full"], 100_000, 1024, 8192, 0)
    yield case("GPT-OSS-like, at the window", ["sliding", "full"] * 18, 128, 128, 2048, 0)
    yield case("Qwen3-Next-like", (["linear"] * 3 + ["full"]) * 12, 4096, 0, 2048, 2_162_688)
    yield case("only states", ["linear"] * 4, 9, 0, 100, 77)


LAYER_KINDS = Exercise(
    id="kv_cache.layer_kinds",
    title="A cache of many kinds",
    difficulty=2,
    minutes=10,
    spec="""\
Full layers keep every token, sliding ones the last `window`, linear ones a state of fixed size. Count a sequence's bytes.""",
    answer=sequence_bytes,
    cases=_kinds_cases,
    reference=_kinds_reference,
    hints=(
        "What does each kind keep of 10 tokens? Of 10,000?",
        "Add up over the layers: all tokens, at most `window` tokens, or the state.",
        "`min(length, window) * per_token` for a sliding layer, and `state`, whatever the length, for a linear one.",
    ),
    wrong=(
        Wrong(
            "every layer keeps everything",
            "A sliding layer forgets what left its window.",
            ("min(length, window)", "length"),
        ),
        Wrong(
            "a full window from the start",
            "A text shorter than the window fills only part of it.",
            ("min(length, window)", "window"),
        ),
        Wrong(
            "a state per token",
            "A linear layer's state has one size, whatever the length.",
            ("total += state", "total += state * length"),
        ),
        Wrong(
            "states for free",
            "A state is fixed, not absent: for short texts it is the largest part.",
            ("total += state", "total += 0"),
        ),
    ),
)


def latent_scores(q: Tensor, latent: Tensor, w_k: Tensor) -> Tensor:
    """Scores of every head with every token, without forming a key.

    q: [heads, dim], of one new token; latent: [length, rank]; w_k: [heads, dim, rank], so that key = w_k[h] @ latent[t]
    returns: [heads, length]
    """
    absorbed = torch.einsum("hd,hdr->hr", q, w_k)
    return absorbed @ latent.T


def _latent_reference(q: Tensor, latent: Tensor, w_k: Tensor) -> Tensor:
    keys = torch.stack([latent @ matrix.T for matrix in w_k])
    return torch.stack([key @ query for key, query in zip(keys, q)])


def _latent_cases(draw: Draw) -> Iterator[Case]:
    for label, heads, dim, rank, length in [
        ("four heads", 4, 8, 6, 10),
        ("one head", 1, 4, 3, 5),
        ("square", 5, 5, 5, 5),
        ("one token", 3, 8, 2, 1),
    ]:
        yield case(label, draw.normal(heads, dim), draw.normal(length, rank), draw.normal(heads, dim, rank))


ABSORB = Exercise(
    id="kv_cache.absorb",
    title="A key that is never formed",
    difficulty=3,
    minutes=15,
    spec="""\
In latent attention each token leaves one latent, and head h's key is `w_k[h] @ latent[t]`. The score is `q[h] · key`. Compute
all scores by moving the matrix to the query's side: (q · W c) = (Wᵀ q) · c.""",
    answer=latent_scores,
    cases=_latent_cases,
    reference=_latent_reference,
    hints=(
        "What shape has Wᵀ q of one head?",
        "One vector of `rank` numbers per head; then a product with all latents.",
        '`torch.einsum("hd,hdr->hr", q, w_k) @ latent.T`',
    ),
    wrong=(
        Wrong(
            "all heads share a matrix",
            "Each head has its own matrix; only the latent is shared.",
            ("q, w_k)", "q, w_k[:1].expand_as(w_k))"),
        ),
        Wrong(
            "heads added up",
            "Every head has scores of its own.",
            ("hdr->hr", "hdr->r"),
            ("absorbed @ latent.T", "(absorbed @ latent.T).expand(len(q), -1)"),
        ),
        Wrong(
            "scaled twice",
            "The scale is applied once, with the softmax; scores here are plain products.",
            ("absorbed @ latent.T", "absorbed @ latent.T / q.shape[1] ** 0.5"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- trees
def tree_mask(parents: list[int]) -> list[list[bool]]:
    """Who sees whom among the nodes of a draft tree.

    parents: index of each node's parent, always a smaller one; -1: the node follows the text itself
    returns: mask[i][j]: node i sees node j, which is itself or one of its ancestors
    """
    mask = []
    for node, parent in enumerate(parents):
        row = list(mask[parent]) if parent >= 0 else [False] * len(parents)
        row[node] = True
        mask.append(row)
    return mask


def _mask_reference(parents: list[int]) -> list[list[bool]]:
    def line(node: int) -> set[int]:
        return set() if node < 0 else {node} | line(parents[node])

    return [[j in line(i) for j in range(len(parents))] for i in range(len(parents))]


def _mask_cases(draw: Draw) -> Iterator[Case]:
    yield case("a chain", [-1, 0, 1, 2])
    yield case("two first choices", [-1, -1, 0, 1])
    yield case("a comb", [-1, 0, 1, -1, 0, 1])
    yield case("random", [draw.random.randrange(-1, i) if i else -1 for i in range(9)])
    yield case("no drafts", [])


TREE_MASK = Exercise(
    id="speculative.tree_mask",
    title="Who may see whom",
    difficulty=2,
    minutes=10,
    spec="""\
All nodes of a draft tree are checked in one pass. A node must see itself and its ancestors, as if the text had gone that way,
and no node of another branch.""",
    answer=tree_mask,
    cases=_mask_cases,
    reference=_mask_reference,
    hints=(
        "What does a node see that its parent does not?",
        "Its parent's row, and itself. Parents come first, so their rows are there already.",
        "`row = list(mask[parent]) if parent >= 0 else [False] * len(parents)`; `row[node] = True`.",
    ),
    wrong=(
        Wrong(
            "a causal mask",
            "Earlier nodes of other branches are other texts: they must not be seen.",
            (
                "row = list(mask[parent]) if parent >= 0 else [False] * len(parents)",
                "row = [j < node for j in range(len(parents))]",
            ),
        ),
        Wrong(
            "the parent only",
            "Grandparents belong to the text, too.",
            (
                "list(mask[parent]) if parent >= 0 else [False] * len(parents)",
                "[j == parent for j in range(len(parents))]",
            ),
        ),
        Wrong(
            "blind to itself",
            "A token attends to itself: its own key is part of its context.",
            ("row[node] = True", "row[node] = False"),
        ),
    ),
)


def accept_tree(tokens: list[int], parents: list[int], target: list[int]) -> list[int]:
    """The tokens that a pass over a draft tree brings, greedily.

    tokens, parents: of the nodes, -1: the node follows the text; children of one node are different tokens
    target: what the target says: target[0] behind the text, target[i + 1] behind node i
    returns: the accepted tokens, and the target's own token behind them
    """
    at, out = -1, []
    while True:
        out.append(target[at + 1])
        children = [i for i, parent in enumerate(parents) if parent == at and tokens[i] == out[-1]]
        if not children:
            return out
        at = children[0]


def _accept_reference(tokens: list[int], parents: list[int], target: list[int]) -> list[int]:
    def walk(at: int) -> list[int]:
        said = target[at + 1]
        for i, (token, parent) in enumerate(zip(tokens, parents)):
            if (token, parent) == (said, at):
                return [said, *walk(i)]
        return [said]

    return walk(-1)


def _accept_cases(draw: Draw) -> Iterator[Case]:
    yield case("the second choice is right", [5, 6, 7], [-1, -1, 1], [6, 0, 7, 9])
    yield case("all of a chain", [1, 2], [-1, 0], [1, 2, 3])
    yield case("nothing right", [1, 2], [-1, 0], [9, 2, 3])
    yield case("the same token on two branches", [5, 6, 6, 8], [-1, -1, 0, 1], [6, 1, 8, 2, 9])
    yield case("the right token on the wrong branch", [1, 2, 4], [-1, -1, 0], [2, 4, 4, 8])
    yield case("no drafts", [], [], [7])


ACCEPT_TREE = Exercise(
    id="speculative.accept_tree",
    title="Down the tree",
    difficulty=2,
    minutes=15,
    spec="""\
Start at the text. If one of the children is the token that the target says there, walk to it and go on. Where no child is,
the target's token ends the pass: it is right anyway.""",
    answer=accept_tree,
    cases=_accept_cases,
    reference=_accept_reference,
    hints=(
        "Behind which node are you, and what does the target say there?",
        "Look for a node whose parent is where you stand and whose token is the target's.",
        "`[i for i, parent in enumerate(parents) if parent == at and tokens[i] == out[-1]]`",
    ),
    wrong=(
        Wrong(
            "any node of that token",
            "A token on another branch continues another text: its parent must be where you stand.",
            ("parent == at and tokens[i] == out[-1]", "i > at and tokens[i] == out[-1]"),
        ),
        Wrong(
            "the first child, right or wrong",
            "A child is accepted only if it is what the target says.",
            ("parent == at and tokens[i] == out[-1]", "parent == at"),
        ),
        Wrong(
            "the target's last token dropped",
            "The pass computed what follows the accepted tokens: one more token for free.",
            ("            return out\n", "            return out[:-1]\n"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- traffic
def goodput(requests: list[tuple[float, float, float, int]], ttft: float, tpot: float) -> float:
    """Requests per second whose promise was kept.

    requests: (arrival, first token, end, tokens) of each, in seconds; ttft: promised seconds from arrival to first token;
    tpot: promised mean seconds between tokens, after the first
    """
    kept = 0
    for arrival, first, end, tokens in requests:
        between = (end - first) / (tokens - 1) if tokens > 1 else 0.0
        kept += first - arrival <= ttft and between <= tpot
    return kept / (max(r[2] for r in requests) - min(r[0] for r in requests))


def _goodput_reference(requests: list[tuple[float, float, float, int]], ttft: float, tpot: float) -> float:
    good = [r for r in requests if r[1] - r[0] <= ttft and (r[3] < 2 or r[2] - r[1] <= tpot * (r[3] - 1))]
    return len(good) / (sorted(r[2] for r in requests)[-1] - sorted(r[0] for r in requests)[0])


def _goodput_cases(draw: Draw) -> Iterator[Case]:
    yield case("all in time", [(0.0, 0.5, 1.5, 11), (1.0, 1.25, 2.0, 4)], 1.0, 0.3)
    yield case("one waits too long", [(0.0, 0.5, 1.5, 11), (0.0, 3.0, 4.0, 11)], 1.0, 0.2)
    yield case("one is slow between tokens", [(2.0, 2.5, 3.5, 11), (2.0, 2.5, 12.5, 11)], 1.0, 0.2)
    yield case(
        "eleven tokens in 1.1 seconds have ten gaps of 0.11", [(0.0, 0.5, 1.6, 11), (0.0, 0.5, 1.0, 11)], 1.0, 0.105
    )
    yield case("kept to the dot", [(0.0, 1.0, 2.0, 5)], 1.0, 0.25)
    yield case("two tokens, far apart", [(0.0, 0.5, 5.5, 2), (0.0, 0.5, 1.0, 2)], 1.0, 1.0)
    yield case("one token has no between", [(0.0, 0.5, 0.5, 1)], 1.0, 0.01)
    yield case("nobody", [(0.0, 5.0, 6.0, 3), (1.0, 8.0, 9.0, 3)], 1.0, 0.1)


GOODPUT = Exercise(
    id="serving.goodput",
    title="Kept promises per second",
    difficulty=2,
    minutes=10,
    spec="""\
Throughput counts all requests; goodput those that were served as promised: the first token soon enough, *and* the others fast
enough. Divide by the time from the first arrival to the last end.""",
    answer=goodput,
    cases=_goodput_cases,
    reference=_goodput_reference,
    hints=(
        "When is a request's first promise kept? When its second?",
        "11 tokens have 10 gaps. A request of one token has none.",
        "`(end - first) / (tokens - 1)` seconds per token; divide the count by `last end - first arrival`.",
    ),
    wrong=(
        Wrong(
            "either promise",
            "Both must be kept: a fast start and then a crawl is no good service.",
            ("<= ttft and between", "<= ttft or between"),
        ),
        Wrong("gaps counted as tokens", "11 tokens have 10 gaps between them.", ("(tokens - 1)", "tokens")),
        Wrong(
            "everybody counted",
            "That is throughput.",
            ("kept += first - arrival <= ttft and between <= tpot", "kept += 1"),
        ),
        Wrong(
            "waiting not counted",
            "Users wait from their arrival on, not from when they are served.",
            ("first - arrival <= ttft", "0 <= ttft"),
        ),
    ),
)


def ring_bytes(tokens: int, hidden: int, layers: int, itemsize: int, processes: int) -> int:
    """Bytes that each process sends in a forward pass with tensor parallelism, by all-reduces around a ring.

    returns: for two all-reduces per layer of [tokens, hidden] numbers, which the number of processes divides
    """
    message = tokens * hidden * itemsize
    return 2 * layers * 2 * (processes - 1) * message // processes


def _ring_reference(tokens: int, hidden: int, layers: int, itemsize: int, processes: int) -> int:
    piece = tokens * hidden * itemsize // processes
    rounds = [1 for _ in range(processes - 1)] * 2  # pieces are added up, then handed around
    return sum(piece for _ in range(2 * layers) for _ in rounds)


def _ring_cases(draw: Draw) -> Iterator[Case]:
    yield case("SmolLM2 over two, one token, fp32", 1, 576, 30, 4, 2)
    yield case("Llama-3-70B over eight, bf16", 1, 8192, 80, 2, 8)
    yield case("a prompt of 512 tokens", 512, 4096, 32, 2, 4)
    yield case("one process sends nothing", 7, 64, 3, 2, 1)


RING_BYTES = Exercise(
    id="serving.ring_bytes",
    title="What parallelism sends",
    difficulty=2,
    minutes=10,
    spec="""\
After attention and after the MLP, processes add up their [tokens, hidden] outputs: an all-reduce. Around a ring of n
processes, a message is cut into n pieces. In n - 1 rounds everybody passes one piece on and adds what comes; in n - 1 more
rounds the finished pieces go around. How many bytes does one process send in all layers?""",
    answer=ring_bytes,
    cases=_ring_cases,
    reference=_ring_reference,
    hints=(
        "How many pieces does a process send for one all-reduce, and how large is a piece?",
        "2 (n - 1) pieces of 1/n of the message each; two all-reduces per layer.",
        "`2 * layers * 2 * (processes - 1) * tokens * hidden * itemsize // processes`",
    ),
    wrong=(
        Wrong(
            "half of what is sent",
            "A layer has two all-reduces, after attention and after the MLP; and in each the pieces go around twice.",
            ("2 * layers * 2", "layers * 2"),
        ),
        Wrong(
            "a whole message to everybody else",
            "That sends n / 2 times as much as the ring does: pieces suffice.",
            ("2 * (processes - 1) * message // processes", "(processes - 1) * message"),
        ),
        Wrong(
            "whole messages",
            "What one process passes on in a round is a piece, 1/n of the message.",
            ("message // processes", "message"),
        ),
    ),
)

QUANTIZATION = (MX_SCALE, NVFP4_SCALES)
KV_CACHE = (LAYER_KINDS, ABSORB)
SPECULATIVE = (TREE_MASK, ACCEPT_TREE)
SERVING = (GOODPUT, RING_BYTES)
EXERCISES = (*QUANTIZATION, *KV_CACHE, *SPECULATIVE, *SERVING)
