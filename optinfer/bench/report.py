"""Benchmark rows as a table in the terminal and as a plot."""

from pathlib import Path
from typing import Any

from optinfer.bench.rows import Row
from optinfer.card import Table


def show(rows: list[dict[str, Any]]) -> Table:
    """All fields that are not raw samples, in the order in which they first appear."""
    columns = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict))
    )
    body = tuple(tuple(_cell(row.get(column)) for column in columns) for row in rows)
    return Table(tuple(columns), body)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def plot(rows: list[Row], path: Path, most: int = 40) -> None:
    """Seconds of every peer, one line per case, on a logarithmic axis; written as an SVG file. At most `most` cases."""
    import matplotlib.pyplot as plt

    from optinfer import plots

    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.seconds:
            label = ", ".join(f"{k} {v}" for k, v in row.names.items() if k not in ("peer", "dtype"))
            cases.setdefault(label, {})[row.peer or ""] = row.seconds
    shown = dict(list(cases.items())[:most])
    peers = list(dict.fromkeys(peer for case in shown.values() for peer in case))
    plots.style()
    figure, axis = plots.figure(width=9, height=1.5 + 0.3 * len(shown))
    for i, peer in enumerate(peers):
        points = [(case[peer], y) for y, case in enumerate(shown.values()) if peer in case]
        color, marker = plots.CYCLE[i % len(plots.CYCLE)], "os^DvPX*<>"[i % 10]
        axis.plot(*zip(*points, strict=True), marker, color=color, label=peer, alpha=0.8)
    axis.set(xscale="log", xlabel="seconds (median)", yticks=range(len(shown)), yticklabels=list(shown))
    axis.invert_yaxis()
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
