"""The figure of layer groups in Chromium: what is drawn is the frame that the slider names."""

from pathlib import Path

from playwright.sync_api import Browser, expect

from optinfer.kv_cache import LayerCache, layer_groups
from optinfer.widgets.layer_groups import LayerGroupsView


def test_the_slider_chooses_the_step(chromium: Browser, tmp_path: Path) -> None:
    from browser import Complaints, served

    groups = layer_groups([LayerCache("full", 1, 8, 8), LayerCache("sliding", 1, 8, 8, window=8)])
    widget = LayerGroupsView.of(groups, 20, 4, [("A", 10), ("B", 7), ("A", 20), ("B", 4), ("A", 0)])
    html = f"<!doctype html><html lang=en><title>groups</title><body>{widget.static_html()}"
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    (tmp_path / "favicon.ico").write_bytes(b"")
    with served(tmp_path) as home:
        complaints = Complaints(home)
        page = complaints.watch(chromium.new_context(viewport={"width": 400, "height": 800}).new_page())
        page.goto(home)
        page.locator(".oi-static[data-ready]").wait_for(timeout=20_000)
        page.get_by_label("Step").focus()
        page.keyboard.press("Home")
        for frame in widget.frames:
            expect(page.locator("output")).to_have_text(frame["text"])
            drawn = page.locator(".page").all_text_contents()
            assert drawn == [f"{owner[0]} {owner[1]}" if owner else "·" for owner in frame["owners"]]
            assert page.locator("tbody tr").count() == len(frame["lengths"])
            page.keyboard.press("ArrowRight")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert complaints.take() == []
        page.screenshot(path=tmp_path / "picture.png")
        page.context.close()
