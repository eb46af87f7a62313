"""The engine's timeline in Chromium: a real log of two policies, scrubbed by mouse and by keyboard."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from optinfer.serving import Engine, SamplingParams
from optinfer.widgets.engine_timeline import EngineTimeline


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompts = [[i, i + 1, i + 2, i + 3, i, i + 1, i + 2] for i in range(3, 23, 5)]
    engines = {}
    for policy in ("continuous", "static"):
        engine = Engine(model, num_blocks=9, block_size=4, policy=policy, max_batched_tokens=12,
                        draft="prompt_lookup", adaptive_drafts=False)  # fmt: skip
        engine.generate(prompts, SamplingParams(max_tokens=14, ignore_eos=True))
        engines[policy] = engine
    assert engines["continuous"].stats.preemptions and engines["continuous"].stats.draft_tokens
    return engines


@pytest.fixture
def page(chromium: Browser, engines: dict[str, Engine], tmp_path: Path) -> Iterator[Page]:
    from browser import Complaints, served

    html = f"<!doctype html><html lang=en><title>timeline</title><body>{EngineTimeline.of(**engines).static_html()}"
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    (tmp_path / "favicon.ico").write_bytes(b"")
    with served(tmp_path) as home:
        complaints = Complaints(home)
        page = complaints.watch(chromium.new_context(viewport={"width": 900, "height": 700}).new_page())
        page.goto(home)
        page.locator(".oi-static[data-ready]").wait_for(timeout=20_000)
        yield page
        assert complaints.take() == []
        page.context.close()


def drawn(page: Page, run: int) -> int:
    """Cells of a run's picture: every one has a title."""
    return page.locator("svg").nth(run).locator("rect title").count()


def expected_cells(engine: Engine, steps: int) -> int:
    return sum(len(record.chunks) + len(record.preempted) for record in engine.log[:steps])


def check(page: Page, engines: dict[str, Engine], step: int) -> None:
    longest = max(len(engine.log) for engine in engines.values())
    expect(page.locator("[aria-live]")).to_have_text(f"step {step} of {longest}")
    expect(page.get_by_label("step", exact=True)).to_have_value(str(step - 1))
    for i, engine in enumerate(engines.values()):
        assert drawn(page, i) == expected_cells(engine, step)


def test_by_mouse(page: Page, engines: dict[str, Engine]) -> None:
    check(
        page, engines, max(len(engine.log) for engine in engines.values())
    )  # the whole run, before anything is touched
    page.get_by_label("step", exact=True).fill("0")
    check(page, engines, 1)
    page.get_by_role("button", name="next step").click()
    page.get_by_role("button", name="next step").click()
    check(page, engines, 3)
    page.get_by_role("button", name="previous step").click()
    check(page, engines, 2)
    slider = page.get_by_label("step", exact=True)
    box = slider.bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 4, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, y, steps=5)
    middle = int(slider.input_value()) + 1
    check(page, engines, middle)
    page.mouse.move(box["x"] + box["width"] - 1, y, steps=5)
    page.mouse.up()
    longest = max(len(engine.log) for engine in engines.values())
    assert 2 < middle < longest
    check(page, engines, longest)


def test_by_keyboard(page: Page, engines: dict[str, Engine]) -> None:
    slider = page.get_by_label("step", exact=True)
    for _ in range(12):  # from the top of the page, with nothing but the tabulator
        if slider.evaluate("node => node === document.activeElement"):
            break
        page.keyboard.press("Tab")
    expect(slider).to_be_focused()
    page.keyboard.press("Home")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    check(page, engines, 4)
    page.keyboard.press("End")
    check(page, engines, max(len(engine.log) for engine in engines.values()))
    page.keyboard.press("Home")
    check(page, engines, 1)
    page.get_by_role("button", name="next step").focus()
    page.keyboard.press("Enter")
    check(page, engines, 2)


def test_play_and_what_is_said(page: Page, engines: dict[str, Engine]) -> None:
    page.get_by_role("button", name="play").click()
    longest = max(len(engine.log) for engine in engines.values())
    expect(page.locator("[aria-live]")).to_have_text(f"step {longest} of {longest}", timeout=30_000)
    expect(page.get_by_role("button", name="play")).to_have_text("▶ Play")
    titles = page.locator("svg").first.locator("rect title").all_text_contents()
    accepted = [t for t in titles if "drafts accepted" in t]
    preempted = [t for t in titles if t.endswith("preempted")]
    engine = engines["continuous"]
    assert len(preempted) == engine.stats.preemptions
    assert len(accepted) == sum(bool(chunk.drafted) for record in engine.log for chunk in record.chunks)
    name = page.locator("svg").first.get_attribute("aria-label")
    assert name == f"continuous: 4 requests over {len(engine.log)} steps, shown up to step {longest}"
