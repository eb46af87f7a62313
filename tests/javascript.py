"""What runs JavaScript in tests: node of the system, or the one that comes with Playwright."""

import importlib.util
import shutil
from pathlib import Path

import pytest


def node() -> str | None:
    """The program, or None."""
    if found := shutil.which("node"):
        return found
    playwright = importlib.util.find_spec("playwright")
    driver = playwright and Path(str(playwright.origin)).parent / "driver" / "node"
    return str(driver) if driver and driver.exists() else None


NODE = node()
needs_node = pytest.mark.skipif(NODE is None, reason="needs node")
