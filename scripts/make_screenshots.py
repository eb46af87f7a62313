"""Make the README's pictures: figures of the built book, in light and dark, in a real browser.

    make book && .venv/bin/python scripts/make_screenshots.py [BUILT_BOOK]

Each picture is one element of one page; the same run gives the same picture but for measured figures.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from browser import chromium, served
from playwright.sync_api import Page

from optinfer.folders import new_file

ROOT = Path(__file__).resolve().parents[1]
BOOK = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_build" / "html"
IMAGES = ROOT / "notebooks" / "book" / "images"


@dataclass(frozen=True)
class Picture:
    """What to show: the page, the element, the window's width in pixels, how far to scrub first."""

    name: str
    page: str
    selector: str = ".oi"
    width: int = 1100
    scrub: float | None = None  # share of the first slider's way


PICTURES = (
    Picture("kv_memory", "notebooks/04_kv_cache.html", scrub=0.6),
    Picture("number_formats", "notebooks/01_quantization.html"),
    Picture("memory_calculator", "notebooks/00_start_here.html"),
    Picture("engine_timeline", "notebooks/06_putting_it_together.html", scrub=0.5),
)

SCRUB = """(slider, share) => {
  slider.value = Math.round(Number(slider.max) * share);
  slider.dispatchEvent(new Event('input', { bubbles: true }));
}"""


def take(page: Page, address: str, picture: Picture, theme: Literal["light", "dark"]) -> bytes:
    page.set_viewport_size({"width": picture.width, "height": 1600})
    page.emulate_media(color_scheme=theme)
    page.goto(address + picture.page)
    page.evaluate("theme => { localStorage.setItem('mode', theme); localStorage.setItem('theme', theme) }", theme)
    page.reload()
    element = page.locator(picture.selector).first
    element.scroll_into_view_if_needed()
    if picture.scrub is not None:
        element.locator("input[type=range]").first.evaluate(SCRUB, picture.scrub)
    page.wait_for_timeout(400)  # transitions
    return element.screenshot(animations="disabled")


def main() -> None:
    if not (BOOK / "index.html").exists():
        raise SystemExit("build the book first: make book")
    with served(BOOK) as address, chromium() as browser:
        themes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
        for theme in themes:
            page = browser.new_context(device_scale_factor=1.5).new_page()
            for picture in PICTURES:
                target = IMAGES / f"{picture.name}-{theme}.png"
                with new_file(target) as work:
                    work.write_bytes(take(page, address, picture, theme))
                print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e3:.0f} kB")
            page.context.close()


if __name__ == "__main__":
    main()
