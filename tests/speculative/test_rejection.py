"""The law of the output, by exact enumeration and by sampling."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from optinfer.speculative.rejection import (
    acceptance_probability,
    greedy_accept,
    output_distribution,
    rejection_sample,
    residual_distribution,
)


def random_laws(seed, *shape, sharpness=2.0, zeros=0.2):
    """Distributions over the last axis, some entries exactly zero."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    logits = sharpness * torch.randn(*shape, generator=g, dtype=torch.float64)
    hidden = torch.rand(*shape, generator=g) < zeros
    hidden[..., 0] = False
    return logits.masked_fill(hidden, float("-inf")).softmax(-1)


@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([0.0, 0.3, 4.0]))
def test_first_token_has_the_targets_law(seed, vocab, sharpness):
    p, q = random_laws(seed, vocab, sharpness=sharpness), random_laws(seed + 1, vocab)
    assert (output_distribution(q, p) - p).abs().max() < 1e-12
    assert (output_distribution(p, p) - p).abs().max() < 1e-12


def law_of_texts(p, q, length, gamma, accept=acceptance_probability, residual=residual_distribution):
    """The exact law of the first ``length`` tokens, every draft and every coin enumerated.

    ``p(prefix)`` and ``q(prefix)`` give the next token's law after a text: both depend on all of it, as in a real model.
    ``q`` may return an int: a deterministic draft.
    """
    vocab = len(p(()))
    law = {}

    def decode(text, weight):
        if weight == 0:
            return
        if len(text) >= length:
            law[text[:length]] = law.get(text[:length], 0.0) + weight
            return
        verify(text, (), weight)

    def verify(text, drafted, weight):
        """``drafted`` was accepted so far in this pass."""
        here = text + drafted
        if len(drafted) == gamma:
            for x in range(vocab):
                decode((*here, x), weight * float(p(here)[x]))
            return
        guess = q(here)
        fixed = isinstance(guess, int)
        one_hot = torch.nn.functional.one_hot(torch.tensor(guess), vocab).double() if fixed else guess
        for x in [guess] if fixed else range(vocab):
            chance = 1.0 if fixed else float(guess[x])
            if chance == 0:
                continue
            coin = float(accept(torch.tensor([x]), None if fixed else guess[None], p(here)[None])[0])
            verify(text, (*drafted, x), weight * chance * coin)
            if coin < 1:
                left = residual(one_hot, p(here))
                for y in range(vocab):
                    decode((*here, y), weight * chance * (1 - coin) * float(left[y]))

    decode((), 1.0)
    return law


def models(seed, vocab):
    def of(offset):
        laws = {}

        def law(prefix):
            if prefix not in laws:
                laws[prefix] = random_laws(hash((seed, offset, prefix)) % 2**31, vocab)
            return laws[prefix]

        return law

    return of(0), of(1)


def distance(p, law, length, vocab):
    worst = 0.0
    for text in itertools.product(range(vocab), repeat=length):
        exact = 1.0
        for i, x in enumerate(text):
            exact *= float(p(text[:i])[x])
        worst = max(worst, abs(exact - law.get(text, 0.0)))
    return worst


@pytest.mark.parametrize(("gamma", "vocab"), [(1, 3), (2, 3), (3, 2)])
@pytest.mark.parametrize("draft", ["sampled", "deterministic", "itself"])
def test_whole_texts_have_the_targets_law(gamma, vocab, draft):
    p, q = models(gamma, vocab)
    if draft == "itself":
        q = p
    if draft == "deterministic":
        sampled, q = q, lambda prefix: int(sampled(prefix).argmax())
    assert distance(p, law_of_texts(p, q, 3, gamma), 3, vocab) < 1e-12


def test_enumeration_notices_a_wrong_rule():
    p, q = models(5, 3)
    assert distance(p, law_of_texts(p, q, 2, 2, residual=lambda q, p: p), 2, 3) > 1e-3
    always = lambda x, q, p: torch.ones(1, dtype=p.dtype)  # noqa: E731
    assert distance(p, law_of_texts(p, q, 2, 2, accept=always), 2, 3) > 1e-3


