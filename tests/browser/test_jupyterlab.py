"""JupyterLab as `make lab` opens it: run lessons from the menu, play their widgets by mouse and keyboard."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from browser import jupyterlab

    folder = tmp_path_factory.mktemp("notebooks")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "notebooks" / "book" / "images", folder / "book" / "images")  # the badge
    with jupyterlab(folder) as home:
        yield home


def lesson(number: str) -> str:
    return next(path.name for path in (ROOT / "notebooks").glob(f"{number}_*.ipynb"))


@pytest.mark.parametrize("number", ["00", "01", "04"])
def test_run_from_the_menu(chromium: Browser, lab: str, number: str, tmp_path: Path) -> None:
    from browser import Complaints, open_notebook, run_all_cells

    if not list((ROOT / "notebooks").glob(f"{number}_*.ipynb")):
        pytest.skip(f"there is no lesson {number}")
    # Tall enough for a whole lesson: JupyterLab draws only the cells in view.
    page = chromium.new_context(viewport={"width": 1280, "height": 24_000}).new_page()
    complaints = Complaints(lab)
    complaints.watch(page)
    open_notebook(page, lab, lesson(number))
    run_all_cells(page)
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
    outside = [line for line in complaints.take() if line.startswith(("outside", "error"))]
    assert not outside
    widgets = page.locator(".jp-OutputArea-output .oi")
    expect(widgets.first).to_be_visible(timeout=20_000)
    for widget in widgets.all():
        use_by_mouse_and_keyboard(page, widget)
    page.screenshot(path=tmp_path / f"{number}.png")
    page.context.close()


def use_by_mouse_and_keyboard(page: Page, widget) -> None:
    """A click changes the widget; so does a key, on a control that was reached with the keyboard."""
    state = "e => e.innerHTML + [...e.querySelectorAll('input, select')].map(c => c.value + c.checked).join()"
    buttons = [b for b in widget.locator("button").all() if b.is_visible() and b.is_enabled()]
    sliders = [
        s
        for s in widget.locator("input[type=range], input[type=number], select").all()
        if s.is_visible() and s.is_enabled()
    ]
    assert buttons or sliders
    before = widget.evaluate(state)
    for button in buttons:
        if button.is_enabled():
            button.click()
    if buttons:
        expect_change(page, widget, state, before)
    if sliders:
        before = widget.evaluate(state)
        for slider in sliders:
            if not slider.is_visible():
                continue
            slider.focus()
            for key in ("ArrowLeft", "ArrowDown", "ArrowUp", "ArrowRight", "ArrowUp", "ArrowRight"):
                page.keyboard.press(key)
                if widget.evaluate(state) != before:
                    return
        expect_change(page, widget, state, before)


def expect_change(page: Page, widget, state: str, before: str) -> None:
    for _ in range(20):
        if widget.evaluate(state) != before:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"nothing changed in {widget.inner_text()[:200]}")
