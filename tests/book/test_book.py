"""The book builds without a warning, and the checks of its pages can fail."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from check_book import pages, problems  # noqa: E402


@pytest.fixture(scope="module")
def book() -> Path:
    done = subprocess.run(
        [sys.executable, "scripts/build_book.py"], cwd=ROOT, capture_output=True, text=True, timeout=3400
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "WARNING:" not in done.stderr, done.stderr[-4000:]
    return ROOT / "_build" / "html"


@pytest.mark.book
@pytest.mark.timeout(3600)
def test_the_book_is_sound(book: Path) -> None:
    assert problems(book) == []
    built = {path.relative_to(book).with_suffix("").as_posix() for path in pages(book)}
    notebooks = [p for folder in ("", "exercises/", "solutions/") for p in ROOT.glob(f"notebooks/{folder}*.ipynb")]
    assert {p.relative_to(ROOT).with_suffix("").as_posix() for p in notebooks} <= built


@pytest.mark.book
@pytest.mark.timeout(3600)
def test_every_widget_of_a_lesson_is_in_its_page(book: Path) -> None:
    from notebook_cache import cached

    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        outputs = [o for cell in cached(path).cells for o in cell.get("outputs", [])]
        drawn = sum("oi-static" in "".join(o.get("data", {}).get("text/html", "")) for o in outputs)
        page = (book / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert page.count('class="oi-static"') == drawn, path.name


def page_with(folder: Path, body: str) -> list[str]:
    folder.mkdir()
    (folder / "page.html").write_text(f"<html><body><h1 id='top'>Title</h1>{body}</body></html>")
    return [line.removeprefix("page.html: ") for line in problems(folder)]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<a href='gone.html'>x</a>", "broken link gone.html"),
        ("<a href='#gone'>x</a>", "broken anchor #gone"),
        ("<a href='page.html#gone'>x</a>", "broken anchor page.html#gone"),
        ("<a href='https://github.com/optinfer/optinfer/blob/main/gone.py'>x</a>", "no such file in the repository"),
        ("<script src='https://example.org/x.js'></script>", "fetches https://example.org/x.js"),
        ("<script src='gone.js'></script>", "<script> misses gone.js"),
        ("<img src='data:,'>", "image without alternative text"),
        ("<img src='data:,' alt='_images/1.png'>", "image without alternative text"),
        ("<div class='cell_output'> </div>", "empty output in section 'Title'"),
        ("<div class='cell_output'>Traceback (most recent call last)</div>", "an error was printed"),
        (
            "<div class='cell_output'><div class='oi-static' data-widget='W'></div><table></table></div>",
            "has no summary",
        ),
    ],
)
def test_checks_can_fail(tmp_path: Path, body: str, complaint: str) -> None:
    (found,) = page_with(tmp_path / "bad", body)
    assert found.startswith(complaint) or complaint in found


def test_a_sound_page_passes(tmp_path: Path) -> None:
    body = "<a href='#top'>x</a><a href='page.html#top'>x</a><img src='data:,' alt='A falling line'>"
    body += "<div class='cell_output'>7</div>"
    assert page_with(tmp_path / "good", body) == []


def test_configuration_leaves_nothing_to_a_network() -> None:
    config = yaml.safe_load((ROOT / "book.yml").read_text())["sphinx"]["config"]
    assert config["nb_ipywidgets_js"] == {} and "://" not in config["mathjax_path"]


def test_docstrings_become_restructured_text() -> None:
    from types import SimpleNamespace

    from book_extension import docstring_to_rst

    app = SimpleNamespace(config=SimpleNamespace(napoleon_custom_sections=[]))
    lines = [
        "About |x| and *args of `a*b` in trailing_.",
        "",
        "Levels:",
        "    one: first",
        "Then more.",
        "",
        "Args:",
        "    x: it",
    ]
    docstring_to_rst(app, "function", "f", None, None, lines)
    assert lines[0] == r"About \|x\| and \*args of `a*b` in trailing\_."
    assert lines[2:7] == ["Levels:", "", "    one: first", "", "Then more."]
    assert lines[-2:] == ["Args:", "    x: it"]
