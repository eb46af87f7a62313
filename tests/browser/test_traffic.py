"""The widget of traffic in Chromium: what is drawn is the pair that the sliders name."""

from collections.abc import Callable

from playwright.sync_api import expect

from optinfer.serving import Arrival, Promise, Rehearsal, StepCost, arrival_times
from optinfer.widgets.traffic import TrafficExplorer


def test_sliders_choose_the_run(show: Callable) -> None:
    widget = TrafficExplorer.of(
        lambda rate: [Arrival(when, tuple(range(40)), 8) for when in arrival_times(rate, 20, seed=3)],
        lambda budget: Rehearsal(StepCost(0.01, 0.0005), 256, max_batched_tokens=budget, prefix_caching=False),
        [1.0, 20.0, 200.0],
        [16, 128],
        Promise(0.3, 0.05),
    )
    page = show(widget)
    rate, budget = page.get_by_label("Requests come"), page.get_by_label("A step computes")
    for i, key in enumerate(("Home", "End")):
        budget.focus()
        page.keyboard.press(key)
        for j in range(3):
            rate.focus()
            page.keyboard.press("Home")
            for _ in range(j):
                page.keyboard.press("ArrowRight")
            run = widget.runs[i][j]
            expect(page.locator("[aria-live]")).to_contain_text(f"{100 * run['kept']:.0f} % of the requests")
            for kind in ("waiting", "running"):
                counts = page.locator(f"rect.{kind}").evaluate_all("nodes => nodes.map(n => Number(n.dataset.count))")
                assert sum(counts) == sum(run[kind])
    assert page.locator("td.broken").count() > 0  # the last pair breaks the promise
