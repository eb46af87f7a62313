"""Two recorded runs of a suite side by side: what got faster, what slower, and what is only noise."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from optinfer.results import Recorded

LEAST_CHANGE = 0.03  # smaller differences of medians are not worth reporting, however sure


def compare(before: Recorded, after: Recorded) -> list[dict[str, Any]]:
    """One row per measurement that both runs have: seconds before and after, their ratio and a verdict.

    "faster" or "slower" only where the middle halves of the samples do not overlap and the medians differ by more
    than 3 %; without samples, by more than 10 %. Rows of only one run have the verdict "new" or "gone".

    Raises:
        ValueError: the files are of different suites.
    """
    if before.suite != after.suite:
        raise ValueError(f"cannot compare suite {before.suite!r} with {after.suite!r}")
    old, new = ({key(row): row for row in run.rows if row.get("seconds")} for run in (before, after))
    rows = []
    for which in dict.fromkeys([*old, *new]):
        a, b = old.get(which), new.get(which)
        row: dict[str, Any] = dict(which)
        row["before"] = a and a["seconds"]
        row["after"] = b and b["seconds"]
        row["ratio"] = b["seconds"] / a["seconds"] if a and b else None
        row["verdict"] = verdict(a, b) if a and b else "new" if b else "gone"
        rows.append(row)
    return rows


def key(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What was measured. A row names its case first; the first measured figure, a float, ends the names."""
    case = itertools.takewhile(lambda item: not isinstance(item[1], float), row.items())
    return tuple(sorted((k, v) for k, v in case if isinstance(v, str | int)))


def verdict(before: dict[str, Any], after: dict[str, Any]) -> str:
    """faster, slower or same."""
    ratio = after["seconds"] / before["seconds"]
    low_a, high_a = spread(before)
    low_b, high_b = spread(after)
    if ratio < 1 - LEAST_CHANGE and high_b < low_a:
        return "faster"
    if ratio > 1 + LEAST_CHANGE and low_b > high_a:
        return "slower"
    return "same"


def spread(row: dict[str, Any]) -> tuple[float, float]:
    """The middle half of the samples; 5 % around the figure where there are none."""
    samples = row.get("samples") or []
    if len(samples) < 4:
        return row["seconds"] * 0.95, row["seconds"] * 1.05
    quartiles = statistics.quantiles(samples, n=4)
    return quartiles[0], quartiles[2]
