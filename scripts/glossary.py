"""The course's words: read from the glossary, and linked where a lesson first uses them."""

import re
from functools import cache
from pathlib import Path

GLOSSARY = Path(__file__).resolve().parents[1] / "notebooks" / "book" / "glossary.md"

# Ordinary words too: they are linked only in the lessons, by number, where they mean what the glossary says.
ONLY_IN = {
    "block": "456", "page": "46", "key": "046", "value": "046", "query": "034", "chunk": "46", "group": "126",
    "channel": "12", "head": "0346", "norm": "26", "needle": "4", "projection": "126", "window": "4",
}  # fmt: skip

# Not prose: fenced code, directives, headings, HTML, math, links and pictures, code spans.
_NO_PROSE = re.compile(
    r"^```.*?^```|^:{3,}.*?$|^#+ .*?$|<[^>\n]+>|^<details>.*?</summary>|\$\$.*?\$\$|\$[^$\n]+\$|"
    r"!?\[[^\]]*\]\((?:[^)\"]|\"[^\"]*\")*\)|`[^`\n]*`",
    re.M | re.S,
)


@cache
def definitions() -> dict[str, str]:
    """Term -> its definition as plain text."""
    body = GLOSSARY.read_text(encoding="utf-8").split(":sorted:\n", 1)[1].rsplit("```", 1)[0]
    found = {}
    for entry in re.split(r"\n\n", body.strip()):
        term, text = entry.strip().split("\n", 1)
        text = re.sub(r"\{term\}`([^`<]+?)(?: <[^`>]+>)?`", r"\1", text)
        found[term] = " ".join(text.replace("`", "").split())
    return found


def definition_of(word: str) -> str | None:
    """The definition of a word as it stands in a text, in the plural too; None if the glossary has none."""
    word = " ".join(word.split())
    for term in sorted(definitions(), key=len, reverse=True):
        if (use := first_use(term, word)) and use.span() == (0, len(word)):
            return definitions()[term]
    return None


def first_use(term: str, markdown: str) -> re.Match[str] | None:
    """Where prose uses a term, also in the plural; abbreviations and names as they are written, others in any case."""
    word = re.escape(term).replace(r"\ ", r"[ \n]") + r"(?:s|es)?"
    flags = 0 if re.search("[A-Z]", term[1:]) or len(term) < 3 else re.I
    pattern = re.compile(rf"(?<![\w/.-]){word}(?![\w-])", flags)
    hidden = [match.span() for match in _NO_PROSE.finditer(markdown)]
    for match in pattern.finditer(markdown):
        if not any(start < match.end() and match.start() < end for start, end in hidden):
            return match
    return None


def terms_of(lesson: str) -> list[str]:
    """The glossary's terms as far as they mean in this lesson what the glossary says, the longest first."""
    terms = [term for term in definitions() if lesson[1] in ONLY_IN.get(term, lesson[1])]
    return sorted(terms, key=len, reverse=True)  # "block table" before "block"


def link_first_uses(cells: list[str], lesson: str, to: str) -> list[str]:
    """The Markdown cells of a lesson, each term of the glossary linked where the lesson first uses it in prose.

    The definition is the link's title: it shows when the mouse rests on the word, in JupyterLab and in the book.
    """
    terms = terms_of(lesson)
    linked = []
    for text in cells:
        for term in tuple(terms):
            if match := first_use(term, text):
                title = definitions()[term].replace('"', "'")
                text = f'{text[: match.start()]}[{match[0]}]({to} "{title}"){text[match.end() :]}'
                terms.remove(term)
        linked.append(text)
    return linked
