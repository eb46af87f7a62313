"""From a measured value and its spread to words: on which side of a line it lies, and what that means for a claim.

Nothing here knows what was measured. A lesson's sentences and verdicts go through these functions, so that another
machine's numbers get another machine's words.
"""

import math
from collections.abc import Iterable
from typing import Literal

Side = Literal["more", "less", "level"]
Verdict = Literal["holds", "in part", "does not hold", "not tested here"]
VERDICTS: tuple[Verdict, ...] = ("holds", "in part", "does not hold", "not tested here")

# Ratios of times closer to each other than this are called equal where a lesson knows no better spread.
SPREAD = 0.05


def side(value: float, of: float = 1.0, spread: float = SPREAD) -> Side:
    """On which side of ``of`` a value lies: ``"level"`` within its spread, and where it is not a number.

    Args:
        value: such as a ratio of two times.
        of: where the direction turns: 1 for a ratio, 0 for a difference.
        spread: how far the value may be off, in its own unit.
    """
    if math.isnan(value) or abs(value - of) <= spread:
        return "level"
    return "more" if value > of else "less"


def judge(value: float | None, holds: float, in_part: float | None = None, spread: float = 0.0) -> Verdict:
    """The verdict on a claim that a value is at least ``holds``.

    Args:
        value: None or NaN where it was not measured.
        holds: the claim's own figure.
        in_part: from here on the claim holds in part; None: from nowhere.
        spread: how far the value may be off. A claim holds only where the whole spread is on its side.
    """
    if value is None or math.isnan(value):
        return "not tested here"
    if value - spread >= holds:
        return "holds"
    if in_part is not None and value - spread >= in_part:
        return "in part"
    return "does not hold"


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim of several parts: what all of them are, "in part" where they differ, untested parts included."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else "in part" if found else "not tested here"
