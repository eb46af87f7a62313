"""The KV Cache Memory Manager in Chromium: every button, every key, linked panes, and a beat for each thing to see."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from optinfer.kv_cache.events import BlockCopied, BlockForgotten, BlockHit, SequenceFreed
from optinfer.widgets.kv_memory import KVMemory, demo_manager


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, chromium: Browser, tmp_path: Path) -> Iterator[Page]:
    from browser import Complaints, served

    html = f"<!doctype html><html lang=en><title>pages</title><body>{KVMemory.demo(interval_ms=60).static_html()}"
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    (tmp_path / "favicon.ico").write_bytes(b"")
    with served(tmp_path) as home:
        complaints = Complaints(home)
        context = chromium.new_context(viewport={"width": 1000, "height": 1300}, color_scheme=request.param)
        page = complaints.watch(context.new_page())
        page.goto(home)
        page.locator(".oi-static[data-ready]").wait_for(timeout=20_000)
        yield page
        page.screenshot(path=tmp_path / "kv_memory.png")
        assert complaints.take() == []
        context.close()


def story(page: Page) -> str:
    return page.locator(".oi-story").inner_text().lower()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=re.compile(f"^{name}")).first.click()


def sequences(page: Page) -> list[str]:
    """The names of the live sequences, as the block tables show them."""
    return page.locator("span.oi-name").all_inner_texts()


def test_every_button(page: Page) -> None:
    press(page, "Reset")
    assert sequences(page) == []
    for name in ("Next token", "Fork", "Preempt", "Finish"):  # nothing to apply them to
        expect(page.get_by_role("button", name=re.compile(f"^{name}"))).to_be_disabled()
    press(page, "Shared system prompt")
    press(page, "Shared system prompt")
    assert "prefix hit" in story(page)
    assert sequences(page) == ["A", "B"]
    expect(page.locator(".oi-tag", has_text="hit")).to_have_count(2)  # both blocks of the system prompt
    press(page, "Next token")  # B's last block was full: the new one has room left
    assert "grow" in story(page)
    press(page, "Fork")
    assert sequences(page) == ["A", "B", "C"]
    press(page, "Next token")  # of B, whose last block is now shared
    assert "copy-on-write" in story(page)
    expect(page.locator(".oi-tag", has_text="copy")).to_have_count(1)
    press(page, "New request")
    assert sequences(page) == ["A", "B", "C", "D"]
    press(page, "Preempt")
    assert "preempt" in story(page)
    assert sequences(page) == ["A", "B", "C"]
    press(page, "Resume D")
    assert sequences(page)[-1] == "D"
    press(page, "Select sequence A")
    press(page, "Finish")
    assert sequences(page) == ["B", "C", "D"]
    press(page, "Step back")
    assert sequences(page) == ["A", "B", "C", "D"]
    press(page, "Step forward")
    assert sequences(page) == ["B", "C", "D"]


def test_a_full_pool_refuses_and_changes_nothing(page: Page) -> None:
    press(page, "Reset")
    for _ in range(30):
        before = sequences(page)
        press(page, "New request")
        if "refused" in story(page):
            break
    else:
        raise AssertionError("thirty requests fit in sixteen pages")
    assert sequences(page) == before


def test_every_kind_of_beat_is_told(page: Page) -> None:
    """Each step of the recording in which something happens to a block says so, and marks the block."""
    total = int(page.get_by_label("Position in the event log").get_attribute("max") or 0)
    told = []
    for _ in range(total):
        press(page, "Step forward")
        told.append((story(page), page.locator(".oi-tag").all_inner_texts()))
    events = demo_manager().events
    expected = {
        "prefix hit": (any(isinstance(e, BlockHit) for e in events), "hit"),
        "copy-on-write": (any(isinstance(e, BlockCopied) for e in events), "copy"),
        "evict": (any(isinstance(e, BlockForgotten) and e.evicted for e in events), "evicted"),
        "preempt": (any(isinstance(e, SequenceFreed) and e.preempted for e in events), None),
    }
    for words, (happened, tag) in expected.items():
        assert happened, f"the demo shows no {words}"
        tags = [tags for text, tags in told if words in text]
        assert tags, f"no step tells of {words}: {[text for text, _ in told]}"
        assert tag is None or any(tag in shown for shown in tags), (words, tags)


def test_by_keyboard(page: Page) -> None:
    widget = page.get_by_role("group", name=re.compile("KV cache memory manager"))
    position = page.get_by_label("Position in the event log")
    widget.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(position).to_have_value("2")
    page.keyboard.press("Space")
    expect(position).to_have_value(position.get_attribute("max") or "", timeout=20_000)
    press(page, "Reset")
    widget.focus()
    for key, live in (("n", 1), ("s", 2), ("f", 3), ("t", 3), ("p", 2)):
        page.keyboard.press(key)
        assert len(sequences(page)) == live, key
    press(page, "Select sequence A")
    widget.focus()
    page.keyboard.press("x")
    assert "A" not in sequences(page)
    position.focus()
    page.keyboard.press("Home")
    assert sequences(page) == []


def test_hover_links_the_panes(page: Page) -> None:
    press(page, "Reset")
    press(page, "Shared system prompt")
    press(page, "Shared system prompt")
    entry = page.get_by_label(re.compile("^entry 0 of B: page"))
    block = entry.get_attribute("data-block")
    for mark in (page.locator(f".oi-vram [data-block='{block}']"), entry):
        mark.hover()
        lit = page.locator(".oi-lit")
        assert set(lit.evaluate_all("nodes => nodes.map(n => n.dataset.block)")) == {block}
        expect(lit).to_have_count(5)  # the page, and a chip and a table entry of each owner
    page.mouse.move(2, 1290)
    page.locator("[data-seq=B]").first.hover()
    owners = page.locator(".oi-lit").evaluate_all("nodes => nodes.map(n => n.dataset.seqs.split('\\n'))")
    assert owners and all("B" in names for names in owners)


def test_the_twin_lane_answers_the_policy(page: Page) -> None:
    """An oracle reserves less than the maximum does; the lane is redrawn when another is chosen."""
    press(page, "Reset")
    press(page, "New request")
    choice = page.get_by_label("Contiguous policy")
    widths = {}
    for policy in ("max", "pow2", "oracle"):
        choice.select_option(policy)
        widths[policy] = sum(p["width"] for p in (n.bounding_box() for n in page.locator(".oi-piece").all()) if p)
    assert widths["max"] > widths["pow2"] >= widths["oracle"] > 0
