"""Which room may import which: the table that `tests/test_imports.py` holds, and the picture in docs/ARCHITECTURE.md.

python scripts/rooms.py            # draws the picture anew
python scripts/rooms.py --check    # fails if the committed one is another
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"

# A room is a package or module of `optinfer`, or the kernels. It imports only rooms that stand above it in this table.
MAY_IMPORT = {
    "optinfer_kernels": "",
    "errors": "",
    "folders": "",
    "data": "",
    "noise": "",
    "upload": "",
    "card": "",
    "execute": "",
    "cpu": "folders",
    "processor": "cpu folders",
    "hardware": "optinfer_kernels cpu noise processor",
    "plots": "hardware",
    "results": "data folders hardware processor",
    "models": "cpu errors folders hardware",
    "attention": "optinfer_kernels hardware",
    "kv_cache": "optinfer_kernels cpu upload",
    "quantization": "optinfer_kernels cpu data folders hardware models",
    "speculative": "cpu data errors folders hardware quantization upload",
    "serving": "attention cpu kv_cache quantization speculative upload",
    "memory": "kv_cache",
    "plugins": "attention quantization",
    "optinfer": "plugins",
    "doctor": "optinfer_kernels attention card cpu folders hardware models processor",
    "bench": "optinfer_kernels attention card cpu data doctor errors execute folders hardware kv_cache memory models"
    " noise plots quantization results serving speculative",
    "widgets": "optinfer_kernels attention kv_cache memory quantization serving speculative",
    "course": "optinfer_kernels card data errors folders hardware memory models plots processor quantization",
    "commands": "optinfer_kernels bench course data doctor folders hardware models quantization results",
    "cli": "errors optinfer",
}


@dataclass(frozen=True)
class Import:
    """`importer` imports `imported`, both full names of our modules; only for its types if not `runs`."""

    importer: str
    imported: str
    runs: bool


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package and the kernels, by full name."""
    found = {}
    for base, package in ((root, "optinfer"), (root / "kernels", "optinfer_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path = ROOT) -> list[Import]:
    """Every import of one of our modules by another, also those within functions."""
    known = modules(root)
    return [
        Import(name, imported, runs)
        for name, path in known.items()
        for imported, runs in _imported(ast.parse(path.read_text(encoding="utf-8")), name, known)
        if imported != name
    ]


def _imported(node: ast.AST, name: str, known: dict[str, Path], runs: bool = True) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, runs) for alias in child.names if alias.name in known)
        elif isinstance(child, ast.ImportFrom) and (source := _source(child, name, known)) in known:
            for alias in child.names:
                full = f"{source}.{alias.name}"
                yield (full if full in known else source), runs
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _imported(child, name, known, runs and not typing_only)


def _source(node: ast.ImportFrom, name: str, known: dict[str, Path]) -> str:
    """The full name of what ``from … import`` imports from in the module `name`."""
    within = node.module or ""
    if not node.level:
        return within
    inside = [*name.split("."), *["__init__"] * (known[name].name == "__init__.py")]
    return ".".join([*inside[: -node.level], *filter(None, [within])])


def room(module: str) -> str:
    """The room that a module stands in."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] or package if package == "optinfer" else package


def arrows(found: list[Import]) -> dict[tuple[str, str], list[Import]]:
    """Imports between rooms, by importing and imported room."""
    between: dict[tuple[str, str], list[Import]] = {}
    for one in found:
        pair = room(one.importer), room(one.imported)
        if pair[0] != pair[1]:
            between.setdefault(pair, []).append(one)
    return between


def allowed() -> set[tuple[str, str]]:
    """The arrows of the table."""
    return {(importer, imported) for importer, rooms in MAY_IMPORT.items() for imported in rooms.split()}


def circles(found: list[Import]) -> list[list[str]]:
    """Modules that reach themselves through imports that run, in groups; empty where there is no circle."""
    ahead: dict[str, set[str]] = {}
    for one in found:
        if one.runs:
            ahead.setdefault(one.importer, set()).add(one.imported)
    reached = {module: _reach(module, ahead) for module in ahead}
    on_circles = sorted(module for module in reached if module in reached[module])
    groups = {tuple(m for m in on_circles if m in reached[module] and module in reached[m]) for module in on_circles}
    return [list(group) for group in sorted(groups)]


def _reach(start: str, ahead: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for following in ahead.get(waiting.pop(), set()) - seen:
            seen.add(following)
            waiting.append(following)
    return seen


def picture() -> str:
    """The table as a Mermaid graph, without the arrows that follow from others."""
    ahead = {importer: set(rooms.split()) for importer, rooms in MAY_IMPORT.items()}
    lines = ["```mermaid", "graph TD"]
    for importer, rooms in reversed(ahead.items()):
        follow = set().union(*(_reach(between, ahead) for between in rooms))
        direct = [other for other in MAY_IMPORT if other in rooms - follow]
        lines += [f"    {importer} --> {' & '.join(direct)}"] if direct else []
    return "\n".join([*lines, "```"])


def drawn(text: str) -> str:
    """The document with the picture of this table."""
    return re.sub(r"```mermaid\n.*?```", lambda _: picture(), text, count=1, flags=re.DOTALL)


def main() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        ARCHITECTURE.write_text(drawn(text), encoding="utf-8")
    elif drawn(text) != text:
        raise SystemExit("docs/ARCHITECTURE.md shows another table: python scripts/rooms.py")


if __name__ == "__main__":
    main()
