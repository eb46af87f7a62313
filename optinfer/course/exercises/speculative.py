# ruff: noqa: E501, RUF005 (the hints are prose; list + list reads better to a learner)
"""Exercises on speculative decoding: how much it gains, how it stays exact, where drafts come from, the whole loop."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from optinfer.course.exercise import Case, Draw, Exercise, Wrong, case, slow_case
from optinfer.course.exercises import today


# --------------------------------------------------------------------------------------------------- arithmetic
def expected_tokens(alpha: float, gamma: int) -> float:
    """Mean number of tokens that one pass of the target yields.

    alpha: probability that a drafted token is accepted, each independently, 0 to 1
    gamma: drafted tokens per pass
    """
    if alpha == 1:
        return gamma + 1.0
    return (1 - alpha ** (gamma + 1)) / (1 - alpha)


def _expected_tokens_reference(alpha: float, gamma: int) -> float:
    return float(sum(alpha**i for i in range(gamma + 1)))


def _expected_tokens_cases(draw: Draw) -> Iterator[Case]:
    yield case("alpha 0.8, four drafted", 0.8, 4)
    yield case("a perfect draft", 1.0, 4)
    yield case("a useless draft", 0.0, 7)
    yield case("nothing drafted", 0.5, 0)
    yield case("random", draw.random.uniform(0.1, 0.95), draw.random.randrange(1, 12))


EXPECTED_TOKENS = Exercise(
    id="speculative.expected_tokens",
    title="Tokens per pass",
    difficulty=1,
    minutes=10,
    spec="""\
The target checks `gamma` drafted tokens in one pass. Each is accepted with probability `alpha` if all before it were. The
pass yields the accepted ones and one more: the correction, or a bonus when all were accepted. How many on average?""",
    answer=expected_tokens,
    cases=_expected_tokens_cases,
    reference=_expected_tokens_reference,
    rtol=1e-9,
    hints=(
        "What is the probability that the pass yields at least i + 1 tokens?",
        "alpha ** i. The mean is the sum of these for i = 0 … gamma: a geometric series.",
        "`(1 - alpha ** (gamma + 1)) / (1 - alpha)`, and `gamma + 1` for alpha = 1; or simply the sum.",
    ),
    wrong=(
        Wrong(
            "every token counted as alpha",
            "A token counts only if all before it were accepted: 1 + alpha·gamma is too much.",
            ("return (1 - alpha ** (gamma + 1)) / (1 - alpha)", "return 1 + alpha * gamma"),
        ),
        Wrong(
            "the target's own token forgotten",
            "Even if everything is rejected, the pass yields one token.",
            ("return (1 - alpha ** (gamma + 1)) / (1 - alpha)", "return (1 - alpha ** (gamma + 1)) / (1 - alpha) - 1"),
            ("gamma + 1.0", "gamma + 0.0"),
        ),
        Wrong(
            "one term of the series too few",
            "The sum has gamma + 1 terms: with all accepted there is a bonus token.",
            ("alpha ** (gamma + 1)", "alpha ** gamma"),
            ("gamma + 1.0", "gamma + 0.0"),
        ),
        Wrong(
            "the first drafted token counted as certain",
            "The pass yields its one token for sure; the first drafted one comes on top with probability alpha, the i-th with alpha**i.",
            ("return (1 - alpha ** (gamma + 1)) / (1 - alpha)", "return 1 + sum(alpha**i for i in range(gamma))"),
        ),
        Wrong(
            "dividing by zero at alpha = 1",
            "A perfect draft makes 0/0: its limit is gamma + 1.",
            ("if alpha == 1:", "if False:"),
        ),
    ),
)


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """Probability that a token drafted from q is accepted by a target p.

    p, q: float [..., vocabulary], distributions over the last dimension
    returns: float [...]
    """
    return torch.minimum(p, q).sum(dim=-1)


def _acceptance_reference(p: Tensor, q: Tensor) -> Tensor:
    return (1 - (p.double() - q.double()).abs().sum(-1) / 2).to(p.dtype)


def _two(draw: Draw, *shape: int, sharp: float = 1.0) -> tuple[Tensor, Tensor]:
    return draw.probabilities(*shape, sharp=sharp), draw.probabilities(*shape, sharp=sharp)


def _acceptance_cases(draw: Draw) -> Iterator[Case]:
    yield case("3 tokens", torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6]))
    yield case("the same distribution", *[draw.probabilities(6)] * 2)
    yield case("nothing in common", torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    yield case("4 positions, 50 tokens, sharp", *_two(draw, 4, 50, sharp=3.0))


ACCEPTANCE = Exercise(
    id="speculative.acceptance",
    title="How well does the draft agree?",
    difficulty=1,
    minutes=10,
    spec="""\
