import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optinfer.speculative import break_even_alpha, expected_tokens, operations, optimal_gamma, speedup

alphas = st.floats(0.0, 1.0)


@pytest.mark.parametrize(
    ("alpha", "gamma", "ops", "speed"),
    [
        (0.6, 2, 1.53, 1.96),
        (0.7, 3, 1.58, 2.53),
        (0.8, 2, 1.23, 2.44),
        (0.8, 5, 1.63, 3.69),
        (0.9, 2, 1.11, 2.71),
        (0.9, 10, 1.60, 6.86),
    ],
)
def test_table_1_of_leviathan(alpha, gamma, ops, speed):
    assert round(operations(alpha, gamma), 2) == ops
    assert round(speedup(alpha, gamma, cost=0.0), 2) == speed


@given(alphas, st.integers(0, 12))
def test_expected_tokens_is_the_mean_of_the_capped_geometric(alpha, gamma):
    # gamma accepted with probability alpha^gamma, k < gamma with alpha^k (1 - alpha); one more token each time
    mean = sum((k + 1) * alpha**k * (1 - alpha) for k in range(gamma)) + (gamma + 1) * alpha**gamma
    assert math.isclose(expected_tokens(alpha, gamma), mean, rel_tol=1e-12)


@given(st.floats(0.0, 0.999), st.integers(0, 12))
def test_expected_tokens_is_the_papers_formula(alpha, gamma):
    assert math.isclose(expected_tokens(alpha, gamma), (1 - alpha ** (gamma + 1)) / (1 - alpha), rel_tol=1e-9)


@given(alphas, st.floats(0.0, 1.5))
def test_optimal_gamma_beats_every_other_length(alpha, cost):
    best = optimal_gamma(alpha, cost, max_gamma=30)
    assert all(speedup(alpha, best, cost) >= speedup(alpha, g, cost) - 1e-12 for g in range(31))
    if abs(alpha - cost) > 1e-9:  # corollary 3.9: an improvement exists exactly where alpha > cost
        assert (best > 0) == (alpha > cost)


@pytest.mark.parametrize(
    ("cost", "alpha", "gamma", "gain"),
    [(0.05, 0.5, 3, 1.63), (0.05, 0.8, 8, 3.09), (0.1, 0.7, 4, 1.98), (0.25, 0.9, 6, 2.09), (0.5, 0.8, 2, 1.22)],
)
def test_known_optima(cost, alpha, gamma, gain):
    assert optimal_gamma(alpha, cost) == gamma
    assert round(speedup(alpha, gamma, cost), 2) == gain


def test_measured_verify_curve_and_break_even():
    curve = {1: 1.0, 2: 1.6, 3: 1.6, 4: 1.6, 5: 1.7}
    for gamma, cost in itertools.product((1, 2, 3, 4), (0.0, 0.1)):
        alpha = break_even_alpha(gamma, cost, curve.__getitem__)
        assert alpha is not None
        assert math.isclose(speedup(alpha, gamma, cost, curve.__getitem__), 1.0, rel_tol=1e-9)
    assert break_even_alpha(1, cost=1.5) is None


@pytest.mark.parametrize(
    "bad", [lambda: speedup(1.1, 2, 0.1), lambda: expected_tokens(0.5, -1), lambda: speedup(0.5, 2, -0.1)]
)
def test_bad_input(bad):
    with pytest.raises(ValueError):
        bad()
