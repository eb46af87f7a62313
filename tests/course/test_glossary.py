"""Words are explained where a lesson first uses them."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import glossary  # noqa: E402

LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("0*.ipynb"))
LINK = re.compile(r'\[([^\]]+)\]\(book/glossary\.md "([^"]+)"\)')


def prose(name):
    cells = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4).cells
    return [c.source for c in cells[1:-1] if c.cell_type == "markdown"]


@pytest.mark.parametrize("name", LESSONS)
def test_every_term_is_linked_at_its_first_use(name):
    text = "\n\n".join(prose(name))
    linked = {}
    for match in LINK.finditer(text):
        linked.setdefault(match[2], match)
    for term in glossary.terms_of(name):
        link = linked.get(glossary.definitions()[term].replace('"', "'"))
        before = text[: link.start()] if link else text
        use = glossary.first_use(term, before)
        assert use is None, (term, text[use.start() - 60 : use.end() + 20])


@pytest.mark.parametrize("name", LESSONS)
def test_no_term_is_linked_twice(name):
    titles = [match[2] for match in LINK.finditer("\n".join(prose(name)))]
    assert len(titles) == len(set(titles)) > 8


def test_the_words_a_newcomer_stumbles_over_are_there():
    for term in (
        "warp",
        "register",
        "SRAM",
        "HBM",
        "L2",
        "KL divergence",
        "logits",
        "oracle",
        "chunk",
        "kernel",
        "token",
    ):
        assert len(glossary.definitions()[term]) > 20
    text = (ROOT / "notebooks/book/glossary.md").read_text(encoding="utf-8")
    for used in re.findall(r"\{term\}`(?:[^`<]+<)?([^`<>]+)>?`", text):
        assert used in glossary.definitions(), used


def test_only_prose_counts():
    text = (
        'A `token`, a [token](x.md "a (token)"), $token$, <b title="token">\n\n# token\n\n```\ntoken\n```\nand tokens.'
    )
    assert glossary.first_use("token", text).start() == text.rindex("tokens")
    assert glossary.first_use("AWQ", "awq is not AWQish, AWQ is").start() == 19
    assert glossary.first_use("KV cache", "the KV\ncache") and not glossary.first_use("page", "pager, home-page")


def test_a_word_finds_its_definition_back():
    for term, definition in glossary.definitions().items():
        assert glossary.definition_of(term) == definition
    assert glossary.definition_of("weights") == glossary.definitions()["weight"]
    assert glossary.definition_of("Batches") == glossary.definitions()["batch"]
    assert glossary.definition_of("elephant") is None
