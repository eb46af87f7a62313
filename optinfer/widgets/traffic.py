"""Requests that come at random: choose their rate and the budget of a step, see the queue and the waits of the users."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optinfer.serving.records import StepRecord
from optinfer.serving.traffic import Arrival, Promise, Rehearsal, Service, serve
from optinfer.widgets.base import StaticWidget, traitlets

COLUMNS = 120  # of the picture of the queue


class TrafficExplorer(StaticWidget):
    """Rate and budget in, percentiles and queue out. Use `TrafficExplorer.of(...)`.

    Each pair was rehearsed before with the real scheduler, so the figure holds no second model of it.

    Traits:
        rates: requests per second, ascending.
        budgets: most tokens of a step, ascending.
        runs: runs[budget][rate], what came of each pair.
        promise: most seconds to the first token and per token after it.
        rate, budget: the pair that is shown, as places in the lists.
    """

    _esm = Path(__file__).with_suffix(".js")
    _widget_css = """
.oi-traffic svg { width: 100%; height: auto; display: block; } .oi-traffic text { fill: var(--oi-muted); font-size: 11px; }
.oi-traffic .waiting { fill: var(--oi-orange); } .oi-traffic .running { fill: var(--oi-blue); }
.oi-traffic .sw { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 4px; }
.oi-traffic .sw.waiting { background: var(--oi-orange); } .oi-traffic .sw.running { background: var(--oi-blue); }
.oi-traffic .broken { color: var(--oi-red-text); font-weight: 600; }
"""
    rates = traitlets.List().tag(sync=True)
    budgets = traitlets.List().tag(sync=True)
    runs = traitlets.List().tag(sync=True)
    promise = traitlets.Dict().tag(sync=True)
    rate = traitlets.Int(0).tag(sync=True)
    budget = traitlets.Int(0).tag(sync=True)

    @classmethod
    def of(
        cls,
        trace: Callable[[float], list[Arrival]],
        rehearsal: Callable[[int], Rehearsal],
        rates: Sequence[float],
        budgets: Sequence[int],
        promise: Promise,
    ) -> "TrafficExplorer":
        """Rehearse every pair of a rate and a budget.

        Args:
            trace: the requests that come at a rate (requests per second).
            rehearsal: a fresh rehearsal whose steps compute so many tokens at most.
            rates, budgets: what the reader can choose.

        Raises ValueError: there is no rate or no budget, or one is not above the one before.
        """
        for name, values in (("rates", rates), ("budgets", budgets)):
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must be ascending and not empty, got {list(values)!r}")
        runs = [[_run(trace(rate), rehearsal(budget), promise) for rate in rates] for budget in budgets]
        return cls(
            rates=list(rates),
            budgets=list(budgets),
            runs=runs,
            promise={"ttft": promise.ttft, "tpot": promise.tpot},
            rate=len(rates) // 2,
            budget=len(budgets) // 2,
        )

    def summary(self) -> str:
        lines = [
            f"Traffic: first token promised in {self.promise['ttft']:.3g} s, others in {self.promise['tpot']:.3g} s"
        ]
        for budget, row in zip(self.budgets, self.runs):
            kept = ", ".join(f"{run['kept']:.0%} at {rate:.3g}/s" for rate, run in zip(self.rates, row))
            lines.append(f"steps of {budget} tokens at most: promise kept for {kept}")
        return "\n".join(lines)


def _run(trace: list[Arrival], rehearsal: Rehearsal, promise: Promise) -> dict[str, Any]:
    service = Service.of(serve(rehearsal, trace), promise)
    seconds = rehearsal.clock()
    return {
        "ttft": _known(service.ttft),
        "tpot": _known(service.tpot),
        "kept": service.kept,
        "goodput": service.goodput,
        "seconds": seconds,
        "waiting": _columns(rehearsal.log, seconds, lambda record: record.waiting),
        "running": _columns(rehearsal.log, seconds, lambda record: record.running),
    }


def _known(percentiles: dict[int, float]) -> list[float | None]:
    """None where nothing was measured (requests of one token have no time per further token): JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in percentiles.values()]


def _columns(log: list[StepRecord], seconds: float, count: Callable[[StepRecord], int]) -> list[int]:
    """The most that a step counted in each of COLUMNS equal pieces of the time; 0 where no step ran."""
    most = [0] * COLUMNS
    for record in log:
        first, last = (int(when / seconds * COLUMNS) for when in (record.start, record.start + record.seconds))
        for column in range(first, min(last + 1, COLUMNS)):
            most[column] = max(most[column], count(record))
    return most
