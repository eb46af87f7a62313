import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

AXE = ("axe-core", "4.10.3", "0f2b4d7dcdf7d1219df8d1959ad68e565f51d14c3f0d88bb71cd59abeb956292")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    import browser

    if browser.find_chromium() is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on the PATH: scripts/ensure_chromium.sh installs one")
    with browser.chromium() as running:
        yield running


@pytest.fixture
def show(chromium: Any, tmp_path: Path) -> Iterator[Callable]:
    """Opens a figure alone on a page as narrow as a phone's. Afterwards: it fits, and nothing complained."""
    from browser import Complaints, served

    with served(tmp_path) as home:
        complaints = Complaints(home)
        page = complaints.watch(chromium.new_context(viewport={"width": 400, "height": 800}).new_page())

        def opened(widget: Any) -> Any:
            text = f"<!doctype html><html lang=en><title>figure</title><body>{widget.static_html()}"
            (tmp_path / "index.html").write_text(text, encoding="utf-8")
            (tmp_path / "favicon.ico").write_bytes(b"")
            page.goto(home)
            page.locator(".oi-static[data-ready]").wait_for(timeout=20_000)
            return page

        yield opened
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert complaints.take() == []
        page.context.close()


@pytest.fixture(scope="session")
def book() -> Path:
    """The built book; built first where it is not up to date."""
    extra = os.environ.get("OPTINFER_BUILD_BOOK", "").split()
    done = subprocess.run(
        [sys.executable, "scripts/build_book.py", *extra], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return ROOT / "_build" / "html"


@pytest.fixture(scope="session")
def site(book: Path) -> Iterator[str]:
    from browser import served

    with served(book) as address:
        yield address


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which looks for barriers to people with disabilities."""
    from build_book import npm_package

    return (npm_package(*AXE) / "axe.min.js").read_text(encoding="utf-8")