A token `x` drafted with probability `q[x]` is accepted with probability `min(1, p[x] / q[x])`. What is the probability that
a drafted token is accepted, over all tokens that may be drafted?""",
    answer=acceptance,
    cases=_acceptance_cases,
    reference=_acceptance_reference,
    hints=(
        "Sum over x: probability that x is drafted, times probability that it is then accepted.",
        "q·min(1, p/q) = min(q, p). No division is needed, so q = 0 does no harm.",
        "`torch.minimum(p, q).sum(dim=-1)`",
    ),
    wrong=(
        Wrong(
            "as if both drew independently",
            "sum(p·q) is the chance that two independent draws agree; acceptance is larger.",
            ("torch.minimum(p, q)", "(p * q)"),
        ),
        Wrong(
            "the whole difference instead of half",
            "What p has more in some tokens it has less in others: |p - q| counts every difference twice.",
            ("torch.minimum(p, q).sum(dim=-1)", "(1 - (p - q).abs().sum(dim=-1)).clamp(min=0)"),
        ),
        Wrong(
            "the agreement of the most likely tokens",
            "argmax agreement is acceptance for greedy decoding only.",
            ("torch.minimum(p, q).sum(dim=-1)", "(p.argmax(-1) == q.argmax(-1)).to(p.dtype)"),
        ),
        Wrong(
            "not weighted by what is drafted",
            "The mean of min(1, p/q) counts tokens that are never drafted as much as common ones.",
            ("torch.minimum(p, q).sum(dim=-1)", "(p / q.clamp(min=1e-9)).clamp(max=1).mean(dim=-1)"),
        ),
        Wrong(
            "the drafting left out",
            "Summing min(1, p/q) can exceed 1. Each token counts as often as it is drafted: multiply with q.",
            ("torch.minimum(p, q).sum(dim=-1)", "(p / q).clamp(max=1).sum(dim=-1)"),
        ),
        Wrong(
            "summed over all positions",
            "Each position has its own acceptance: sum over the vocabulary only.",
            (".sum(dim=-1)", ".sum()"),
        ),
    ),
)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What to sample from after a draft from q was rejected.

    p, q: float [vocabulary], target and draft
    returns: float [vocabulary], max(p - q, 0) normalized; p itself where nothing is left (p = q)
    """
    left = (p - q).clamp(min=0)
    total = left.sum()
    return left / total if total > 0 else p.clone()


def _residual_reference(p: Tensor, q: Tensor) -> Tensor:
    left = [max(a - b, 0.0) for a, b in zip(p.tolist(), q.tolist())]
    return torch.tensor([v / sum(left) for v in left] if sum(left) else p.tolist(), dtype=p.dtype)


def _residual_cases(draw: Draw) -> Iterator[Case]:
    yield case("3 tokens", torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6]))
    same = draw.probabilities(5)
    yield case("the same distribution", same, same.clone())
    yield case("a draft that is sure of one token", draw.probabilities(6), torch.eye(6)[2])
    yield case("50 tokens", *_two(draw, 50, sharp=2.0))


