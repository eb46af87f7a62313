# ruff: noqa: E501 (the hints are prose)
"""Exercises on serving: latency, capacity, sampling, and the scheduler."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from optinfer.course.exercise import Case, Draw, Exercise, Wrong, case
from optinfer.course.exercises import today


# --------------------------------------------------------------------------------------------------- latency
def latencies(arrival: float, token_times: list[float]) -> tuple[float, float]:
    """What a user feels.

    arrival: when the request came; token_times: when each of its tokens was delivered
    returns: (time to first token, mean time between tokens); the second is 0 for a single token
    """
    between = (token_times[-1] - token_times[0]) / (len(token_times) - 1) if len(token_times) > 1 else 0.0
    return token_times[0] - arrival, between


def _latencies_reference(arrival: float, token_times: list[float]) -> tuple[float, float]:
    gaps = [b - a for a, b in itertools.pairwise(token_times)]
    return token_times[0] - arrival, sum(gaps) / len(gaps) if gaps else 0.0


def _latencies_cases(draw: Draw) -> Iterator[Case]:
    yield case("four tokens", 1.0, [1.5, 1.6, 1.7, 1.9])
    yield case("one token", 2.0, [2.25])
    yield case("two tokens", 2.0, [2.25, 2.5])
    times = sorted(10 + draw.random.random() * 5 for _ in range(20))
    yield case("20 tokens", 9.0, times)
    yield case("speculation: several at once", 0.0, [0.5, 0.5, 0.5, 0.6, 0.6])


LATENCIES = Exercise(
    id="serving.latencies",
    title="What a user feels",
    difficulty=1,
    minutes=5,
    spec="""\
Two numbers describe a stream: how long until the first token (TTFT), and how fast the others follow (time per output token).""",
    answer=latencies,
    cases=_latencies_cases,
    reference=_latencies_reference,
    rtol=1e-9,
    atol=1e-9,
    hints=(
        "How many gaps are there between n tokens?",
        "First time minus arrival; last minus first time, divided by n - 1 gaps.",
        "`token_times[0] - arrival`, `(token_times[-1] - token_times[0]) / (len(token_times) - 1)`",
    ),
    wrong=(
        Wrong(
            "gaps counted like tokens",
            "n tokens have n - 1 gaps between them.",
            ("/ (len(token_times) - 1)", "/ len(token_times)"),
        ),
        Wrong(
            "the wait for the first token mixed in",
            "The first token's wait (queue, prefill) is TTFT; the mean gap starts there.",
            ("(token_times[-1] - token_times[0])", "(token_times[-1] - arrival)"),
        ),
        Wrong(
            "no care for a single token",
            "One token has no gap: 0, not a division by zero.",
            (" if len(token_times) > 1 else 0.0", ""),
        ),
        Wrong(
            "the clock instead of the wait",
            "TTFT is counted from the request's arrival.",
            ("token_times[0] - arrival, between", "token_times[0], between"),
        ),
    ),
)


def max_sequences(memory: int, weights: int, kv_bytes_per_token: int, block_size: int, length: int) -> int:
    """How many sequences can be served at the same time.

    memory, weights: bytes; kv_bytes_per_token: bytes; length: tokens of each sequence
    returns: sequences whose whole blocks fit beside the weights
    """
    blocks = max(memory - weights, 0) // (kv_bytes_per_token * block_size)
    return blocks // -(-length // block_size)


def _max_sequences_reference(memory: int, weights: int, kv_bytes_per_token: int, block_size: int, length: int) -> int:
    block, count = kv_bytes_per_token * block_size, 0
    free = max(memory - weights, 0) // block
    while free >= math.ceil(length / block_size):
        free, count = free - math.ceil(length / block_size), count + 1
    return count


def _max_sequences_cases(draw: Draw) -> Iterator[Case]:
    yield case("8B in 16 bits on 80 GB, 2048 tokens", 80 * 10**9, 16 * 10**9, 131_072, 16, 2048)
    yield case("lengths that do not fill their blocks", 10**9, 269 * 10**6, 23_040, 16, 100)
    yield case("large blocks waste memory", 10**9, 269 * 10**6, 23_040, 256, 300)
    yield case("the weights do not fit", 10**9, 2 * 10**9, 23_040, 16, 100)
    yield case("a remainder of memory", 1_000, 100, 3, 4, 9)
    yield case("the weights fill it to the last byte", 100, 100, 1, 1, 1)


MAX_SEQUENCES = Exercise(
    id="serving.max_sequences",
    title="How many users fit?",
    difficulty=2,
    minutes=10,
    spec="""\
