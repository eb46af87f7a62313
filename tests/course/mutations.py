"""Small changes of a solution, one at a time: each operator, constant, comparison, choice and statement.

python tests/course/mutations.py [exercise.id …]      prints the changes that the checks accept
"""

import ast
import copy
import dataclasses
import sys
from collections.abc import Iterator

from optinfer.course import checks, exercises
from optinfer.course.exercise import Draw, Exercise

_BINARY = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div, ast.Add),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div, ast.Mult),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.MatMult: (),
}
_COMPARE = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin"}
_NAMES |= {"floor": "ceil", "ceil": "floor", "round": "floor", "minimum": "maximum", "maximum": "minimum"}


def _constants(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 1.5 + (value == 0), -value - (value == 0)]
    return []


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    """The node with one thing changed; statements are dropped by their block, in `mutants`."""
    if isinstance(node, (ast.BinOp, ast.AugAssign)):
        for op in _BINARY.get(type(node.op), ()):
            yield _with(node, op=op())
    elif isinstance(node, ast.Compare):
        for i, old in enumerate(node.ops):
            for op in _COMPARE.get(type(old), ()):
                yield _with(node, ops=[*node.ops[:i], op(), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield _with(node, values=rest) if len(rest) > 1 else rest[0]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield node.operand
    elif isinstance(node, ast.Constant):
        for value in _constants(node.value):
            yield _with(node, value=value)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Name) and node.id in _NAMES:
        yield _with(node, id=_NAMES[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield _with(node, attr=_NAMES[node.attr])
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("clamp", "clone"):
        yield node.func.value


def _with(node: ast.AST, **changes: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Pairs of what was changed, as ``line: old -> new``, and the changed source."""
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    for path, old, new in _changes(tree):
        changed = _replaced(tree, path, new)
        text = ast.unparse(ast.fix_missing_locations(changed))
        if text not in seen:
            seen.add(text)
            yield f"{getattr(old, 'lineno', 0)}: {_line(old)} -> {_line(new)}", text


def _line(node: ast.AST | None) -> str:
    return "dropped" if node is None else ast.unparse(node).splitlines()[0]


def _changes(tree: ast.AST, path: tuple = ()) -> Iterator[tuple[tuple, ast.AST, ast.AST | None]]:
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "args", "decorator_list", "type_params") and not isinstance(
            tree, ast.Call
        ):
            continue  # signatures are given
        for i, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST):
                continue
            here = (*path, (name, i))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            if i is not None and isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign, ast.Break, ast.Continue)):
                yield here, node, None
            for new in _variants(node):
                yield here, node, new
            yield from _changes(node, here)


def _replaced(tree: ast.AST, path: tuple, new: ast.AST | None) -> ast.AST:
    changed = copy.copy(tree)
    (name, i), rest = path[0], path[1:]
    value = getattr(tree, name)
    if i is None:
        setattr(changed, name, _replaced(value, rest, new) if rest else new)
        return changed
    items = list(value)
    items[i] = _replaced(items[i], rest, new) if rest else (new if new is not None else ast.Pass())
    setattr(changed, name, items)
    return changed


def small(exercise: Exercise) -> Exercise:
    """The exercise without the real model, and with little patience."""
    return dataclasses.replace(
        exercise,
        cases=lambda draw: (case for case in exercise.cases(draw) if not case.slow),
        model=False,
        limit=min(2.0, exercise.limit),
        _compiled={},
    )


def survivors(exercise: Exercise) -> tuple[int, list[str]]:
    """How many changes were tried, and those that the check accepts."""
    tried, accepted = 0, []
    exercise = small(exercise)
    assert list(exercise.cases(Draw(0)))
    for what, source in mutants(exercise.source):
        try:
            answer = exercise.compiled(source)
        except Exception:
            continue  # not even a function
        tried += 1
        if checks.evaluate(exercise, answer).passed:
            accepted.append(what)
    return tried, accepted


if __name__ == "__main__":
    for exercise in exercises.every():
        if not sys.argv[1:] or exercise.id in sys.argv[1:]:
            tried, accepted = survivors(exercise)
            print(f"{exercise.id}: {tried - len(accepted)} of {tried}", *accepted, sep="\n    ", flush=True)
