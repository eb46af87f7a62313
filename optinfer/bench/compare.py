"""Two recorded runs of a suite side by side: what got faster, what slower, and what is only noise."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from optinfer.bench.rows import Row, read
from optinfer.results import Recorded

LEAST_CHANGE = 0.03  # smaller differences of medians are not worth reporting, however sure

# What rows are compared by, the first that both have, and what to say of a smaller and of a larger one.
FIGURES = {
    "seconds": ("faster", "slower"),
    "peak_bytes": ("smaller", "larger"),
    "speedup": ("less gain", "more gain"),
}
VERDICTS = (*(word for pair in FIGURES.values() for word in pair), "same", "new", "gone")


def compare(before: Recorded, after: Recorded) -> list[dict[str, Any]]:
    """One row per measurement of either run: its names, the figure before and after, their ratio and a verdict.

    The verdict is not "same" only where the middle halves of the samples do not overlap and the medians differ by more
    than 3 %; without samples, by more than 10 %. "new" or "gone" is what only one run has or could measure.

    Raises:
        ValueError: the files are of different suites, or not of a suite.
    """
    if before.suite != after.suite:
        raise ValueError(f"cannot compare suite {before.suite!r} with {after.suite!r}")
    old, new = (by_names(read(run.suite, run.rows)) for run in (before, after))
    return [_compared(old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]


def by_names(rows: list[Row]) -> dict[tuple[tuple[str, Any], ...], Row]:
    """Rows by what was measured; what was measured several times, such as a ceiling, by its turn, too."""
    seen: Counter[tuple[tuple[str, Any], ...]] = Counter()
    found = {}
    for row in rows:
        key = tuple(row.names.items())
        found[(*key, ("turn", seen[key])) if seen[key] else key] = row
        seen[key] += 1
    return found


def _compared(before: Row | None, after: Row | None) -> dict[str, Any]:
    if before is None or (after is not None and before.skipped and not after.skipped):
        assert after is not None
        return after.names | {"verdict": "new"}
    if after is None or (after.skipped and not before.skipped):
        return before.names | {"verdict": "gone"}
    for figure in FIGURES:
        a, b = getattr(before, figure, None), getattr(after, figure, None)
        if a and b:
            found = {"figure": figure, "before": a, "after": b, "ratio": b / a}
            return before.names | found | {"verdict": verdict(before, after, figure)}
    return before.names | {"verdict": "same"}


def verdict(before: Row, after: Row, figure: str) -> str:
    """What to say of the change of one figure."""
    ratio = getattr(after, figure) / getattr(before, figure)
    low_a, high_a = spread(before, figure)
    low_b, high_b = spread(after, figure)
    less, more = FIGURES[figure]
    if ratio < 1 - LEAST_CHANGE and high_b < low_a:
        return less
    if ratio > 1 + LEAST_CHANGE and low_b > high_a:
        return more
    return "same"


def spread(row: Row, figure: str) -> tuple[float, float]:
    """The middle half of the samples; 5 % around the figure where there are none."""
    samples = getattr(row, "samples", None) if figure == "seconds" else None
    if not isinstance(samples, list) or len(samples) < 4:
        return getattr(row, figure) * 0.95, getattr(row, figure) * 1.05
    quartiles = statistics.quantiles(samples, n=4)
    return quartiles[0], quartiles[2]
