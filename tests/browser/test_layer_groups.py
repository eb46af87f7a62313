"""The figure of layer groups in Chromium: what is drawn is the frame that the slider names."""

from collections.abc import Callable

from playwright.sync_api import expect

from optinfer.kv_cache import LayerCache, layer_groups
from optinfer.widgets.layer_groups import LayerGroupsView


def test_the_slider_chooses_the_step(show: Callable) -> None:
    groups = layer_groups([LayerCache("full", 1, 8, 8), LayerCache("sliding", 1, 8, 8, window=8)])
    widget = LayerGroupsView.of(groups, 20, 4, [("A", 10), ("B", 7), ("A", 20), ("B", 4), ("A", 0)])
    page = show(widget)
    page.get_by_label("Step").focus()
    page.keyboard.press("Home")
    for frame in widget.frames:
        expect(page.locator("output")).to_have_text(frame["text"])
        drawn = page.locator(".page").all_text_contents()
        assert drawn == [f"{owner[0]} {owner[1]}" if owner else "·" for owner in frame["owners"]]
        assert page.locator("tbody tr").count() == len(frame["lengths"])
        page.keyboard.press("ArrowRight")
