"""What the book needs beyond Jupyter Book: a Sphinx extension, named in book.yml.

- figures get an alternative text, and a widget that a page without a kernel could not show fails the build;
- a word that is linked to the glossary shows its definition under the mouse, as in JupyterLab;
- badges become plain links, because a badge is an image from another server;
- "open in Colab" leads to the release, "suggest edit" to the master that a notebook is made from;
- what the theme leaves without a name, or out of reach of the keyboard, gets one;
- docstrings, written for Python's help(), become reStructuredText.
"""

import html
import re
from pathlib import Path
from typing import Any

import glossary
from build_notebooks import REPOSITORY, TAG
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

LOG = logging.getLogger(__name__)
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_SECTION = re.compile(r"([A-Z]\w+):$")
_PROGRESS_BAR = re.compile(r"\d+%\||\d+it \[")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", badges_to_links)
    app.connect("doctree-read", describe_figures)
    app.connect("doctree-read", check_widgets)
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=100)  # before napoleon
    app.connect("html-page-context", correct_links, priority=900)
    app.connect("html-page-context", explain_words, priority=900)
    app.connect("html-page-context", load_scripts_once, priority=900)
    app.connect("build-finished", name_controls)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def badges_to_links(app: Sphinx, doctree: nodes.document) -> None:
    """Replace a linked image from another server by its alternative text; Sphinx would make the page fetch it."""
    for image in list(doctree.findall(nodes.image)):
        if "://" not in image["uri"]:
            continue
        if not isinstance(image.parent, nodes.reference):
            LOG.warning("image from another server: %s", image["uri"], location=image)
            continue
        image.parent["classes"].append("badge-link")
        image.replace_self(nodes.Text(image.get("alt", "open")))


def _bundles(doctree: nodes.document) -> list[tuple[nodes.Element, dict[str, nodes.Element]]]:
    """Each displayed output with its alternatives by MIME type."""
    found = []
    for bundle in doctree.findall(nodes.container):
        if bundle.get("nb_element") == "mime_bundle":
            found.append((bundle, {part["mime_type"]: part for part in bundle.children if "mime_type" in part}))
    return found


def describe_figures(app: Sphinx, doctree: nodes.document) -> None:
    """A figure's alternative text is what the notebook says in plain text instead, or else its section's title."""
    for bundle, parts in _bundles(doctree):
        text = parts["text/plain"].astext().strip() if "text/plain" in parts else ""
        if not text or text.startswith("<"):
            text = f"Figure in the section “{_section_title(bundle)}”"
        for image in bundle.findall(nodes.image):
            image.setdefault("alt", " ".join(text.split()))


def _section_title(node: nodes.Node | None) -> str:
    while node is not None and not isinstance(node, nodes.section):
        node = node.parent
    return node.next_node(nodes.title).astext() if node is not None else "this page"


def check_widgets(app: Sphinx, doctree: nodes.document) -> None:
    """Remove finished progress bars; complain about any other widget that would vanish from the page."""
    for bundle, parts in _bundles(doctree):
        if WIDGET_VIEW not in parts or "text/html" in parts:
            continue
        text = parts["text/plain"].astext() if "text/plain" in parts else ""
        if _PROGRESS_BAR.search(text):
            bundle.parent.remove(bundle)
        else:
            where = f"{app.env.docname}, section “{_section_title(bundle)}”"
            LOG.warning("a widget has no text/html and would vanish from the page: %s in %s", text, where)


def docstring_to_rst(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Escape what reStructuredText would take for markup, fences become literal blocks, unknown sections quotations."""
    fenced, out = False, []
    for line in lines:
        if line.strip().startswith("```"):
            fenced = not fenced
            out += ["::", ""] if fenced else [""]
        elif fenced:
            out.append(f"    {line}")
        else:
            parts = re.split(r"(``.+?``|`[^`]+`)", line)
            parts[::2] = [re.sub(r"\*|\||(?<=\w)_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
            out.append("".join(parts))
    known = {"Args", "Returns", "Raises", "Yields", "Attributes", "Example", "Examples", "Note", "Notes"}
    known |= {section[0] for section in app.config.napoleon_custom_sections or []}
    lines[:] = []
    indent, inside_known = 0, False
    for line in out:
        if line.strip():
            now = len(line) - len(line.lstrip())
            if header := _SECTION.fullmatch(line):
                inside_known = header[1] in known
            elif now == 0:
                inside_known = False
            if now != indent and not inside_known and lines and lines[-1].strip():
                lines.append("")  # a quotation, to reStructuredText
            indent = now
        lines.append(line)


_WORD = re.compile(r'<a class="reference internal" (href="[^"]*book/glossary\.html")>(<span[^>]*>)?([^<]+)')


def explain_words(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Give links to the glossary their definition as title again; Sphinx drops it where it resolves a link."""

    def titled(match: re.Match[str]) -> str:
        definition = glossary.definition_of(html.unescape(match[3]))
        title = f' title="{html.escape(definition)}"' if definition else ""
        return f'<a class="reference internal" {match[1]}{title}>{match[2] or ""}{match[3]}'

    if context.get("body"):
        context["body"] = _WORD.sub(titled, context["body"])


def correct_links(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    source = Path(app.env.doc2path(page, base=False)) if doctree else None
    if source is None or source.suffix != ".ipynb":
        _drop(context, lambda button: "colab" in button.get("url", ""))
        return
    master = f"notebooks/source/{source.relative_to('notebooks').with_suffix('.md').as_posix()}".replace(
        "/solutions/", "/exercises/"
    )
    for button in _buttons(context.get("header_buttons", [])):
        url = button.get("url", "")
        if "colab.research.google.com" in url:
            button["url"] = url.replace("/blob/main/", f"/blob/{TAG}/")
        elif "/edit/" in url:
            button["url"] = f"{REPOSITORY}/edit/main/{master}"


def _buttons(buttons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [b for button in buttons for b in (_buttons(button["buttons"]) if "buttons" in button else [button])]


def _drop(context: dict[str, Any], unwanted: Any) -> None:
    """Remove buttons, and groups that are then empty."""
    kept = []
    for button in context.get("header_buttons", []):
        if "buttons" in button:
            button["buttons"] = [b for b in button["buttons"] if not unwanted(b)]
            if not button["buttons"]:
                continue
        elif unwanted(button):
            continue
        kept.append(button)
    context["header_buttons"] = kept


def load_scripts_once(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """sphinx-thebe adds its inline configuration twice, and the second declaration is an error in the console."""
    context["script_files"] = [
        script
        for i, script in enumerate(context.get("script_files", []))
        if not (script in context["script_files"][:i] or "THEBE_JS_URL" in str(getattr(script, "attributes", "")))
    ]


# What the theme writes, and what a screen reader or a keyboard needs instead.
_NAMES = (
    (
        '<summary><span class="toctree-toggle"',
        '<summary aria-label="Show the pages below"><span class="toctree-toggle"',
    ),
    ('<div role="list" class="citation-list">', '<div class="citation-list">'),
    ('<table class="table">', '<table class="table" tabindex="0">'),
    ("<table>", "<table tabindex=0>"),  # no quotes: it may stand in a script's string
)


def name_controls(app: Sphinx, error: Exception | None) -> None:
    if error is not None:
        return
    for page in Path(app.outdir).rglob("*.html"):
        before = text = page.read_text(encoding="utf-8")
        for old, new in _NAMES:
            text = text.replace(old, new)
        if text != before:
            page.write_text(text, encoding="utf-8")
