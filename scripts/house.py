"""How well the house is kept, in figures; `tests/test_house.py` sees to it that none of the first four grows.

python -m scripts.house
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from scripts import rooms

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, TESTS, EXERCISES = ("optinfer", "kernels/optinfer_kernels"), ("tests",), ("optinfer/course/exercises",)
MOST_LINES = 50  # of a function's body
# Arguments of these names choose among a few words: a bare string does not say among which.
CHOICES = {
    "algorithm", "backend", "card", "dtype", "form", "forms", "gpu", "head", "kind", "law", "layout", "method", "mode",
    "policy", "scheme", "style",
}  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(folders: tuple[str, ...], root: Path) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def functions(tree: ast.AST, within: str = "", public: bool = True) -> Iterator[tuple[str, Function, bool]]:
    """Every function of a module: its name with its class's, itself, and whether others may call it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{within}{node.name}.", public and not node.name.startswith("_"))
        elif isinstance(node, Function):
            shown = public and (not node.name.startswith("_") or node.name in ("__init__", "__call__"))
            yield f"{within}{node.name}", node, shown
            yield from functions(node, f"{within}{node.name}.", False)
        else:
            yield from functions(node, within, public)


def body_lines(function: Function) -> int:
    """Lines from the first statement behind the docstring to the last."""
    first = function.body[min(ast.get_docstring(function) is not None, len(function.body) - 1)]
    return (function.end_lineno or 0) - first.lineno + 1


def untold(function: Function) -> list[str]:
    """Arguments whose type is Any, or a bare string that chooses."""
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    types = [(a.arg, ast.unparse(a.annotation).strip("'")) for a in arguments if a.annotation]
    open_to_all = [a for a, t in types if "Any" in t.replace("dict[str, Any]", "")]
    return open_to_all + [a for a, t in types if a in CHOICES and t in ("str", "str | None")]


def lines(folders: tuple[str, ...], root: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files(folders, root))


def figures(root: Path = ROOT) -> dict[str, list[str] | int]:
    """Each figure by its name: a list of offenders, or a count."""
    found = rooms.imports(root)
    back = rooms.arrows(found).keys() - rooms.allowed()
    parsed = [(path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"))) for path in files(PACKAGE, root)]
    known = [(f"{path}:{name}", function, shown) for path, tree in parsed for name, function, shown in functions(tree)]
    return {
        "circles of imports": [" - ".join(circle) for circle in rooms.circles(found)],
        "imports against the rooms' order": sorted(map(" -> ".join, back)),
        f"functions of more than {MOST_LINES} lines": [name for name, f, _ in known if body_lines(f) > MOST_LINES],
        "public arguments of any kind": [f"{name}({a})" for name, f, shown in known if shown for a in untold(f)],
        "lines of the package": lines(PACKAGE, root) - lines(EXERCISES, root),
        "lines of exercises": lines(EXERCISES, root),
        "lines of tests": lines(TESTS, root),
    }


if __name__ == "__main__":
    for figure, value in figures().items():
        print(f"{figure}: {value if isinstance(value, int) else len(value)}")
        for one in [] if isinstance(value, int) else value:
            print(f"    {one}")
