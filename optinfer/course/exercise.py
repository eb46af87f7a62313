"""An exercise is one object: what is asked, how an answer is checked, how help is given, which wrong answers it knows.

Everything a reader sees is made from it: the stub and the solution come from one real function, and every
misconception is a small edit of that function's source. The same edit later recognizes the misconception in a
reader's answer: a check runs it on the failing inputs and compares.
"""

import ast
import inspect
import itertools
import linecache
import random
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"  # nbgrader's marks
YOUR_CODE = "# YOUR CODE HERE\nraise NotImplementedError()"  # what nbgrader puts between them
_GIVEN = "# given"  # first line of a method body that the stub keeps

_numbers = itertools.count()


class Draw:
    """Seeded random inputs: the same seed draws the same ones, so that nobody needs to copy what a function may change."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, strided: bool = False) -> Tensor:
        """Standard normal numbers; `strided`: a transposed view where there are two dimensions, else every second number."""
        if not strided:
            return torch.randn(*shape, generator=self.generator).to(dtype)
        if len(shape) < 2:
            return torch.randn(2 * shape[0], generator=self.generator).to(dtype)[::2]
        return self.normal(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from `low` to `high` - 1."""
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 up to, not including, 1."""
        return torch.rand(*shape, generator=self.generator)

    def probabilities(self, *shape: int, sharp: float = 1.0) -> Tensor:
        """Distributions over the last dimension, float32."""
        return (sharp * self.normal(*shape)).softmax(-1)


@dataclass(frozen=True)
class Case:
    """One input: what is special about it, and the arguments.

    slow: it runs the real model; tried last, and only after all others passed.
    clue: a question that helps where the result for this input is wrong.
    """

    label: str
    args: tuple[Any, ...]
    slow: bool = False
    clue: str = ""


def case(label: str, *args: Any) -> Case:
    return Case(label, args)


def slow_case(label: str, *args: Any) -> Case:
    return Case(label, args, slow=True)


class Refused(ValueError):
    """What an answer returned cannot be tried at all; the message says what is allowed."""


@dataclass(frozen=True)
class Wrong:
    """A misconception and the wrong answer it leads to.

    Attributes:
        name: the misconception in a few words, as the message shows it.
        meaning: what happens then, and what to think instead.
        edits: (old, new) pairs that turn the solution's source into the wrong answer.
    """

    name: str
    meaning: str
    edits: tuple[tuple[str, str], ...]

    def __init__(self, name: str, meaning: str, *edits: tuple[str, str]) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "meaning", meaning)
        object.__setattr__(self, "edits", edits)

    def source(self, solution: str) -> str:
        for old, new in self.edits:
            if old not in solution:
                raise ValueError(f"misconception {self.name!r}: the solution holds no {old!r}")
            solution = solution.replace(old, new)
        return solution


@dataclass(frozen=True, eq=False)
class Exercise:
    """One exercise.

    Attributes:
        id: chapter and name, such as ``"quantization.absmax"``.
        title: in a few words.
        difficulty: 1 (a warm-up) to 5 (a build); also its points.
        minutes: that a reader who followed the chapter needs.
        spec: what is asked, Markdown, with a few lines of torch.
        answer: the solution, a function, class or Triton kernel; the stub is its signature and docstring.
        cases: draws the inputs.
        hints: three: a nudge, the idea, almost the code.
        wrong: at least three misconceptions.
        reference: computes what is expected, in another way than the answer where that is possible.
        prerequisites: ids of exercises to do before.
        run: ``run(answer, *args)``, for answers that are not called plainly: classes, kernels.
        given: helpers that the notebook defines for the reader before the stub.
        forbidden: names of functions that the reader must not call.
        rtol, atol: tolerance for floating-point results.
        changes_input: the answer is meant to work in place.
        model: has slow cases, which run the real model and take seconds.
        runs_the_package: `run` itself calls the package, as a model does: only the answer is watched for shortcuts.
        limit: seconds of work that one input may take; time spent waiting for the machine does not count.
        noun, verb: what an input is in this exercise, and what it does when all is well, as the message says it.
    """

    id: str
    title: str
    difficulty: int
    minutes: int
    spec: str
    answer: Callable[..., Any]
    cases: Callable[[Draw], Iterable[Case]]
    hints: tuple[str, str, str]
    wrong: tuple[Wrong, ...]
    reference: Callable[..., Any] | None = None
    prerequisites: tuple[str, ...] = ()
    run: Callable[..., Any] | None = None
    given: Sequence[Callable[..., Any]] = ()
    forbidden: tuple[str, ...] = ()
    rtol: float = 1e-4
    atol: float = 1e-5
    changes_input: bool = False
    model: bool = False
    runs_the_package: bool = False
    limit: float = 10.0
    noun: str = "input"
    verb: str = "pass"
    _compiled: dict[str, Callable[..., Any]] = field(default_factory=dict, repr=False)

    @property
    def chapter(self) -> str:
        return self.id.split(".")[0]

    @property
    def name(self) -> str:
        """The function's name, in the stub and in the solution."""
        return plain(self.answer).__name__

    @property
    def points(self) -> int:
        return self.difficulty

    @property
    def task(self) -> str:
        """The specification with what must not be used, as the notebook shows it."""
        if not self.forbidden:
            return self.spec
        names = [f"`{name}`" for name in self.forbidden]
        return (
            f"{self.spec}\n\nDo it without {' and '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)}."
        )

    @cached_property
    def source(self) -> str:
        """The solution as one reads it."""
        return source_of(self.answer)

    @cached_property
    def stub(self) -> str:
        """The solution without its bodies: what the reader starts from."""
        return _replace_bodies(self.source, lambda body, indent: textwrap.indent(YOUR_CODE, indent))

    @cached_property
    def marked(self) -> str:
        """The solution with nbgrader's marks around its bodies."""
        return _replace_bodies(self.source, lambda body, indent: f"{indent}{BEGIN}\n{body}\n{indent}{END}")

    @cached_property
    def given_source(self) -> str:
        return "\n\n\n".join(source_of(helper) for helper in self.given)

    def compiled(self, source: str) -> Callable[..., Any]:
        """The function that a source text defines, with this module's imports."""
        if source not in self._compiled:
            self._compiled[source] = compiled(source, self.answer, self.id)
        return self._compiled[source]

    @property
    def solution(self) -> Callable[..., Any]:
        return self.compiled(self.source)

    def wrong_answer(self, wrong: Wrong) -> Callable[..., Any]:
        return self.compiled(wrong.source(self.source))

    def expected(self, *args: Any) -> Any:
        if self.reference is not None:
            return self.reference(*args)
        return self.run(self.solution, *args) if self.run else self.solution(*args)