@pytest.mark.parametrize("deterministic", [False, True])
def test_chi_square_of_1e5_samples(deterministic):
    vocab, gamma, n = 5, 2, 100_000
    p, q = random_laws(1, gamma + 1, vocab, zeros=0.0), random_laws(2, gamma, vocab, zeros=0.0)
    g = torch.Generator(torch.get_default_device()).manual_seed(3)
    if deterministic:
        drafts = torch.tensor([1, 3]).expand(n, gamma)
        laws = None
    else:
        drafts = torch.stack([torch.multinomial(q[k], n, replacement=True, generator=g) for k in range(gamma)], dim=1)
        laws = q.expand(n, gamma, vocab)
    out = rejection_sample(drafts, laws, p.expand(n, gamma + 1, vocab), generator=g)
    for k in range(gamma + 1):  # the laws do not depend on the text here, so each position must have its own
        seen = out[:, k][out[:, k] >= 0]
        counts = torch.bincount(seen, minlength=vocab).double()
        assert chisquare(counts.cpu().numpy(), (p[k] * len(seen)).cpu().numpy()).pvalue > 1e-4
    # acceptance is sum min(p, q), within 3 sigma
    expected = float(p[0, 1]) if deterministic else float(torch.minimum(p[0], q[0]).sum())
    accepted = float((out[:, 1] >= 0).double().mean())
    assert abs(accepted - expected) < 3 * (expected * (1 - expected) / n) ** 0.5 + 1e-9


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(2, 6), st.integers(1, 4))
def test_shapes_and_padding(seed, gamma, vocab, batch):
    p = random_laws(seed, batch, gamma + 1, vocab)
    q = random_laws(seed + 1, batch, gamma, vocab) if gamma else torch.zeros(batch, 0, vocab, dtype=torch.float64)
    drafts = (
        torch.multinomial(q.reshape(-1, vocab), 1).view(batch, gamma)
        if gamma
        else torch.zeros(batch, 0, dtype=torch.long)
    )
    out = rejection_sample(drafts, q, p)
    assert out.shape == (batch, gamma + 1)
    kept = out >= 0
    assert (kept[:, :-1] >= kept[:, 1:]).all()  # tokens first, then padding
    assert kept[:, 0].all()
    for row in range(batch):
        n = int(kept[row].sum())
        assert (out[row, : n - 1] == drafts[row, : n - 1]).all()
        assert p[row, n - 1, out[row, n - 1]] > 0
    one = rejection_sample(drafts[0], q[0], p[0])
    assert 1 <= len(one) <= gamma + 1


def test_equal_laws_accept_everything():
    p = random_laws(7, 6, 11).float()
    for seed in range(20):
        g = torch.Generator(torch.get_default_device()).manual_seed(seed)
        drafts = torch.multinomial(p[:5], 1, generator=g).squeeze(1)
        assert len(rejection_sample(drafts, p[:5], p, generator=g)) == 6


def test_seeds_reproduce():
    p, q = random_laws(8, 5, 9), random_laws(9, 4, 9)
    drafts = torch.tensor([0, 0, 0, 0])
    runs = [
        rejection_sample(drafts, q, p, torch.Generator(torch.get_default_device()).manual_seed(4)) for _ in range(2)
    ]
    assert torch.equal(*runs)


@given(st.integers(0, 10**6), st.integers(0, 5))
def test_greedy_is_the_limit_of_temperature_zero(seed, gamma):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    best = torch.randint(0, 3, (gamma + 1,), generator=g)
    drafts = torch.randint(0, 3, (gamma,), generator=g)
    one_hot = torch.nn.functional.one_hot(best, 3).double()
    assert torch.equal(greedy_accept(drafts, best), rejection_sample(drafts, None, one_hot))


@pytest.mark.parametrize(
    ("tokens", "q", "p", "says"),
    [
        (torch.zeros(2, dtype=torch.long), torch.ones(2, 4) / 4, torch.ones(2, 4) / 4, "one position more"),
        (torch.zeros(2, dtype=torch.long), torch.ones(2, 3) / 3, torch.ones(3, 4) / 4, "target's vocabulary"),
        (*(torch.full(shape, x, device="cpu") for shape, x in (((2,), 9), ((2, 4), 0.25), ((3, 4), 0.25))), "0..3"),
        (torch.zeros(1, 1, 1, dtype=torch.long), None, torch.ones(1, 4), "batch"),
    ],
)
def test_bad_input(tokens, q, p, says):
    with pytest.raises(ValueError, match=says):
        rejection_sample(tokens, q, p)


@pytest.mark.parametrize("name", ["draft_tokens", "draft_probs", "generator"])
def test_what_is_on_another_device_is_named(name):
    """Tensors on ``meta`` stand for those on a GPU."""
    given = {
        "draft_tokens": torch.zeros(2, dtype=torch.int64, device="meta"),
        "draft_probs": torch.full((2, 4), 0.25, device="meta"),
        "target_probs": torch.full((3, 4), 0.25, device="meta"),
        "generator": None,
    }
    given[name] = torch.Generator() if name == "generator" else given[name].new_zeros(given[name].shape, device="cpu")
    with pytest.raises(ValueError, match=f"{name} is on cpu and target_probs on meta"):
        rejection_sample(**given)
