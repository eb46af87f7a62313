"""The teaching side: set-up of a lesson, predictions, the claims ledger, exercises and their grading."""

import importlib
from typing import Any

from optinfer.course.lesson import Lesson, setup

# The exercises need torch: they are loaded when one of these is first used.
_LATER = {
    "check": "optinfer.course.checks",
    "hint": "optinfer.course.hints",
    "solution": "optinfer.course.hints",
    "progress": "optinfer.course.records",
}

__all__ = ["Lesson", "check", "hint", "progress", "setup", "solution"]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