RESIDUAL = Exercise(
    id="speculative.residual",
    title="After a rejection",
    difficulty=2,
    minutes=10,
    prerequisites=("speculative.acceptance",),
    spec="""\
Accepting with min(1, p/q) delivers `min(p, q)` of the target's probability. What is missing, `p - min(p, q)`, must come from
the correction: sample it from that, normalized. If p = q nothing is missing (and a rejection only happens by rounding):
return p.""",
    answer=residual,
    cases=_residual_cases,
    reference=_residual_reference,
    hints=(
        "Which tokens did the draft propose too rarely?",
        "Those with p > q, by p - q. Negative differences become 0; then normalize.",
        "`left = (p - q).clamp(min=0)`; `left / left.sum()` if the sum is positive, else p.",
    ),
    wrong=(
        Wrong(
            "sampling from the target again",
            "Tokens that the draft proposes often would come out too often: the output would not follow p.",
            ("left = (p - q).clamp(min=0)", "left = p.clone()"),
        ),
        Wrong(
            "draft and target swapped", "What is missing is where the target wants more: p - q.", ("(p - q)", "(q - p)")
        ),
        Wrong(
            "not normalized",
            "The differences sum to less than one: divide.",
            ("return left / total if total > 0 else p.clone()", "return left if total > 0 else p.clone()"),
        ),
        Wrong(
            "the absolute difference",
            "Where the draft proposes too much nothing is missing: clamp at 0.",
            (".clamp(min=0)", ".abs()"),
        ),
        Wrong(
            "0/0 where p = q",
            "Nothing is left: return p instead of dividing by zero.",
            (" if total > 0 else p.clone()", ""),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- verification
def greedy_verify(draft: list[int], choices: list[int]) -> list[int]:
    """Check drafted tokens against a target that decodes greedily.

    draft: the drafted tokens
    choices: the target's most likely token at each of len(draft) + 1 positions; choices[i] follows draft[:i]
    returns: the tokens to emit, one to len(draft) + 1
    """
    accepted = 0
    while accepted < len(draft) and draft[accepted] == choices[accepted]:
        accepted += 1
    return draft[:accepted] + [choices[accepted]]


def _greedy_reference(draft: list[int], choices: list[int]) -> list[int]:
    for i, token in enumerate(draft):
        if token != choices[i]:
            return choices[: i + 1]
    return list(choices)


def _greedy_cases(draw: Draw) -> Iterator[Case]:
    yield case("the third is wrong", [4, 8, 1, 5], [4, 8, 2, 5, 9])
    yield case("all right: a bonus token", [4, 8], [4, 8, 3])
    yield case("the first is wrong", [7, 8], [4, 8, 3])
    yield case("right again after a mistake", [1, 2, 3, 4], [1, 9, 3, 4, 5])
    yield case("nothing drafted", [], [6])


GREEDY = Exercise(
    id="speculative.greedy_verify",
    title="Accept what the target would have said",
    difficulty=2,
    minutes=10,
    spec="""\
The target looked at all drafted tokens in one pass: `choices[i]` is what it would say after `draft[:i]`. Emit the drafted
tokens up to the first disagreement, then the target's own token there. If all agree, its choice after the last is free.""",
    answer=greedy_verify,
    cases=_greedy_cases,
    reference=_greedy_reference,
    hints=(
        "What is choices[2] worth if draft[1] was wrong?",
        "Count how many agree from the front; emit those and the target's choice at that place.",
        "`while accepted < len(draft) and draft[accepted] == choices[accepted]: accepted += 1`; `draft[:accepted] + [choices[accepted]]`",
    ),
    wrong=(
        Wrong(
            "agreements after a mistake count",
            "What follows a wrong token was computed for another text: stop at the first disagreement.",
            (
                "    while accepted < len(draft) and draft[accepted] == choices[accepted]:\n        accepted += 1\n",
                "    accepted = sum(a == b for a, b in zip(draft, choices))\n",
            ),
        ),
        Wrong(
            "no token of the target's own",
            "Each pass yields one more token; without it a bad draft would never advance.",
            (" + [choices[accepted]]", ""),
        ),
        Wrong(
            "no bonus when all agree",
            "The pass computed the choice after the last drafted token as well.",
            (" + [choices[accepted]]", " + choices[accepted : accepted + 1] * (accepted < len(draft))"),
        ),
        Wrong(
            "the wrong token kept",
            "The first disagreement is where the target's own choice belongs.",
            ("draft[:accepted] + [choices[accepted]]", "draft[: accepted + 1] + choices[accepted + 1 : accepted + 2]"),
        ),
    ),
)


def pick(distribution: Tensor, u: float) -> int:
    """The token that a uniform number u from [0, 1) stands for."""
    return int(
        (distribution.double().cumsum(0) <= u * distribution.double().sum()).sum().clamp(max=len(distribution) - 1)
    )


def rejection_sample(draft: list[int], q: Tensor, p: Tensor, u: list[float], u_last: float) -> list[int]:
    """Check drafted tokens against a target that samples; the output follows p exactly.

    draft: gamma drafted tokens, draft[i] sampled from q[i]
    q: float64 [gamma, vocabulary]; p: float64 [gamma + 1, vocabulary], the target's distributions
    u: gamma uniform numbers, u[i] decides about draft[i]; u_last: chooses the last token, by pick(…, u_last)
    returns: the tokens to emit, one to gamma + 1
    """
    for i, token in enumerate(draft):
        if u[i] * q[i, token] >= p[i, token]:
            left = (p[i] - q[i]).clamp(min=0)
            return draft[:i] + [pick(left if left.sum() > 0 else p[i], u_last)]
    return draft + [pick(p[len(draft)], u_last)]


def _law(answer: Callable[..., Any], q: Tensor, p: Tensor, draft: list[int], u: list[float], u_last: float) -> Any:
    """The emitted tokens for these numbers; with no draft given, the exact law of the first token."""
    if draft:
        return answer(list(draft), q.clone(), p.clone(), list(u), u_last)
    steps, vocabulary = 20, q.shape[1]
    law = torch.zeros(vocabulary, dtype=torch.float64)
    for token in range(vocabulary):
        for i in range(steps):
            for j in range(steps):
                first = answer([token], q[:1].clone(), p[:2].clone(), [(i + 0.5) / steps], (j + 0.5) / steps)[0]
                law[first] += q[0, token] / steps**2
    return law


def _law_reference(q: Tensor, p: Tensor, draft: list[int], u: list[float], u_last: float) -> Any:
    if not draft:
        return p[0].clone()
    out: list[int] = []
    for i, token in enumerate(draft):
        if u[i] < p[i, token] / q[i, token]:  # u is below 1, but a rounded one may be 1
            out.append(token)
            continue
        left = torch.relu(p[i] - q[i])
        return [*out, pick(left if left.sum() > 0 else p[i], u_last)]
    return [*out, pick(p[len(draft)], u_last)]


def _law_cases(draw: Draw) -> Iterator[Case]:
    tenth = torch.tensor([[0.1, 0.2, 0.7], [0.4, 0.4, 0.2]], dtype=torch.float64)
    half = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    for label, gamma, sharp in (
        ("3 drafted of a vocabulary of 5", 3, 1.0),
        ("4 drafted, sharp", 4, 3.0),
        ("6 drafted", 6, 0.6),
        ("one drafted", 1, 2.0),
    ):
        q, p = (
            draw.probabilities(gamma, 5, sharp=sharp).double(),
            draw.probabilities(gamma + 1, 5, sharp=sharp).double(),
        )
        draft = [pick(q[i], draw.random.random()) for i in range(gamma)]
        yield case(label, q, p, draft, [draw.random.random() for _ in draft], draw.random.random())
    yield case("everything accepted", half.repeat(2, 1), torch.cat([half, half, tenth[:1]]), [0, 2], [0.99, 0.99], 0.95)
    yield case("everything rejected", half, tenth, [0], [0.9], 0.5)
    never = torch.tensor([[0.0, 0.4, 0.6], [0.4, 0.4, 0.2]], dtype=torch.float64)
    yield case("the target never says it, and u is 0", half, never, [0], [0.0], 0.3)
    yield case("u rounded up to 1 where p = q", half, torch.cat([half, half]), [1], [1.0], 0.6)
    yield case("how often each token comes first, over all drafts and numbers u", half, tenth, [], [], 0.0)


REJECTION = Exercise(
    id="speculative.rejection_sample",
    title="Speculation that changes nothing",
    difficulty=4,
    minutes=30,
    prerequisites=("speculative.residual", "speculative.greedy_verify"),
    spec="""\
Put it together for sampling. Token by token: accept `draft[i]` if `u[i] < p[i, token] / q[i, token]`. At the first
rejection, choose the correction from the residual `max(p[i] - q[i], 0)` with `pick(…, u_last)` and stop (from p[i] itself if
nothing is left). If all are accepted, choose one more from the target's last distribution.

The emitted tokens then follow p exactly, whatever q is. The check enumerates that.""",
    answer=rejection_sample,
    cases=_law_cases,
    reference=_law_reference,
    run=_law,
    given=(pick,),
    rtol=1e-6,
    atol=0.02,
    hints=(
        "What is emitted after a rejection at position i: how many tokens, and from where?",
        "draft[:i] and one token from the residual of position i. `u * q >= p` rejects without dividing.",
        "`for i, token in enumerate(draft): if u[i] * q[i, token] >= p[i, token]: return draft[:i] + [pick((p[i] - q[i]).clamp(min=0), u_last)]`; after the loop `draft + [pick(p[-1], u_last)]`.",
    ),
    wrong=(
        Wrong(
            "the correction from the target itself",
            "What the draft proposes often would come out too often. Sample the correction from max(p - q, 0).",
            ("left = (p[i] - q[i]).clamp(min=0)", "left = p[i]"),
        ),
        Wrong(
            "accepting whatever the target likes better than half",
            "The probability of acceptance is min(1, p/q), drawn with u.",
            ("u[i] * q[i, token] >= p[i, token]", "p[i, token] < 0.5 * q[i, token]"),
        ),
        Wrong(
            "draft and target swapped",
            "Accept with p/q: the target over the draft.",
            ("u[i] * q[i, token] >= p[i, token]", "u[i] * p[i, token] >= q[i, token]"),
        ),
        Wrong(
            "everything accepted",
            "Without rejections the output follows the draft.",
            ("if u[i] * q[i, token] >= p[i, token]:", "if False:"),
        ),
        Wrong(
            "no bonus when all are accepted",
            "The pass has already computed the next distribution: use it.",
            ("return draft + [pick(p[len(draft)], u_last)]", "return draft"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- drafts
def prompt_lookup(tokens: list[int], max_ngram: int, num_draft: int) -> list[int]:
    """Draft by copying: find the last few tokens earlier in the text, and propose what followed there.

    max_ngram: try this many of the last tokens first, then fewer, down to one
    num_draft: propose at most so many
    returns: what followed the latest earlier occurrence; [] if there is none
    """
    for n in range(min(max_ngram, len(tokens) - 1), 0, -1):
        suffix = tokens[-n:]
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == suffix:
                return tokens[start + n : start + n + num_draft]
    return []


def _lookup_reference(tokens: list[int], max_ngram: int, num_draft: int) -> list[int]:
    return _latest_copy(tokens, max_ngram, num_draft)


def _latest_copy(tokens: list[int], max_ngram: int, num_draft: int) -> list[int]:
    ends = {}
    for n in range(1, max_ngram + 1):
        for end in range(n, len(tokens)):
            if n < len(tokens) and tokens[end - n : end] == tokens[-n:]:
                ends[n] = end
    return tokens[ends[max(ends)] :][:num_draft] if ends else []


def _lookup_cases(draw: Draw) -> Iterator[Case]:
    yield case("three known tokens", [1, 2, 3, 4, 5, 9, 2, 3, 4], 3, 3)
    yield case("twice before: the later one counts", [5, 6, 7, 5, 6, 8, 5, 6], 2, 2)
    yield case("a long match earlier, a short one later", [1, 2, 3, 40, 9, 3, 50, 1, 2, 3], 3, 1)
    yield case("only the last token is known", [7, 1, 2, 7], 3, 2)
    yield case("nothing repeats", [1, 2, 3, 4], 3, 5)
    yield case("the text overlaps itself", [4, 4, 4, 4], 2, 3)
    yield case("one token", [3], 3, 4)
    yield case("two tokens", [3, 3], 3, 4)
    yield case("a longer match than may be tried", [1, 2, 3, 9, 2, 4, 1, 2], 1, 2)
    yield case("two tokens match, three do not", [5, 6, 1, 9, 6, 2, 5, 6], 3, 2)
    yield case("the only match is an even way back", [1, 2, 7, 3, 7], 3, 2)
    yield case("three places, the latest is not the commonest", [1, 9, 1, 8, 1, 8, 1, 7, 1], 1, 1)
    yield case("60 random tokens of 4", [draw.random.randrange(4) for _ in range(60)], 3, 6)


LOOKUP = Exercise(
    id="speculative.prompt_lookup",
    title="A draft for free",
    difficulty=3,
    minutes=20,
    spec="""\
Summaries, rewrites and code repeat what is already there. So take the last `max_ngram` tokens, look for the *latest* earlier
place where the same run occurs, and propose the (at most `num_draft`) tokens that followed there. If the run does not occur,
try a shorter one. The run at the end itself does not count, but an earlier one may overlap it.""",
    answer=prompt_lookup,
    cases=_lookup_cases,
    reference=_lookup_reference,
    hints=(
        "Which is the last place where an earlier run of n tokens can start?",
        "For n from max_ngram down to 1: go backwards from start = len - n - 1; the first match wins; propose tokens[start + n :][:num_draft].",
        "`for n in range(min(max_ngram, len(tokens) - 1), 0, -1): for start in range(len(tokens) - n - 1, -1, -1): if tokens[start:start + n] == tokens[-n:]: return …`",
    ),
    wrong=(
        Wrong(
            "the first occurrence instead of the latest",
            "Text near the end is more likely to be what is being continued: search backwards.",
            ("range(len(tokens) - n - 1, -1, -1)", "range(len(tokens) - n)"),
        ),
        Wrong(
            "the commonest continuation",
            "Count no occurrences: the latest one decides, because text is most like what stands just before it.",
            (
                "range(len(tokens) - n - 1, -1, -1)",
                "sorted(range(len(tokens) - n), key=lambda s: -sum(tokens[s : s + n + num_draft] == tokens[t : t + n + num_draft] for t in range(len(tokens) - n)))",
            ),
        ),
        Wrong(
            "finding the end itself",
            "The last n tokens match themselves, and nothing follows them: start one place earlier.",
            ("range(len(tokens) - n - 1, -1, -1)", "range(len(tokens) - n, -1, -1)"),
        ),
        Wrong(
            "no overlap allowed",
            "In 4 4 4 the run 4 4 occurs earlier, one place to the left: the last start is len - n - 1, not len - 2n.",
            ("range(len(tokens) - n - 1, -1, -1)", "range(len(tokens) - 2 * n, -1, -1)"),
        ),
        Wrong(
            "short runs first",
            "A longer match predicts better: begin with max_ngram.",
            ("range(min(max_ngram, len(tokens) - 1), 0, -1)", "range(1, min(max_ngram, len(tokens) - 1) + 1)"),
        ),
        Wrong(
            "proposing the run itself",
            "The proposal is what comes after the match.",
            ("tokens[start + n : start + n + num_draft]", "tokens[start : start + num_draft]"),
        ),
        Wrong(
            "more than was asked for",
            "At most num_draft tokens.",
            ("tokens[start + n : start + n + num_draft]", "tokens[start + n :]"),
        ),
    ),
)


def best_length(alpha: float, draft_cost: float, verify_cost: list[float]) -> int:
    """How many tokens to draft.

    alpha: acceptance; draft_cost: time of one drafted token
    verify_cost: verify_cost[n] is the time of a target pass over n + 1 tokens (n drafted); verify_cost[0] is plain decoding
    returns: the number with the most tokens per time; 0 if drafting never pays; the smallest if several are equal
    """
    best, most = 0, 0.0
    for gamma, cost in enumerate(verify_cost):
        rate = sum(alpha**i for i in range(gamma + 1)) / (gamma * draft_cost + cost)
        if rate > most * (1 + 1e-12):
            best, most = gamma, rate
    return best


def _best_length_reference(alpha: float, draft_cost: float, verify_cost: list[float]) -> int:
    rates = [_expected_tokens_reference(alpha, g) / (g * draft_cost + v) for g, v in enumerate(verify_cost)]
    return next(g for g, rate in enumerate(rates) if rate >= max(rates) * (1 - 1e-9))


def _best_length_cases(draw: Draw) -> Iterator[Case]:
    yield case("alpha 0.8, a cheap draft, a flat target", 0.8, 0.05, [1.0] * 12)
    yield case("a draft as slow as it is good", 0.5, 0.6, [1.0] * 8)
    yield case("a target that gets slower", 0.8, 0.02, [1.0, 1.6, 1.7, 1.8, 1.9, 2.0])
    yield case("free drafts, but most are wrong", 0.25, 0.0, [1.0, 1.1, 1.2, 1.3, 1.4])
    yield case("times in milliseconds", 0.75, 4.0, [52.0, 50, 51, 52, 54, 56, 58, 60, 62])
    yield case("a perfect draft", 1.0, 0.1, [1.0] * 6)
    yield case("two tokens cost twice as much as one, six no more than two", 0.8, 0.02, [1.0, 2, 2, 2, 2, 2])
    yield case("all lengths are equally fast", 1.0, 0.0, [1.0, 2.0, 3.0, 4.0])


BEST_LENGTH = Exercise(
    id="speculative.best_length",
    title="How far ahead?",
    difficulty=2,
    minutes=15,
    prerequisites=("speculative.expected_tokens",),
    spec="""\
A longer draft yields more tokens per pass, costs more to make, and (on real machines) more to verify. Choose the length with
the most tokens per time:

```python
rate(gamma) = expected_tokens(alpha, gamma) / (gamma * draft_cost + verify_cost[gamma])
```

Not drafting at all (gamma = 0) is one of the choices.""",
    answer=best_length,
    cases=_best_length_cases,
    reference=_best_length_reference,
    hints=(
        "There are few candidates: try them all.",
        "Compute the rate of every gamma from 0 to len(verify_cost) - 1, keep the largest.",
        "`rate = sum(alpha**i for i in range(gamma + 1)) / (gamma * draft_cost + verify_cost[gamma])`; keep gamma when rate is above the best so far.",
    ),
    wrong=(
        Wrong(
            "the draft taken as free",
            "Each drafted token costs draft_cost: gamma times.",
            ("gamma * draft_cost + cost", "cost"),
        ),
        Wrong(
            "a target pass that always costs the same",
            "Verifying several tokens costs more than one on many machines: verify_cost[gamma].",
            ("gamma * draft_cost + cost", "gamma * draft_cost + verify_cost[0]"),
        ),
        Wrong(
            "drafting at any price",
            "If plain decoding is faster, the answer is 0.",
            ("best, most = 0, 0.0", "best, most = 1, 0.0"),
            ("rate > most * (1 + 1e-12)", "gamma and rate > most * (1 + 1e-12)"),
        ),
        Wrong(
            "stopping at the first length that does not pay",
            "The next one may: a pass can be dear for two tokens and no dearer for six. Try every length.",
            (
                "            best, most = gamma, rate\n",
                "            best, most = gamma, rate\n        else:\n            break\n",
            ),
        ),
        Wrong(
            "the most tokens instead of the most per time",
            "Tokens per pass always grow with the length; time does too.",
            (" / (gamma * draft_cost + cost)", ""),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- the loop
def speculative_generate(
    target: Callable[[list[int]], list[int]],
    draft: Callable[[list[int], int], list[int]],
    prompt: list[int],
    gamma: int,
    max_tokens: int,
    eos: int,
) -> list[int]:
    """Generate greedily with drafts; the result is what the target alone would generate.

    target: target(tokens)[i] is its most likely token after tokens[: i + 1]
    draft: draft(tokens, n) proposes at most n tokens, possibly fewer or none
    gamma: tokens to ask for; max_tokens: to generate at most; eos: ends the text, and is part of it
    returns: the generated tokens, without the prompt
    """
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        proposed = draft(list(tokens), gamma)
        choices = target(tokens + proposed)[len(tokens) - 1 :]
        accepted = 0
        while accepted < len(proposed) and proposed[accepted] == choices[accepted]:
            accepted += 1
        for token in proposed[:accepted] + [choices[accepted]]:
            tokens.append(token)
            if token == eos or len(tokens) - len(prompt) == max_tokens:
                return tokens[len(prompt) :]
    return tokens[len(prompt) :]


def _toy_target(modulus: int) -> Callable[[list[int]], list[int]]:
    return lambda tokens: [(3 * sum(tokens[: i + 1]) + i) % modulus for i in range(len(tokens))]


def _loop(
    answer: Callable[..., list[int]], draft: str, prompt: Any, gamma: int, max_tokens: int, eos: int
) -> dict[str, Any]:
    """The generated tokens, and how often the target was called."""
    target, propose, start = _target_and_draft(draft, prompt)
    calls = [0]

    def counted(tokens: list[int]) -> list[int]:
        calls[0] += 1
        if calls[0] > 4 * max_tokens + 8:
            raise RuntimeError("the target was called far too often: does every pass add a token?")
        return target(list(tokens))

    tokens = answer(counted, propose, start, gamma, max_tokens, eos)
    return {"tokens": tokens, "passes of the target": calls[0], **_as_text(draft, tokens)}


def _as_text(draft: str, tokens: list[int]) -> dict[str, str]:
    if draft != "prompt lookup":
        return {}
    from optinfer.course.exercises.real_model import default_model

    return {"text": default_model()[1].decode(tokens)}


def _target_and_draft(kind: str, prompt: Any) -> tuple[Any, Any, list[int]]:
    if kind == "prompt lookup":
        from optinfer.course.exercises.real_model import chat, default_model

        model, tokenizer = default_model()

        def real(tokens: list[int]) -> list[int]:
            with torch.inference_mode():
                return model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()

        return real, lambda tokens, n: _latest_copy(tokens, 3, n), chat(tokenizer, prompt)[0].tolist()
    target = _toy_target(11)

    def continued(tokens: list[int], n: int) -> list[int]:
        out = list(tokens)
        for _ in range(n):
            out.append(target(out)[-1])
        return out[len(tokens) :]

    drafts = {
        "perfect": continued,
        "useless": lambda tokens, n: [(t + 1) % 11 for t in continued(tokens, n)],
        "nothing": lambda tokens, n: [],
        "half": lambda tokens, n: [t if i < 2 else (t + 5) % 11 for i, t in enumerate(continued(tokens, n))],
        "short": lambda tokens, n: continued(tokens, n)[: len(tokens) % 3],
    }
    return target, drafts[kind], list(prompt)


def _loop_reference(draft: str, prompt: Any, gamma: int, max_tokens: int, eos: int) -> dict[str, Any]:
    target, propose, start = _target_and_draft(draft, prompt)
    out: list[int] = []
    while len(out) < max_tokens and (not out or out[-1] != eos):
        out.append(target(start + out)[-1])
    passes, done = 0, 0
    while done < len(out):
        proposed = propose(start + out[:done], gamma)
        agree = next((i for i, t in enumerate(proposed) if done + i >= len(out) or t != out[done + i]), len(proposed))
        done, passes = done + agree + 1, passes + 1
    return {"tokens": out, "passes of the target": passes, **_as_text(draft, out)}


def _loop_cases(draw: Draw) -> Iterator[Case]:
    prompt = [draw.random.randrange(11) for _ in range(5)]
    yield case("a perfect draft", "perfect", prompt, 4, 17, -1)
    yield case("a perfect draft of three", "perfect", prompt, 3, 17, -1)
    yield case("nothing may be generated", "perfect", prompt, 3, 0, -1)
    yield case("a draft that is always wrong", "useless", prompt, 4, 9, -1)
    yield case("no draft at all", "nothing", prompt, 3, 6, -1)
    yield case("two right, then wrong", "half", prompt, 5, 16, -1)
    yield case("drafts of different lengths", "short", prompt, 5, 16, -1)
    ending = _loop_reference("nothing", prompt, 1, 12, -1)["tokens"]
    yield case("the text ends inside an accepted draft", "perfect", prompt, 8, 12, ending[4])
    request = "Repeat after me: one two three, one two three."
    yield slow_case("the real model, drafting by prompt lookup", "prompt lookup", request, 4, 10, 2)


LOOP = Exercise(
    id="speculative.in_the_model",
    title="Your own speculative decoder",
    difficulty=5,
    minutes=40,
    prerequisites=("speculative.greedy_verify", "speculative.prompt_lookup"),
    spec="""\
The whole loop: ask the draft, let the target look at everything in one pass, keep what agrees and the target's own next
token, go on. The text must be exactly that of the target alone, including where it ends: at `eos` (kept) or after
`max_tokens`, even in the middle of an accepted draft. The check counts the passes, and at the end runs your loop on the real
model with prompt lookup.""",
    answer=speculative_generate,
    cases=_loop_cases,
    reference=_loop_reference,
    run=_loop,
    model=True,
    limit=60,
    hints=(
        "If the target sees tokens + proposed, at which index is its choice for the first proposed token?",
        "At len(tokens) - 1. Then greedy_verify; append token by token and stop at eos or max_tokens.",
        "`choices = target(tokens + proposed)[len(tokens) - 1 :]`; emit `greedy_verify(proposed, choices)` one at a time, returning at eos or at max_tokens.",
    ),
    wrong=(
        Wrong(
            "the target's choices shifted by one",
            "target(tokens)[i] is the choice *after* token i: the first proposed token is judged at len(tokens) - 1.",
            ("[len(tokens) - 1 :]", "[len(tokens) - 1 :][:1] + target(tokens + proposed)[len(tokens) - 1 :]"),
        ),
        Wrong(
            "running past the end of the text",
            "An accepted draft may contain eos: what follows it must not be kept.",
            ("token == eos or len(tokens) - len(prompt) == max_tokens", "len(tokens) - len(prompt) == max_tokens"),
        ),
        Wrong(
            "more than max_tokens",
            "A pass may bring more tokens than are still wanted: cut.",
            ("token == eos or len(tokens) - len(prompt) == max_tokens", "token == eos"),
        ),
        Wrong(
            "believing the draft",
            "Drafted tokens count only where the target agrees.",
            ("proposed[accepted] == choices[accepted]", "True"),
        ),
        Wrong(
            "a pass for every token",
            "One pass judges all drafted tokens: keep every one that agrees, not only the first.",
            (
                "for token in proposed[:accepted] + [choices[accepted]]:",
                "for token in (proposed[:accepted] + [choices[accepted]])[:1]:",
            ),
        ),
    ),
)

EXERCISES = (EXPECTED_TOKENS, ACCEPTANCE, RESIDUAL, GREEDY, REJECTION, LOOKUP, BEST_LENGTH, LOOP, *today.SPECULATIVE)
