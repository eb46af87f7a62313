"""Wrong answers as readers give them: written from an exercise's text, not by changing its solution.

A file a chapter. Each answer's name says what its writer believed.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optinfer.course.exercise import plain
from optinfer.course.exercises import CHAPTERS


@dataclass(frozen=True)
class Reader:
    """One wrong answer.

    Attributes:
        id: of the exercise.
        answer: the function, class or kernel.
        misconception: the one that its message must name; None: its message must name none, because none is true of it.
        never: words that the message must not hold.
    """

    id: str
    answer: Any
    misconception: str | None
    never: tuple[str, ...]

    @property
    def belief(self) -> str:
        return plain(self.answer).__name__


_readers: list[Reader] = []


def wrong(id: str, misconception: str | None = None, never: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Decorator: a wrong answer to this exercise."""

    def add(answer: Any) -> Any:
        _readers.append(Reader(id, answer, misconception, never))
        return answer

    return add


def every() -> list[Reader]:
    for chapter in CHAPTERS:
        importlib.import_module(f"{__name__}.{chapter.prefix}")
    return _readers
