"""What lookup and adaptive length cost on fixed texts, in passes, beside transformers' prompt lookup.

No model and no clock: the continuation is given, so the target's answer to every draft is known, and a pass over n
tokens is taken to last 1 + SLOPE * (n - 1). Near what a 135M model in bfloat16 shows on a CPU.
"""

import random

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from optinfer.speculative import PromptLookupDraft
from optinfer.speculative.draft_length import AdaptiveLength, FixedLength

SLOPE = 0.0155
MOST = 10


def words(rng, count, vocab=1500):
    """Zipf's law, as words have it: common ones come again by chance."""
    return rng.choices(range(vocab), weights=[1 / (rank + 3) for rank in range(vocab)], k=count)


def copied(rng):
    """The article again, a word changed here and there."""
    article = words(rng, 160)
    return article, [token if rng.random() < 0.96 else rng.randrange(1500) for token in article]


def summarized(rng):
    """Passages of the article with words of one's own between them."""
    article, summary = words(rng, 160), []
    for start in sorted(rng.sample(range(0, 150, 15), 6)):
        summary += article[start : start + rng.randint(3, 15)] + words(rng, rng.randint(1, 6))
    return article, summary


def code(rng):
    """Lines that are made alike, each with a few names of its own."""
    line = words(rng, 12)
    lines = [token if rng.random() < 0.7 else rng.randrange(1500) for _ in range(12) for token in line]
    return words(rng, 40), lines


def fresh(rng):
    """An answer in one's own words."""
    return words(rng, 40), words(rng, 160)


def liar(rng):
    """The last token is always known, and what followed it never follows again."""
    path = [i for step in range(1, 20) for i in (k * step % 23 for k in range(23))]
    return path[:23], path[23:200]


TEXTS = [copied, summarized, code, fresh]


class Ours:
    def __init__(self, length=None, **options):
        self.draft, self.length = PromptLookupDraft(**options), length or AdaptiveLength(MOST)

    def propose(self, text):
        self.evidence = self.draft.evidence(text)
        most = self.length.choose("lookup", self.evidence) if self.evidence else 0
        return self.draft.propose(text, most, None).tokens.tolist() if most else []

    def record(self, drafted, accepted, seconds):
        self.length.record("lookup", drafted, accepted, 1e-4 * drafted, seconds, self.evidence)


class Transformers:
    def __init__(self):
        self.generator = PromptLookupCandidateGenerator(num_output_tokens=MOST, max_length=10_000)

    def propose(self, text):
        return self.generator.get_candidates(text)[0][0, text.shape[1] :].tolist()

    def record(self, drafted, accepted, seconds):
        pass


def replay(decoder, prompt, answer, slope=SLOPE):
    """Passes over the target and their cost, until the answer is written."""
    text, end, passes, cost = torch.tensor([prompt + answer]), len(prompt), 0, 0.0
    while end < text.shape[1]:
        draft = decoder.propose(text[:, :end])[: text.shape[1] - end - 1]
        truth = text[0, end:].tolist()
        accepted = next((i for i, token in enumerate(draft) if token != truth[i]), len(draft))
        seconds = 1 + slope * len(draft)
        decoder.record(len(draft), accepted, seconds)
        end, passes, cost = end + accepted + 1, passes + 1, cost + seconds
    return passes, cost


def total(make, kind, slope=SLOPE):
    """Passes and cost over eight texts of a kind."""
    both = [replay(make(), *kind(random.Random(seed)), slope=slope) for seed in range(8)]
    return sum(passes for passes, _ in both), sum(cost for _, cost in both)


@pytest.mark.parametrize("kind", TEXTS, ids=lambda kind: kind.__name__)
def test_costs_no_more_than_transformers(kind):
    passes, cost = total(Ours, kind)
    their_passes, their_cost = total(Transformers, kind)
    assert cost <= their_cost
    if kind in (copied, summarized):
        assert passes <= their_passes


@pytest.mark.parametrize("slope", [0.0, SLOPE, 0.05, 0.12, 0.3, 1.0])
@pytest.mark.parametrize("kind", [fresh, liar], ids=lambda kind: kind.__name__)
def test_never_much_slower_than_plain(kind, slope):
    for seed in range(8):
        prompt, answer = kind(random.Random(seed))
        _, cost = replay(Ours(), prompt, answer, slope)
        assert cost <= len(answer) / 0.95


def test_worse_policies_are_noticed():
    _, theirs = total(Transformers, summarized)
    assert total(lambda: Ours(FixedLength(3)), summarized)[1] > theirs  # too short
    assert total(lambda: Ours(max_ngram=2, min_ngram=2), summarized)[1] > theirs  # gives up single tokens
    prompt, answer = liar(random.Random(0))
    assert replay(Ours(FixedLength(MOST)), prompt, answer)[1] > len(answer) / 0.95  # never turned off
