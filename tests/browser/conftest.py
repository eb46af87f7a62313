import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
