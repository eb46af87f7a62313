"""Make the committed notebooks from their masters: `python scripts/build_notebooks.py [--check]`.

A master is one MyST Markdown file in notebooks/source/. From its front matter come the opening cell, the set-up line and
Colab's metadata; cell ids are hashes of the cells, so that a rebuild changes only what changed. With --check nothing is
written and the exit code is 1 if a committed notebook, or the README's map of the course, differs from its master.
"""

import argparse
import hashlib
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "notebooks" / "source"
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = _PROJECT["urls"]["Repository"]
TAG = f"v{_PROJECT['version']}"
COLAB_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


@dataclass(frozen=True)
class Front:
    """A master's front matter under the key ``optinfer``."""

    title: str
    chapter: int
    minutes: int
    hardware: str
    objectives: tuple[str, ...]
    afterwards: str = ""  # what the reader can do afterwards, for the map of the course

    @classmethod
    def read(cls, path: Path) -> "Front":
        header = path.read_text(encoding="utf-8").split("\n---\n", 1)[0].removeprefix("---\n")
        values = yaml.safe_load(header).get("optinfer")
        if not isinstance(values, dict):
            raise SystemExit(f"{path}: the front matter holds no 'optinfer:' section")
        missing = {"title", "chapter", "minutes", "hardware", "objectives"} - values.keys()
        if missing:
            raise SystemExit(f"{path}: the front matter lacks {', '.join(sorted(missing))}")
        return cls(**{**values, "objectives": tuple(values["objectives"])})


def colab_url(notebook: str) -> str:
    owner = REPOSITORY.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{owner}/blob/{TAG}/notebooks/{notebook}.ipynb"


def opening(name: str, front: Front) -> str:
    goals = "\n".join(f"- {goal}" for goal in front.objectives)
    return (
        f"# {front.title}\n\n"
        f"[![Open in Colab]({COLAB_BADGE})]({colab_url(name)})\n\n"
        f"**You will be able to**\n\n{goals}\n\n"
        f"**Time** about {front.minutes} minutes · **Hardware** {front.hardware}"
    )


def set_up(name: str) -> str:
    return (
        "try:\n"
        "    import optinfer\n"
        "except ImportError:  # in Colab: install the course, then go on\n"
        f'    %pip install -q "optinfer @ git+{REPOSITORY}@{TAG}"\n'
        "    import optinfer\n\n"
        f'lesson = optinfer.setup("{name.rsplit("/", 1)[-1]}")'
    )


_FENCE = re.compile(
    r"^(?P<fence>:{3,}|`{3,})\{(?P<kind>admonition|note|tip|warning|dropdown)\}[ ]*(?P<title>.*)\n(?P<body>.*?)^(?P=fence)[ ]*$",
    re.M | re.S,
)


def portable(markdown: str) -> str:
    """Directives as Markdown that JupyterLab and Colab render too: boxes as quotes, dropdowns as folded details."""

    def replace(match: re.Match[str]) -> str:
        kind, title = match["kind"], match["title"].strip() or match["kind"].capitalize()
        body = re.sub(r"^:[\w-]+:.*\n", "", match["body"], flags=re.M).strip()
        if kind == "dropdown":
            return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
        return "\n".join(f"> {line}".rstrip() for line in [f"**{title}**", "", *body.splitlines()])

    return _FENCE.sub(replace, markdown)


def finish(cells: list[nbformat.NotebookNode], name: str) -> nbformat.NotebookNode:
    """A notebook without outputs, with stable cell ids and the metadata that Colab and Jupyter read."""
    seen: Counter[str] = Counter()
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = portable(cell.source)
        key = f"{name}\n{cell.cell_type}\n{cell.source}"
        seen[key] += 1
        cell.id = hashlib.sha1(f"{key}\n{seen[key]}".encode()).hexdigest()[:12]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "accelerator": "GPU",
        "colab": {"gpuType": "T4", "provenance": [], "toc_visible": True},
    }
    nbformat.validate(notebook)
    return notebook


def lesson_cells(path: Path) -> list[nbformat.NotebookNode]:
    cells = jupytext.read(path, fmt="md:myst").cells
    for cell in cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in ("tags",)}
    return [nbformat.v4.new_code_cell(c.source, metadata=c.metadata) if c.cell_type == "code" else c for c in cells]


def build_lesson(path: Path) -> nbformat.NotebookNode:
    name, front = path.stem, Front.read(path)
    head = [nbformat.v4.new_markdown_cell(opening(name, front)), nbformat.v4.new_code_cell(set_up(name))]
    return finish(head + lesson_cells(path), name)


def lessons() -> list[Path]:
    return sorted(SOURCE.glob("[0-9]*.md"))


def course_map() -> str:
    """The README's table: one row per lesson, from the masters' front matter."""
    rows = ["| notebook | afterwards you can | minutes | hardware | Colab |", "|---|---|---|---|---|"]
    for path in lessons():
        front, name = Front.read(path), path.stem
        rows.append(
            f"| [{front.title}](notebooks/{name}.ipynb) | {front.afterwards or front.objectives[-1]} | {front.minutes} "
            f"| {front.hardware} | [![Open in Colab]({COLAB_BADGE})]({colab_url(name)}) |"
        )
    return "\n".join(rows)


def with_course_map(readme: str) -> str:
    begin, end = "<!-- course map: made by scripts/build_notebooks.py -->", "<!-- end of course map -->"
    if begin not in readme or end not in readme:
        raise SystemExit("README.md has lost the markers of the course map")
    before, rest = readme.split(begin, 1)
    return f"{before}{begin}\n{course_map()}\n{end}{rest.split(end, 1)[1]}"


def outputs() -> Iterator[tuple[Path, str]]:
    """Every generated file and its content."""
    for path in lessons():
        yield ROOT / "notebooks" / f"{path.stem}.ipynb", nbformat.writes(build_lesson(path), indent=1) + "\n"
    readme = ROOT / "README.md"
    yield readme, with_course_map(readme.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything is out of date")
    check = parser.parse_args().check
    stale = []
    for path, content in outputs():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
    for path in stale:
        print(f"{'out of date' if check else 'wrote'}: {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
