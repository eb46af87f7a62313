"""The widget of traffic in Chromium: what is drawn is the pair that the sliders name."""

from pathlib import Path

from playwright.sync_api import Browser, expect

from optinfer.serving import Arrival, Promise, Rehearsal, StepCost, arrival_times
from optinfer.widgets.traffic import TrafficExplorer


def test_sliders_choose_the_run(chromium: Browser, tmp_path: Path) -> None:
    from browser import Complaints, served

    widget = TrafficExplorer.of(
        lambda rate: [Arrival(when, tuple(range(40)), 8) for when in arrival_times(rate, 20, seed=3)],
        lambda budget: Rehearsal(StepCost(0.01, 0.0005), 256, max_batched_tokens=budget, prefix_caching=False),
        [1.0, 20.0, 200.0],
        [16, 128],
        Promise(0.3, 0.05),
    )
    html = f"<!doctype html><html lang=en><title>traffic</title><body>{widget.static_html()}"
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    (tmp_path / "favicon.ico").write_bytes(b"")
    with served(tmp_path) as home:
        complaints = Complaints(home)
        page = complaints.watch(chromium.new_context(viewport={"width": 400, "height": 800}).new_page())
        page.goto(home)
        page.locator(".oi-static[data-ready]").wait_for(timeout=20_000)
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
                    counts = page.locator(f"rect.{kind}").evaluate_all(
                        "nodes => nodes.map(n => Number(n.dataset.count))"
                    )
                    assert sum(counts) == sum(run[kind])
        assert page.locator("td.broken").count() > 0  # the last pair breaks the promise
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert complaints.take() == []
        page.screenshot(path=tmp_path / "picture.png")
        page.context.close()
