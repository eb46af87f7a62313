"""Check a built book without a browser: `python scripts/check_book.py [FOLDER]`.

Looks for what a reader would stumble over: links and anchors that lead nowhere, figures without alternative text, files
that a page would fetch from elsewhere, outputs that are empty, mathematics left as source, errors that were printed.
"""

import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("search.html", "genindex.html", "py-modindex.html", "prf-prf.html")
_FETCHED = (("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src"))
_LINKS_THAT_FETCH_NOTHING = {"canonical", "next", "prev", "search", "index", "author", "license"}


@cache
def _page(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@cache
def _anchors(path: Path) -> frozenset[str]:
    return frozenset(str(tag["id"]) for tag in _page(path).find_all(id=True))


def pages(folder: Path) -> list[Path]:
    """Every page of the book, without Sphinx's own."""
    static = folder / "_static"
    return [p for p in sorted(folder.rglob("*.html")) if static not in p.parents and "_sources" not in p.parts]


def problems(folder: Path) -> list[str]:
    """One line for each finding; empty when the book is sound."""
    found = []
    for path in pages(folder):
        name = path.relative_to(folder)
        found += [f"{name}: {problem}" for problem in _problems_of_page(path, folder)]
    return found


def _problems_of_page(path: Path, folder: Path) -> list[str]:
    page = _page(path)
    found = [p for link in page.find_all("a", href=True) if (p := _problem_of_link(str(link["href"]), path, folder))]
    for tag, attribute in _FETCHED:
        for element in page.find_all(tag):
            url = str(element.get(attribute, ""))
            if tag == "link" and _LINKS_THAT_FETCH_NOTHING & set(element.get("rel") or []):
                continue
            if "//" in url and not url.startswith("data:"):
                found.append(f"fetches {url}")
            elif (
                url and not url.startswith(("data:", "#")) and not (path.parent / unquote(urlsplit(url).path)).exists()
            ):
                found.append(f"<{tag}> misses {url}")
    for image in page.find_all("img"):
        alt = str(image.get("alt", ""))
        source = str(image.get("src", ""))
        if not alt.strip() or alt.strip() == source or alt.endswith((".png", ".svg")):
            found.append(f"image without alternative text: {source}")
    for output in page.select("div.cell_output"):
        drawn = output.find(["img", "svg", "table", "script", "math"])
        if not drawn and not output.get_text(strip=True):
            found.append(f"empty output in section {_heading_of(output)}")
        if output.select_one(".traceback") or "Traceback (most recent call last)" in output.get_text():
            found.append(f"an error was printed in section {_heading_of(output)}")
        for widget in output.select("div.oi-static"):
            summary = widget.find("noscript")
            if summary is None or len(summary.get_text(strip=True)) < 20:
                found.append(f"widget {widget.get('data-widget')} has no summary for readers without scripts")
    return found


def _problem_of_link(link: str, path: Path, folder: Path) -> str | None:
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        return _problem_of_repository_link(link)
    if parts.scheme:
        return None if parts.scheme in ("mailto", "javascript", "data") else f"strange link {link}"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return f"broken link {link}"
    fragment = unquote(parts.fragment)
    if fragment and target.suffix == ".html" and fragment not in _anchors(target) and target.name not in GENERATED:
        return f"broken anchor {link}"
    return None


def _problem_of_repository_link(link: str) -> str | None:
    """A link into the repository must name a file that is there."""
    from build_notebooks import REPOSITORY

    owner = REPOSITORY.removeprefix("https://github.com/")
    for kind in ("blob", "edit", "tree"):
        for before in (f"{REPOSITORY}/{kind}/", f"https://colab.research.google.com/github/{owner}/{kind}/"):
            if link.startswith(before):
                file = urlsplit(link.removeprefix(before)).path.split("/", 1)[1]
                return None if (ROOT / file).exists() else f"no such file in the repository: {link}"
    return None


def _heading_of(element: object) -> str:
    heading = element.find_previous(["h1", "h2", "h3"])  # type: ignore[attr-defined]
    return repr(heading.get_text(strip=True).rstrip("#")) if heading else "(none)"


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_build" / "html"
    found = problems(folder)
    print(*found, f"{len(pages(folder))} pages, {len(found)} problems", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
