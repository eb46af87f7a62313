"""Make the committed notebooks from their masters: `python scripts/build_notebooks.py [--check]`.

A master is one MyST Markdown file in notebooks/source/. From its front matter come the opening cell, the set-up line and
Colab's metadata; cell ids are hashes of the cells, so that a rebuild changes only what changed. With --check nothing is
written and the exit code is 1 if a committed notebook, or a generated part of the README, differs from its source.
"""

import argparse
import ast
import hashlib
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import glossary
import jupytext
import nbformat
import yaml

from optinfer import results

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "notebooks" / "source"
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = _PROJECT["urls"]["Repository"]
TAG = f"v{_PROJECT['version']}"
CARDS = {"lesson.predict", "lesson.compare", "lesson.ledger", "lesson.course_ledger", "lesson.claims", "lesson.source"}
COLAB_BADGE = "book/images/colab.svg"  # ours, in notebooks/: no picture from another server


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


def badge(notebook: str, to_notebooks: str) -> str:
    """The badge that opens a notebook in Colab, for a page from which `to_notebooks` leads to the notebooks' folder."""
    return f"[![Open in Colab]({to_notebooks}{COLAB_BADGE})]({colab_url(notebook)})"


def opening(name: str, front: Front) -> str:
    goals = "\n".join(f"- {goal}" for goal in front.objectives)
    return (
        f"# {front.title}\n\n"
        f"{badge(name, '../' if '/' in name else '')}\n\n"
        f"**You will be able to**\n\n{goals}\n\n"
        f"**Time** about {front.minutes} minutes · **Hardware** {front.hardware}"
    )


def closing(name: str) -> str:
    """Where to go on: the lesson's exercises, the glossary, the next lesson."""
    lines = ["## Go on"]
    if (SOURCE / "exercises" / f"{name}.md").exists():
        exercises = f"exercises/{name}"
        lines.append(
            f"- [The exercises of this lesson]({exercises}.ipynb) ([in Colab]({colab_url(exercises)})): "
            "each checks itself and says what went wrong"
        )
    later = [path.stem for path in lessons() if path.stem > name]
    if later:
        title = Front.read(SOURCE / f"{later[0]}.md").title
        lines.append(f"- [Next lesson: {title}]({later[0]}.ipynb) ([in Colab]({colab_url(later[0])}))")
    lines.append("- [The course's words, explained](book/glossary.md)")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


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
    r"^(?P<fence>:{3,}|`{3,})\{(?P<kind>admonition|note|tip|warning|dropdown)\}[ ]*(?P<title>[^\n]*)\n"
    r"(?P<body>.*?)^(?P=fence)[ ]*$",
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
    cells = lesson_cells(path)
    check_cards(cells, path)
    prose = [cell for cell in cells if cell.cell_type == "markdown"]
    for cell, text in zip(prose, glossary.link_first_uses([cell.source for cell in prose], name, "book/glossary.md")):
        cell.source = text
    head = [nbformat.v4.new_markdown_cell(opening(name, front)), nbformat.v4.new_code_cell(set_up(name))]
    return finish([*head, *cells, nbformat.v4.new_markdown_cell(closing(name))], name)


def check_cards(cells: list[nbformat.NotebookNode], path: Path) -> None:
    """A card shows only as the last expression of its cell; anywhere else the reader would never see it."""
    for cell in cells:
        if cell.cell_type != "code":
            continue
        *before, _ = ast.parse(cell.source).body
        for statement in before:
            call = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(call, ast.Call) and ast.unparse(call.func) in CARDS:
                raise SystemExit(f"{path}: nothing shows {ast.unparse(call)}; make it the last line of its cell")


def lessons() -> list[Path]:
    return sorted(SOURCE.glob("[0-9]*.md"))


# ------------------------------------------------------------------------------------------------------ exercises
_DIRECTIVE = re.compile(r"^:::\{(?P<kind>exercise|question)\} (?P<what>.+)\n(?P<body>(?:.*\n)*?):::$", re.M)


def exercise_masters() -> list[Path]:
    return sorted((SOURCE / "exercises").glob("[0-9]*.md"))