The weights take their share of memory, the rest is cut into blocks of `block_size` tokens, and each sequence of `length`
tokens takes whole blocks. How many sequences fit at once?""",
    answer=max_sequences,
    cases=_max_sequences_cases,
    reference=_max_sequences_reference,
    hints=(
        "First blocks, then sequences: both are whole numbers.",
        "Blocks: what is left beside the weights, divided by a block's bytes, rounded down. A sequence takes length / block_size, rounded up.",
        "`blocks = max(memory - weights, 0) // (kv_bytes_per_token * block_size)`; `blocks // -(-length // block_size)`",
    ),
    wrong=(
        Wrong("the weights forgotten", "They are in memory first.", ("max(memory - weights, 0)", "memory")),
        Wrong(
            "tokens instead of whole blocks",
            "A sequence of 100 tokens takes 7 blocks of 16, room for 112.",
            ("blocks // -(-length // block_size)", "blocks * block_size // length"),
        ),
        Wrong(
            "blocks rounded down",
            "The tokens beyond the last full block need a block too.",
            ("-(-length // block_size)", "max(1, length // block_size)"),
        ),
        Wrong(
            "negative room",
            "If the weights do not fit, nobody is served: 0.",
            ("max(memory - weights, 0)", "(memory - weights)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- sampling
def top_p(logits: Tensor, temperature: float, p: float) -> Tensor:
    """Distribution to sample from, with temperature and nucleus (top-p) filtering.

    logits: float32 [vocabulary]; temperature: above 0; p: above 0, at most 1
    returns: float32 [vocabulary]: the smallest set of most likely tokens whose probabilities reach p, renormalized
    """
    probabilities = (logits / temperature).softmax(dim=-1)
    ordered, index = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before < p, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter(0, index, kept / kept.sum())


def _top_p_reference(logits: Tensor, temperature: float, p: float) -> Tensor:
    probabilities = (logits.double() / temperature).softmax(0).tolist()
    out, total = [0.0] * len(probabilities), 0.0
    for i in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if total >= p:
            break
        out[i], total = probabilities[i], total + probabilities[i]
    return torch.tensor([v / total for v in out])


def _top_p_cases(draw: Draw) -> Iterator[Case]:
    yield case("p 0.7", torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), 1.0, 0.7)
    yield case("the first token alone reaches p", torch.tensor([0.05, 0.9, 0.05]).log(), 1.0, 0.5)
    yield case("everything kept", draw.normal(8), 1.0, 1.0)
    yield case("a high temperature", 3 * draw.normal(20), 2.5, 0.8)
    yield case("a low temperature", draw.normal(30), 0.3, 0.95)
    yield case("a low temperature, flat logits", 0.5 * draw.normal(12), 0.5, 0.6)


TOP_P = Exercise(
    id="serving.top_p",
    title="The nucleus",
    difficulty=3,
    minutes=15,
    spec="""\
