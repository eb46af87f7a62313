"""The book as its reader meets it, in Chromium: every page, both themes, phone, paper, no scripts, no server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page


def names(book: Path) -> list[str]:
    from check_book import pages

    return [
        path.relative_to(book).as_posix() for path in pages(book) if path.name != "index.html" or path.parent != book
    ]


def new_page(chromium: Browser, home: str, **options: object) -> tuple[Page, Any]:
    from browser import Complaints

    complaints = Complaints(home)
    page = chromium.new_context(**options).new_page()
    return complaints.watch(page), complaints


@pytest.fixture
def page(chromium: Browser, site: str) -> Iterator[tuple[Page, Any]]:
    page, complaints = new_page(chromium, site, viewport={"width": 1280, "height": 900})
    yield page, complaints
    page.context.close()


def report(found: dict[str, list[str]]) -> str:
    return "\n".join(f"{name}: {problem}" for name, problems in found.items() for problem in problems)


def settle(page: Page) -> None:
    """Until mathematics and widgets are drawn."""
    page.wait_for_load_state("load")
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.oi-static')].every(e => e.dataset.ready)", timeout=20_000
    )


def test_every_page_is_clean(page: tuple[Page, Any], book: Path, site: str) -> None:
    """No error in the console, no failed and no outside request; mathematics drawn, widgets alive, every image there."""
    tab, complaints = page
    found: dict[str, list[str]] = {}
    for name in names(book):
        tab.goto(site + name)
        settle(tab)
        problems = complaints.take()
        if tab.locator(".math.notranslate").count() and not tab.locator("mjx-container").count():
            problems.append("mathematics was not drawn")
        if tab.locator("mjx-merror").count():
            problems.append(f"mathematics with an error: {tab.locator('mjx-merror').first.text_content()}")
        for widget in tab.locator(".oi-static").all():
            if (widget.bounding_box() or {"height": 0})["height"] < 40:
                problems.append(f"widget {widget.get_attribute('data-widget')} is empty")
        problems += tab.evaluate(
            "() => [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => 'image missing: ' + i.src)"
        )
        if problems:
            found[name] = problems
    assert not found, report(found)


def test_the_watch_sees_errors(page: tuple[Page, Any], site: str) -> None:
    tab, complaints = page
    tab.goto(site + "search.html")
    complaints.take()
    tab.evaluate("() => { setTimeout(() => { throw new Error('broken') }); fetch('/missing').catch(() => 0) }")
    tab.evaluate("() => fetch('http://127.0.0.1:9/outside').catch(() => 0)")
    tab.wait_for_timeout(300)
    seen = " ".join(complaints.take())
    assert "broken" in seen and "404" in seen and "outside request" in seen


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_barriers(page: tuple[Page, Any], book: Path, site: str, axe: str, theme: str) -> None:
    """axe finds nothing serious or critical, contrast included."""
    tab, _ = page
    tab.add_init_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
    found: dict[str, list[str]] = {}
    for name in names(book):
        tab.goto(site + name)
        settle(tab)
        assert tab.evaluate("() => document.documentElement.dataset.theme") == theme
        if findings := serious_findings(tab, axe):
            found[name] = findings
    assert not found, report(found)


def serious_findings(tab: Page, axe: str) -> list[str]:
    tab.evaluate(axe)
    result = tab.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{v['id']} ({v['impact']}): {node['html'][:140]} {node.get('failureSummary', '')[:200]}"
        for v in result["violations"]
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"][:3]
    ]


def test_axe_sees_a_barrier(page: tuple[Page, Any], site: str, axe: str) -> None:
    tab, _ = page
    tab.set_content(
        "<html lang=en><title>t</title><main><h1>x</h1><img src='data:,'><p style='color:#eee'>pale</p></main></html>"
    )
    findings = " ".join(serious_findings(tab, axe))
    assert "image-alt" in findings and "color-contrast" in findings


def test_phone(chromium: Browser, book: Path, site: str) -> None:
    """Nothing makes the page itself scroll sideways on a phone."""
    tab, _ = new_page(chromium, site, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    found = {}
    for name in names(book):
        tab.goto(site + name)
        settle(tab)
        over = tab.evaluate("() => document.documentElement.scrollWidth") - 390  # innerWidth would grow with the page
        narrow = tab.evaluate("() => document.querySelector('.bd-article')?.getBoundingClientRect().right ?? 0")
        if over > 1 or narrow > 391:
            found[name] = [f"{over} pixels too wide; the text ends at {narrow}"]
    tab.context.close()
    assert not found, report(found)


def test_paper(chromium: Browser, site: str, tmp_path: Path) -> None:
    """Printed, a chapter is its text and figures: no sidebars, and more than one page of them."""
    tab, _ = new_page(chromium, site)
    tab.goto(site + "notebooks/00_start_here.html")
    settle(tab)
    tab.emulate_media(media="print")
    for furniture in (".bd-sidebar-primary", ".bd-header-article", ".prev-next-footer"):
        assert not any(part.is_visible() for part in tab.locator(furniture).all()), furniture
    assert tab.locator("#jb-print-docs-body h1").is_visible()  # the theme prints a title of its own
    pdf = tab.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") >= 2
    tab.context.close()


def test_widgets_answer(page: tuple[Page, Any], book: Path, site: str) -> None:
    """Each widget changes when its controls are used, by mouse and by keyboard, and none of them raises an error."""
    tab, complaints = page
    seen: set[str] = set()
    for name in names(book):
        if "oi-static" not in (book / name).read_text(encoding="utf-8"):
            continue
        tab.goto(site + name)
        settle(tab)
        for widget in tab.locator(".oi-static").all():
            seen.add(str(widget.get_attribute("data-widget")))
            changed = play(widget)
            assert changed, f"{name}: {widget.get_attribute('data-widget')} answers to nothing"
        assert complaints.take() == [], name
    assert seen, "there is no widget in the book"


def play(widget) -> bool:
    """Use every control once; whether anything changed."""
    before, changed = widget.inner_html(), False
    count = widget.locator("button, input, select").count()
    assert count, "a widget without controls"
    for i in range(count):
        control = widget.locator("button, input, select").nth(i)
        if not control.count() or not control.is_visible() or control.is_disabled():
            continue
        name = control.evaluate(
            "e => e.getAttribute('aria-label') || e.textContent.trim() || [...(e.labels ?? [])].map(l => l.textContent).join()"
        )
        assert name, f"a control without a name: {control.evaluate('e => e.outerHTML')}"
        kind = control.evaluate("e => e.tagName + ':' + (e.type ?? '')")
        values = widget.evaluate("e => [...e.querySelectorAll('input, select')].map(c => c.value + c.checked).join()")
        if kind.startswith("SELECT"):
            control.press("ArrowDown")
        elif kind.startswith("INPUT:range") or kind.startswith("INPUT:number"):
            control.press("ArrowRight" if "range" in kind else "ArrowUp")
        elif kind.startswith("INPUT:text"):
            control.press("End")
            control.type("1")
        else:
            control.click()
        after = widget.evaluate("e => [...e.querySelectorAll('input, select')].map(c => c.value + c.checked).join()")
        changed |= widget.inner_html() != before or values != after
    return changed


def test_without_a_server(chromium: Browser, book: Path) -> None:
    """Opened as files, pages with widgets still live and ask nobody."""
    tab, complaints = new_page(chromium, "file://")
    for name in names(book):
        if "oi-static" in (book / name).read_text(encoding="utf-8"):
            tab.goto((book / name).as_uri())
            settle(tab)
    assert complaints.take() == []
    tab.context.close()


def test_without_scripts(chromium: Browser, site: str) -> None:
    """Where scripts are off, a widget says in words what it shows."""
    tab, _ = new_page(chromium, site, java_script_enabled=False)
    tab.goto(site + "notebooks/00_start_here.html")
    text = tab.locator(".oi-static noscript").first.inner_text()
    assert "GB" in text and tab.locator(".oi-static noscript").first.is_visible()
    tab.context.close()


def test_search(page: tuple[Page, Any], site: str) -> None:
    tab, complaints = page
    tab.goto(site + "search.html?q=roofline")
    tab.locator("#search-results li a").first.wait_for(timeout=20_000)
    assert tab.locator("#search-results li").count() >= 2 and complaints.take() == []


def test_buttons_lead_to_the_release_and_the_master(page: tuple[Page, Any], site: str) -> None:
    from build_notebooks import REPOSITORY, TAG

    tab, _ = page
    tab.goto(site + "notebooks/00_start_here.html")
    links = tab.evaluate("() => [...document.links].map(a => a.href)")
    owner = REPOSITORY.removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{owner}/blob/{TAG}/notebooks/00_start_here.ipynb" in links
    assert f"{REPOSITORY}/edit/main/notebooks/source/00_start_here.md" in links
    assert tab.locator("a.right-next").count() == 1 and tab.locator(".theme-switch-button").count() >= 1