def build_exercises(path: Path, solved: bool) -> nbformat.NotebookNode:
    """An exercise notebook from its master and the Exercise objects that it names; `solved`: with the solutions in it.

    The cells carry nbgrader's metadata. The solved notebook marks its solutions as nbgrader's sources do, so that
    generate_assignment makes the unsolved one from it.
    """
    from optinfer.course import exercises

    name = f"{'solutions' if solved else 'exercises'}/{path.stem}"
    header = yaml.safe_load(path.read_text(encoding="utf-8").split("\n---\n", 1)[0].removeprefix("---\n"))["optinfer"]
    cells: list[nbformat.NotebookNode] = []
    used = []
    for cell in lesson_cells(path):
        if cell.cell_type == "code":
            cells.append(cell)
            continue
        position = 0
        for match in _DIRECTIVE.finditer(cell.source):
            cells += _prose(cell.source[position : match.start()])
            position = match.end()
            if match["kind"] == "exercise":
                used.append(exercises.get(match["what"].strip()))
                cells += exercise_cells(used[-1], len(used), solved)
            else:
                cells += question_cells(match["what"].strip(), match["body"], solved)
        cells += _prose(cell.source[position:])
    front = Front(
        title=header["title"] + (": solutions" if solved else ""),
        chapter=header["chapter"],
        minutes=sum(exercise.minutes for exercise in used),
        hardware=header["hardware"],
        objectives=tuple(header["objectives"]),
    )
    points = sum(exercise.points for exercise in used)
    about = f"{opening(name, front)} · **Exercises** {len(used)}, {points} points"
    cells = [nbformat.v4.new_markdown_cell(about), nbformat.v4.new_code_cell(exercise_set_up()), *cells]
    notebook = finish(cells, name)
    notebook.metadata["optinfer"] = {"exercises": [exercise.id for exercise in used]}
    return notebook


def exercise_set_up() -> str:
    lines = set_up("").splitlines()[:-2]
    return "\n".join(
        [
            *lines,
            "",
            "import torch",
            "from torch import Tensor",
            "",
            "from optinfer import check, hint, progress, solution",
        ]
    )


def exercise_cells(exercise: Any, number: int, solved: bool) -> list[nbformat.NotebookNode]:
    grade_id = exercise.id.replace(".", "-")
    dots = "●" * exercise.difficulty + "○" * (5 - exercise.difficulty)
    facts = [f"`{exercise.id}`", f"difficulty {dots}", f"{exercise.minutes} minutes"]
    if exercise.prerequisites:
        facts.append("after " + ", ".join(f"`{needed}`" for needed in exercise.prerequisites))
    cells = [nbformat.v4.new_markdown_cell(f"## {number}. {exercise.title}\n\n{' · '.join(facts)}\n\n{exercise.task}")]
    if exercise.given:
        cells.append(_graded(nbformat.v4.new_code_cell(exercise.given_source), f"{grade_id}-given", locked=True))
    answer = nbformat.v4.new_code_cell(exercise.marked if solved else exercise.stub)
    cells.append(_graded(answer, f"{grade_id}-answer", solution=True))
    test = nbformat.v4.new_code_cell(f'check("{exercise.id}", {exercise.name})  # stuck? hint("{exercise.id}")')
    cells.append(_graded(test, f"{grade_id}-check", locked=True, points=exercise.points))
    return cells


def question_cells(what: str, body: str, solved: bool) -> list[nbformat.NotebookNode]:
    """A question answered in words: read by a person, or compared by the reader with the answer in the solutions."""
    grade_id, points = what.split()
    question, answer = body.split("\n---\n")
    text = f"*Your answer in two or three sentences* ({points} points from a teacher)"
    cell = nbformat.v4.new_markdown_cell(
        f"### BEGIN SOLUTION\n{answer.strip()}\n### END SOLUTION" if solved else "YOUR ANSWER HERE"
    )
    return [
        nbformat.v4.new_markdown_cell(f"## In your own words\n\n{question.strip()}\n\n{text}"),
        _graded(cell, grade_id, solution=True, points=int(points)),
    ]


def _prose(text: str) -> list[nbformat.NotebookNode]:
    return [nbformat.v4.new_markdown_cell(text.strip())] if text.strip() else []


def _graded(
    cell: nbformat.NotebookNode, grade_id: str, solution: bool = False, locked: bool = False, points: int | None = None
) -> nbformat.NotebookNode:
    """Add nbgrader's metadata: an answer (solution), a test (points, locked), a manual cell (both), or a read-only cell."""
    cell.metadata["nbgrader"] = {
        "grade": points is not None,
        "grade_id": grade_id,
        "locked": locked,
        **({"points": points} if points is not None else {}),
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }
    return cell