Divide the logits by the temperature, then keep the most likely tokens until their probabilities reach `p`, including the one
that reaches it, and renormalize. At least one token always stays. Speculation has to apply this to the target *before* it
compares with the draft.""",
    answer=top_p,
    cases=_top_p_cases,
    reference=_top_p_reference,
    hints=(
        "Sorted by probability: which tokens have less than p *before* them?",
        "Sort, cumulative sum, keep where the sum before the token is below p, renormalize, and put everything back in its place.",
        "`ordered, index = probs.sort(descending=True)`; `kept = torch.where(ordered.cumsum(-1) - ordered < p, ordered, 0.0)`; scatter `kept / kept.sum()` to `index`.",
    ),
    wrong=(
        Wrong(
            "the token that reaches p is dropped",
            "Keep tokens while the sum *before* them is below p; otherwise a confident model keeps nothing.",
            ("before = ordered.cumsum(dim=-1) - ordered", "before = ordered.cumsum(dim=-1)"),
        ),
        Wrong("not renormalized", "What is kept must sum to one.", ("kept / kept.sum()", "kept")),
        Wrong(
            "left in sorted order",
            "Probabilities belong to tokens: scatter them back through the index.",
            ("torch.zeros_like(probabilities).scatter(0, index, kept / kept.sum())", "kept / kept.sum()"),
        ),
        Wrong(
            "the nucleus taken before the temperature",
            "The temperature comes first: what reaches p depends on it.",
            ("probabilities = (logits / temperature).softmax(dim=-1)", "probabilities = logits.softmax(dim=-1)"),
            ("kept / kept.sum()", "(t := torch.where(kept > 0, kept, 0.0) ** (1 / temperature)) / t.sum()"),
        ),
        Wrong(
            "multiplied by the temperature",
            "A high temperature flattens: divide.",
            ("logits / temperature", "logits * temperature"),
        ),
        Wrong(
            "each token compared with p",
            "p is a bound for the sum, not for single tokens.",
            ("torch.where(before < p, ordered, 0.0)", "torch.where((ordered >= 1 - p) | (before == 0), ordered, 0.0)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- scheduling
def admit(waiting: list[int], free_blocks: int, running: int, max_running: int, block_size: int) -> list[int]:
    """Which waiting requests may start now.

    waiting: prompt lengths, first come first served; running: sequences that already run, max_running at most
    returns: indices of the admitted ones
    """
    admitted = []
    for i, length in enumerate(waiting):
        needed = -(-length // block_size)
        if running + len(admitted) >= max_running or needed > free_blocks:
            break
        free_blocks -= needed
        admitted.append(i)
    return admitted


def _admit_reference(
    waiting: list[int], free_blocks: int, running: int, max_running: int, block_size: int
) -> list[int]:
    best = 0
    for n in range(len(waiting) + 1):
        if sum(math.ceil(x / block_size) for x in waiting[:n]) <= free_blocks and (
            n == 0 or running + n <= max_running
        ):
            best = n
        else:
            break
    return list(range(best))


def _admit_cases(draw: Draw) -> Iterator[Case]:
    yield case("two of three fit", [20, 30, 40], 5, 0, 8, 16)
    yield case("the second is too long; the third would fit", [16, 900, 16], 10, 0, 8, 16)
    yield case("only one place left", [16, 16, 16], 100, 3, 4, 16)
    yield case("no place left", [16], 100, 4, 4, 16)
    yield case("exactly enough blocks", [17, 16], 3, 0, 4, 16)
    yield case("prompts that would share blocks", [17, 14, 17], 2, 0, 4, 16)
    yield case("random", [draw.random.randrange(1, 200) for _ in range(12)], 30, 1, 9, 16)


ADMIT = Exercise(
    id="serving.admit",
    title="Who may come in?",
    difficulty=2,
    minutes=15,
    prerequisites=("serving.max_sequences",),
    spec="""\
First come, first served: admit waiting requests from the front while their prompt's blocks are free and fewer than
`max_running` sequences run. The first that does not fit stops the line; letting shorter ones pass would leave it waiting for
ever.""",
    answer=admit,
    cases=_admit_cases,
    reference=_admit_reference,
    hints=(
        "What changes after each admission?",
        "Go through the line; stop at the first that lacks blocks or a place; subtract its blocks otherwise.",
        "`if running + len(admitted) >= max_running or needed > free_blocks: break`, else subtract and append.",
    ),
    wrong=(
        Wrong(
            "short requests pass a long one",
            "A long prompt would starve: stop at the first that does not fit.",
            ("break", "continue"),
        ),
        Wrong(
            "the blocks are not taken",
            "Each admitted request uses up free blocks.",
            ("        free_blocks -= needed\n", ""),
        ),
        Wrong(
            "those already running do not count",
            "max_running is the limit for all of them together.",
            ("running + len(admitted) >= max_running", "len(admitted) >= max_running"),
        ),
        Wrong(
            "blocks rounded down",
            "17 tokens need two blocks of 16.",
            ("-(-length // block_size)", "length // block_size"),
        ),
    ),
)


def chunked_prefill(decoding: int, prompts: list[int], budget: int) -> list[int]:
    """Share one step's tokens between sequences that decode and prompts that are still being read.

    decoding: sequences that need one token each; prompts: tokens each prompt has left, first come first served
    budget: tokens of the step in all; decoding alone may exceed it
    returns: tokens of each prompt to process in this step
    """
    left = max(budget - decoding, 0)
    chunks = []
    for remaining in prompts:
        chunk = min(remaining, left)
        left -= chunk
        chunks.append(chunk)
    return chunks


def _chunked_reference(decoding: int, prompts: list[int], budget: int) -> list[int]:
    chunks = [0] * len(prompts)
    for _ in range(budget - decoding):
        for i, remaining in enumerate(prompts):
            if chunks[i] < remaining:
                chunks[i] += 1
                break
    return chunks


def _chunked_cases(draw: Draw) -> Iterator[Case]:
    yield case("a long prompt beside 3 decoding", 3, [1000], 256)
    yield case("two short prompts and a long one", 10, [50, 30, 500], 128)
    yield case("everything fits", 2, [10, 20], 64)
    yield case("a long prompt before a short one", 4, [90, 10], 64)
    yield case("decoding uses the whole budget", 64, [100], 64)
    yield case("more decoding than budget", 70, [100, 5], 64)
    yield case("no prompts", 5, [], 64)
    yield case("random", draw.random.randrange(20), [draw.random.randrange(1, 90) for _ in range(8)], 200)


CHUNKED = Exercise(
    id="serving.chunked_prefill",
    title="Don't let a long prompt block the others",
    difficulty=3,
    minutes=15,
    prerequisites=("serving.admit",),
    spec="""\
