"""The exercises, one module per notebook. A module is imported when one of its exercises is asked for."""

import difflib
import importlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optinfer.course.exercise import Exercise


@dataclass(frozen=True)
class Chapter:
    """The exercises of one notebook: the prefix of their ids, the notebook, and its title."""

    prefix: str
    notebook: str
    title: str


CHAPTERS = (
    Chapter("basics", "00_start_here", "Start here"),
    Chapter("quantization", "01_quantization", "Quantization"),
    Chapter("calibrated", "02_calibrated_quantization", "Calibrated quantization"),
    Chapter("attention", "03_flash_attention", "Flash attention"),
    Chapter("kv_cache", "04_kv_cache", "The KV cache"),
    Chapter("speculative", "05_speculative_decoding", "Speculative decoding"),
    Chapter("serving", "06_putting_it_together", "Putting it together"),
)


class UnknownExercise(LookupError):
    """There is no exercise of that id; the message names the nearest ones."""


@cache
def of_chapter(prefix: str) -> "tuple[Exercise, ...]":
    """The exercises of a chapter, in the order of its notebook."""
    return importlib.import_module(f"optinfer.course.exercises.{prefix}").EXERCISES


def every() -> "list[Exercise]":
    return [exercise for chapter in CHAPTERS for exercise in of_chapter(chapter.prefix)]


def get(exercise_id: str) -> "Exercise":
    """The exercise of that id.

    Raises:
        UnknownExercise: there is none.
    """
    prefix = str(exercise_id).split(".")[0]
    if any(chapter.prefix == prefix for chapter in CHAPTERS):
        for exercise in of_chapter(prefix):
            if exercise.id == exercise_id:
                return exercise
    ids = [exercise.id for exercise in every()]
    near = difflib.get_close_matches(str(exercise_id), ids, n=3, cutoff=0.4)
    raise UnknownExercise(
        f"there is no exercise {exercise_id!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )
