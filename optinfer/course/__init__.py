"""The teaching side: set-up of a lesson, predictions, the claims ledger, exercises and their grading."""

from optinfer.course.lesson import Lesson, setup

__all__ = ["Lesson", "setup"]
