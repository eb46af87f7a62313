"""How much speculation can gain (Leviathan, Kalman and Matias 2023, sections 3.3 to 3.5).

``alpha`` is the chance that a drafted token is accepted, the same at every position and independent of the others;
``gamma`` the number of tokens drafted per target pass; ``cost`` the time to draft one token and ``verify_cost`` the time
of the target's pass over gamma + 1 tokens, both in units of the target's pass over one token.
"""

from collections.abc import Callable

VerifyCost = float | Callable[[int], float]


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens per target pass: ``(1 - alpha^(gamma+1)) / (1 - alpha)`` (equation 1).

    Raises:
        ValueError: alpha lies outside [0, 1] or gamma is negative.
    """
    _check(alpha, gamma)
    return sum(alpha**k for k in range(gamma + 1))  # the same sum, safe at alpha = 1


def pass_cost(gamma: int, cost: float, verify_cost: VerifyCost = 1.0) -> float:
    """Time of one round, draft and verify; also the tokens per pass at which speculation breaks even.

    Args:
        verify_cost: a number, or a function from the number of tokens verified (gamma + 1) to their measured cost.
    """
    if cost < 0:
        raise ValueError(f"cost is a time and cannot be negative, got {cost}")
    return gamma * cost + (verify_cost(gamma + 1) if callable(verify_cost) else verify_cost)


def speedup(alpha: float, gamma: int, cost: float, verify_cost: VerifyCost = 1.0) -> float:
    """Expected improvement in wall-clock over plain decoding (theorem 3.8 where ``verify_cost`` is 1).

    Raises:
        ValueError: alpha lies outside [0, 1], gamma or cost is negative.
    """
    return expected_tokens(alpha, gamma) / pass_cost(gamma, cost, verify_cost)


def operations(alpha: float, gamma: int, cost: float = 0.0) -> float:
    """Arithmetic per emitted token over that of plain decoding (theorem 3.11); ``cost`` in operations, not time."""
    return (gamma * cost + gamma + 1) / expected_tokens(alpha, gamma)


def optimal_gamma(alpha: float, cost: float, verify_cost: VerifyCost = 1.0, max_gamma: int = 128) -> int:
    """The draft length with the largest `speedup`; 0 where every draft is slower than plain decoding.

    Raises:
        ValueError: alpha lies outside [0, 1] or cost is negative.
    """
    best = max(range(1, max_gamma + 1), key=lambda gamma: speedup(alpha, gamma, cost, verify_cost))
    return best if speedup(alpha, best, cost, verify_cost) >= 1.0 else 0


def break_even_alpha(gamma: int, cost: float, verify_cost: VerifyCost = 1.0) -> float | None:
    """The acceptance at which `speedup` is 1; None where even a perfect draft loses."""
    needed = pass_cost(gamma, cost, verify_cost)
    if needed > gamma + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, gamma) < needed else (low, middle)
    return high


def _check(alpha: float, gamma: int) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is a probability in [0, 1], got {alpha}")
    if gamma < 0 or gamma != int(gamma):
        raise ValueError(f"gamma counts drafted tokens: 0, 1, 2, …, got {gamma}")