def plain(answer: object) -> Any:
    """The Python function inside a Triton kernel; anything else as it is."""
    return getattr(answer, "fn", answer)


def compiled(source: str, like: Any, title: str) -> Callable[..., Any]:
    """The function that a source text defines, with the name and imports of `like`; Triton can read its source again."""
    filename = f"<{title} {next(_numbers)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = dict(plain(like).__globals__ if not inspect.isclass(like) else _globals(like))
    exec(compile(source, filename, "exec"), namespace)
    return namespace[plain(like).__name__]


def source_of(answer: object) -> str:
    return textwrap.dedent(inspect.getsource(plain(answer))).strip()


def _globals(cls: type) -> dict[str, Any]:
    import sys

    return vars(sys.modules[cls.__module__])


def _replace_bodies(source: str, replace: Callable[[str, str], str]) -> str:
    """Replace what follows the signature and docstring of every function, or of every method of a class."""
    lines = source.splitlines()
    tree: Any = ast.parse(source).body[0]
    functions = (
        [tree] if isinstance(tree, ast.FunctionDef) else [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    )
    for function in reversed(functions):
        has_docstring = ast.get_docstring(function, clean=False) is not None
        start = function.body[0].end_lineno if has_docstring else function.body[0].lineno - 1
        while not has_docstring and lines[start - 1].strip().startswith("#"):
            start -= 1  # a comment before the first statement belongs to the body
        body = lines[start : function.end_lineno]
        if body and body[0].strip() == _GIVEN:
            continue
        indent = " " * function.body[0].col_offset
        lines[start : function.end_lineno] = replace("\n".join(body), indent).splitlines()
    return "\n".join(lines)