def exercise_index() -> str:
    """The book's page of all exercises."""
    from optinfer.course import exercises

    every = exercises.every()
    lines = [
        "# Exercises",
        "",
        f"{len(every)} exercises, {sum(e.points for e in every)} points, about {sum(e.minutes for e in every) / 60:.0f} hours. "
        'Each has a specification, a stub, and `check("id", your_function)`, which runs your answer on many inputs and says '
        'what the pattern of its errors usually means. `hint("id")` helps in three steps; `progress()` keeps count.',
        "",
    ]
    for path in exercise_masters():
        chapter = next(c for c in exercises.CHAPTERS if c.notebook == path.stem)
        lines += [
            f"## {chapter.title}",
            "",
            f"[Exercises]({path.stem}.ipynb) · [solutions](../solutions/{path.stem}.ipynb) · "
            f"{badge('exercises/' + path.stem, '../')}",
            "",
            "| exercise | | difficulty | minutes | after |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| `{e.id}` | {e.title} | {'●' * e.difficulty}{'○' * (5 - e.difficulty)} | {e.minutes} | "
            f"{', '.join(f'`{needed}`' for needed in e.prerequisites)} |"
            for e in exercises.of_chapter(chapter.prefix)
        ]
        lines.append("")
    return "\n".join([*lines, _FOR_TEACHERS])


_FOR_TEACHERS = """\
## For teachers and for CI

```
optinfer grade handed-in/*.ipynb --assignment 01_quantization.ipynb --min 0.8 --junit scores.xml
```

runs each notebook in a fresh kernel, whatever its name, and checks every answer again; what the notebook shows is not
believed. Cells that raise, hang or kill the kernel cost their own points only. `--assignment` names the notebook that you
handed out: its exercises count even if somebody deleted them. `--json` prints the scores as JSON; the exit code is 0 if every
notebook reaches `--min`. The answers run on your machine: grade strangers' notebooks in a container.

The solution notebooks are source notebooks of [nbgrader](https://nbgrader.readthedocs.io). Put them into
`source/ps1/` of a course, then `nbgrader generate_assignment ps1` and, later,
`nbgrader autograde ps1 --ExecutePreprocessor.timeout=300`. The questions in words are left for you to grade.
"""


def course_map() -> str:
    """The README's table: one row per lesson, from the masters' front matter."""
    rows = ["| notebook | afterwards you can | minutes | hardware | Colab |", "|---|---|---|---|---|"]
    for path in lessons():
        front, name = Front.read(path), path.stem
        rows.append(
            f"| [{front.title}](notebooks/{name}.ipynb) | {front.afterwards or front.objectives[-1]} | {front.minutes} "
            f"| {front.hardware} | {badge(name, 'notebooks/')} |"
        )
    from optinfer.course import exercises

    reading = sum(Front.read(path).minutes for path in lessons()) / 60
    practice = sum(exercise.minutes for exercise in exercises.every()) / 60
    hours = f"About {reading:.0f} hours for the lessons and {practice:.0f} more for all the exercises."
    return "\n".join([*rows, "", hours])


def machines(recordings: list[results.Recorded]) -> str:
    """The README's table of who measured: one row per chip, from the recordings; and what nobody has measured yet."""
    rows = ["| recorded on | suites | with | when |", "|---|---|---|---|"]
    chips: dict[str, list[results.Recorded]] = {}
    for recorded in recordings:
        chips.setdefault(recorded.chip, []).append(recorded)
    for chip, own in chips.items():
        versions = {
            f"{name} {r.provenance['versions'][name]}"
            for r in own
            for name in ("torch", "triton")
            if name in r.provenance["versions"]
        }
        days = sorted(r.provenance["date"][:10] for r in own)
        when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
        rows.append(
            f"| {chip} | {', '.join(r.suite.replace('_', ' ') for r in own)} | {', '.join(sorted(versions))} | {when} |"
        )
    if not any(recorded.on_gpu for recorded in recordings):
        rows += ["", "Nothing has been recorded on a GPU yet, so no figure of one is shown."]
    return "\n".join(rows)


def with_part(readme: str, name: str, content: str) -> str:
    """The README with `content` between the markers of the generated part `name`."""
    begin, end = f"<!-- {name}: made by scripts/build_notebooks.py -->", f"<!-- end of {name} -->"
    if begin not in readme or end not in readme:
        raise SystemExit(f"README.md has lost the markers of the {name}")
    before, rest = readme.split(begin, 1)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def outputs() -> Iterator[tuple[Path, str]]:
    """Every generated file and its content."""
    for path in lessons():
        yield ROOT / "notebooks" / f"{path.stem}.ipynb", nbformat.writes(build_lesson(path), indent=1) + "\n"
    for path in exercise_masters():
        for folder in ("exercises", "solutions"):
            notebook = build_exercises(path, solved=folder == "solutions")
            yield ROOT / "notebooks" / folder / f"{path.stem}.ipynb", nbformat.writes(notebook, indent=1) + "\n"
    yield ROOT / "notebooks" / "exercises" / "index.md", exercise_index()
    readme = ROOT / "README.md"
    text = with_part(readme.read_text(encoding="utf-8"), "course map", course_map())
    yield readme, with_part(text, "recorded machines", machines(results.recordings()))


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
