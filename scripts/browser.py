"""A real browser for the tests and the screenshots: Chromium driven by Playwright, a web server, a JupyterLab."""

import contextlib
import functools
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; `RuntimeError` when there is none."""
    executable = find_chromium()
    if executable is None:
        raise RuntimeError("no Chromium on the PATH; scripts/ensure_chromium.sh installs one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Complaints:
    """What went wrong in a page: errors in the console, failed requests, requests to other servers."""

    home: str  # the only server that the page may ask
    found: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> Page:
        page.on("console", lambda m: self.found.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: self.found.append(f"error: {error}"))
        page.on("requestfailed", lambda r: self.found.append(f"failed: {r.url} {r.failure}"))
        page.on("response", lambda r: self.found.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.on("request", lambda r: self._check(r.url))
        return page

    def _check(self, url: str) -> None:
        scheme, server = urlsplit(url)[:2]
        if scheme in ("http", "https", "ws", "wss") and server != urlsplit(self.home).netloc:
            self.found.append(f"outside request: {url}")

    def take(self) -> list[str]:
        taken, self.found = self.found, []
        return taken


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder as a web site on this machine; yields its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """JupyterLab on a folder of notebooks, started with the command of `make lab`; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "optinfer.cli", "lab", "--no-browser", f"--port={port}", f"--folder={folder}"]
    environment = {**os.environ, "JUPYTER_TOKEN": "test", "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings")}
    log = folder / ".jupyterlab.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    home = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            if server.poll() is not None:
                raise RuntimeError(f"JupyterLab ended: {log.read_text()[-2000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{home}api?token=test", timeout=2):
                break
            time.sleep(0.25)
        else:
            raise RuntimeError(f"JupyterLab did not answer: {log.read_text()[-2000:]}")
        yield home
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()


def open_notebook(page: Page, home: str, name: str) -> None:
    """Open a notebook in JupyterLab and wait until its kernel is there."""
    page.goto(f"{home}lab/tree/{name}?token=test&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    # "Idle" is also said before there is a kernel; cells that are run then would ask for one.
    page.locator(".jp-NotebookPanel .jp-Toolbar-kernelName", has_text="Python 3").first.wait_for(timeout=90_000)
    page.locator(".jp-NotebookPanel [data-status=idle]").first.wait_for(timeout=90_000, state="attached")


def run_all_cells(page: Page, timeout: float = 300) -> None:
    """Menu Run > Run All Cells, as a reader would, and wait until the last cell has run."""
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    # Exactly this entry: another one restarts the kernel first, and asks before it does.
    page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
    page.wait_for_timeout(1000)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not page.evaluate(_STILL_RUNNING):
            return
        page.wait_for_timeout(500)
    raise TimeoutError(f"cells still running after {timeout} s")


# Windowed notebooks keep only the visible cells in the page, so the prompts alone do not tell: ask for busy ones too.
_STILL_RUNNING = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent.trim());
  return prompts.some(p => p === '[*]:' || p === '[ ]:') || !!document.querySelector('.jp-NotebookPanel [data-status=busy]');
}"""