A prompt of 10,000 tokens in one step makes everybody else's next token wait. So a step has a budget of tokens: the sequences
that decode get one each, first; what is left is filled with a piece of the first prompt, then of the next, and so on.""",
    answer=chunked_prefill,
    cases=_chunked_cases,
    reference=_chunked_reference,
    hints=(
        "Who is served first, and what is left then?",
        "left = budget - decoding, at least 0; each prompt in turn gets min(its rest, left).",
        "`chunk = min(remaining, left)`; `left -= chunk`; append, for every prompt.",
    ),
    wrong=(
        Wrong(
            "the decoding sequences forgotten",
            "They come first: each takes one token of the budget.",
            ("max(budget - decoding, 0)", "budget"),
        ),
        Wrong(
            "the budget is for each prompt",
            "It is for the whole step: subtract what each prompt took.",
            ("        left -= chunk\n", ""),
        ),
        Wrong(
            "whole prompts or nothing",
            "A piece of a prompt is what chunking is about.",
            ("chunk = min(remaining, left)", "chunk = remaining if remaining <= left else 0"),
        ),
        Wrong(
            "a negative piece",
            "When decoding uses more than the budget, nothing is left: 0.",
            ("max(budget - decoding, 0)", "budget - decoding"),
        ),
    ),
)


def preempt(running: list[tuple[str, int]], needed: int, free_blocks: int) -> list[str]:
    """Whom to send back to the waiting line when blocks run out.

    running: (name, blocks held), in order of arrival, not to be changed
    needed: blocks that the step wants; free_blocks: that are free
    returns: names, in the order of preemption: the latest arrival first, no more than necessary, never the first of all
    """
    victims = []
    for name, held in reversed(running[1:]):
        if free_blocks >= needed:
            break
        free_blocks += held
        victims.append(name)
    return victims


def _preempt_reference(running: list[tuple[str, int]], needed: int, free_blocks: int) -> list[str]:
    for n in range(len(running)):
        if free_blocks + sum(held for _, held in running[len(running) - n :]) >= needed:
            break
    return [name for name, _ in running[::-1][:n]] if running else []


def _preempt_cases(draw: Draw) -> Iterator[Case]:
    yield case("one is enough", [("a", 4), ("b", 3), ("c", 5)], 4, 1)
    yield case("two are needed", [("a", 4), ("b", 3), ("c", 2)], 5, 1)
    yield case("nobody has to go", [("a", 4), ("b", 3)], 2, 2)
    yield case("the first is never sent back", [("a", 4), ("b", 1)], 9, 0)
    yield case("one running", [("a", 7)], 1, 0)
    yield case("what is free and one more are enough", [("a", 4), ("b", 2), ("c", 3), ("d", 4)], 6, 3)
    yield case("random", [(f"s{i}", draw.random.randrange(1, 9)) for i in range(9)], draw.random.randrange(10, 30), 2)


PREEMPT = Exercise(
    id="serving.preempt",
    title="When memory runs out",
    difficulty=3,
    minutes=15,
    prerequisites=("serving.admit",),
    spec="""\
