"""Help in steps: a nudge, the idea, almost the code, and the solution when nothing else will do."""

from optinfer.card import Card, shown
from optinfer.course import exercises, records

_STEPS = ("a nudge", "the idea", "almost the code")


def hint(exercise_id: str, step: int | None = None) -> Card:
    """The next hint of an exercise, or hint number `step` (1 to 3). A plain script prints it."""
    return shown(_hint(exercise_id, step))


def _hint(exercise_id: str, step: int | None) -> Card:
    try:
        exercise = exercises.get(exercise_id)
    except exercises.UnknownExercise as error:
        return Card("No such exercise", (str(error),), "bad")
    seen = records.load().get(exercise.id, {}).get("hints", 0)
    seen = seen if isinstance(seen, int) else 0
    if step is None:
        step = min(seen + 1, len(_STEPS))
    if step not in range(1, len(_STEPS) + 1):
        return Card(f"{exercise.id} has hints 1 to {len(_STEPS)}, not {step!r}", (), "bad")
    if step > seen:
        records.update(exercise.id, hints=step)
    lines = exercise.hints[step - 1].splitlines()
    if step == len(_STEPS):
        lines.append(f'The solution: `solution("{exercise.id}")`.')
    return Card(f"{exercise.id}: {_STEPS[step - 1]} ({step} of {len(_STEPS)})", tuple(lines), "info")


class Solution:
    """The source of a solution: a code block in a notebook, plain text in a console."""

    def __init__(self, exercise_id: str, source: str) -> None:
        self.id = exercise_id
        self.source = source

    def __repr__(self) -> str:
        return self.source

    def _repr_markdown_(self) -> str:
        return f"```python\n{self.source}\n```"


def solution(exercise_id: str) -> Solution | Card:
    """The solution of an exercise, to read. A plain script prints it."""
    return shown(_solution(exercise_id))


def _solution(exercise_id: str) -> Solution | Card:
    try:
        exercise = exercises.get(exercise_id)
    except exercises.UnknownExercise as error:
        return Card("No such exercise", (str(error),), "bad")
    records.update(exercise.id, solution_seen=True)
    return Solution(exercise.id, exercise.source)