Every running sequence grows, and at some point there is no free block. Then the latest arrivals go back to the waiting line
and give up their blocks; their tokens are computed again later. Send back as few as necessary, and never the oldest: somebody
must get through.""",
    answer=preempt,
    cases=_preempt_cases,
    reference=_preempt_reference,
    hints=(
        "Who has lost least if it starts again?",
        "From the end of the list; stop as soon as enough is free; leave the first alone.",
        "`for name, held in reversed(running[1:]): if free_blocks >= needed: break`; add held, append name.",
    ),
    wrong=(
        Wrong(
            "the oldest first",
            "The oldest has most work to lose, and could be sent back again and again.",
            ("reversed(running[1:])", "running[:-1]"),
        ),
        Wrong(
            "one more than necessary",
            "Check before sending the next one back.",
            (
                "        if free_blocks >= needed:\n            break\n        free_blocks += held\n        victims.append(name)\n",
                "        free_blocks += held\n        victims.append(name)\n        if free_blocks > needed:\n            break\n",
            ),
        ),
        Wrong(
            "everybody goes",
            "If the oldest goes too, nothing runs and nothing gets done.",
            ("reversed(running[1:])", "reversed(running)"),
        ),
        Wrong(
            "what is free already is not counted",
            "Free blocks are taken first: only what is missing must come from somebody.",
            ("    victims = []\n", "    victims, free_blocks = [], 0\n"),
        ),
        Wrong(
            "the victims' blocks are not counted",
            "Their blocks are free as soon as they go.",
            ("        free_blocks += held\n", ""),
        ),
    ),
)


def serve(requests: list[tuple[int, int]], max_running: int) -> list[int]:
    """Continuous batching: simulate it step by step.

    requests: (step of arrival, tokens to generate), in order of arrival; max_running: sequences in one step
    returns: for each request, the step in which its last token comes
    """
    finished = [0] * len(requests)
    waiting, running = list(range(len(requests))), {}
    step = 0
    while waiting or running:
        while waiting and len(running) < max_running and requests[waiting[0]][0] <= step:
            request = waiting.pop(0)
            running[request] = requests[request][1]
        for request in list(running):
            running[request] -= 1
            if running[request] == 0:
                del running[request]
                finished[request] = step
        step += 1
    return finished


def _serve_reference(requests: list[tuple[int, int]], max_running: int) -> list[int]:
    free_from, out = [0] * max_running, []  # each place, and the step from which it is free
    for arrival, tokens in requests:
        place = min(range(max_running), key=free_from.__getitem__)
        start = max(arrival, free_from[place])
        out.append(start + tokens - 1)
        free_from[place] = start + tokens
    return out


def _serve_cases(draw: Draw) -> Iterator[Case]:
    yield case("one request", [(0, 3)], 4)
    yield case("three requests, two places", [(0, 5), (0, 2), (0, 3)], 2)
    yield case("a late arrival", [(0, 2), (7, 2)], 2)
    yield case("one place", [(0, 2), (1, 3), (1, 1)], 1)
    yield case("a long request beside short ones", [(0, 9), (0, 1), (0, 1), (0, 1)], 2)
    arrivals = sorted(draw.random.randrange(30) for _ in range(15))
    yield case("15 random requests, four places", [(a, draw.random.randrange(1, 12)) for a in arrivals], 4)


SERVE = Exercise(
    id="serving.continuous_batching",
    title="The engine's heartbeat",
    difficulty=4,
    minutes=25,
    prerequisites=("serving.admit",),
    spec="""\
Static batching waits until the whole batch is done. Continuous batching fills a place as soon as it is free. Each step:

1. admit requests that have arrived (arrival <= step), in order, while fewer than `max_running` run;
2. every running sequence gets one token; those that have all of theirs leave, and their place is free in the next step.

Steps count from 0. A request admitted in step 4 that wants 3 tokens ends in step 6.""",
    answer=serve,
    cases=_serve_cases,
    reference=_serve_reference,
    hints=(
        "Keep a list of waiting requests and a dict from running request to tokens left.",
        "Loop until both are empty: admit, give everybody one token, note who ends, next step.",
        "`while waiting or running:` admit while there is a place and `requests[waiting[0]][0] <= step`; decrement all; finished at 0 with the current step; `step += 1`.",
    ),
    wrong=(
        Wrong(
            "static batching",
            "Waiting until everybody is done leaves places empty: admit in every step.",
            (
                "while waiting and len(running) < max_running and",
                "idle = not running\n        while idle and waiting and len(running) < max_running and",
            ),
        ),
        Wrong(
            "served before they arrive",
            "A request can be admitted once its step of arrival has come.",
            (" and requests[waiting[0]][0] <= step", ""),
        ),
        Wrong(
            "everything a step late",
            "Steps count from 0, a request may start in its step of arrival, and n tokens from step s on end at s + n - 1.",
            ("finished[request] = step", "finished[request] = step + 1"),
        ),
        Wrong(
            "how long instead of when",
            "Asked is the step of the last token, counted from 0, not the number of steps since the arrival.",
            ("finished[request] = step", "finished[request] = step + 1 - requests[request][0]"),
        ),
        Wrong(
            "any number at a time",
            "At most max_running sequences share a step.",
            ("len(running) < max_running and ", ""),
        ),
    ),
)

EXERCISES = (LATENCIES, MAX_SEQUENCES, TOP_P, ADMIT, CHUNKED, PREEMPT, SERVE, *today.SERVING)
