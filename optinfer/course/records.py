"""What the reader has solved, kept in a file: it survives restarts, and on Colab it can live in Drive.

The file is ~/.optinfer/progress.json, or what the environment variable OPTINFER_PROGRESS names (a file, or a folder
that gets a progress.json).
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optinfer.card import Table
from optinfer.folders import write_whole

if TYPE_CHECKING:
    from optinfer.course.checks import Result


def path() -> Path:
    """Where progress is kept."""
    chosen = os.environ.get("OPTINFER_PROGRESS")
    if not chosen:
        return Path.home() / ".optinfer" / "progress.json"
    return Path(chosen) if chosen.endswith(".json") else Path(chosen) / "progress.json"


def load() -> dict[str, dict[str, Any]]:
    """What is known of each exercise: ``tries``, ``solved`` (seconds since 1970), ``hints``. A damaged file counts as empty."""
    try:
        known = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {str(key): value for key, value in known.items() if isinstance(value, dict)}


def update(exercise_id: str, **changes: Any) -> None:
    """Change what is known of one exercise. A folder that cannot be written to is no reason to fail."""
    known = load()
    known.setdefault(exercise_id, {}).update(changes)
    with contextlib.suppress(OSError):
        write_whole(path(), json.dumps(known, indent=1, sort_keys=True))


def record(result: "Result") -> None:
    """Count a try, and keep the moment of the first success."""
    if not result.attempted:
        return
    entry = load().get(result.id, {})
    changes: dict[str, Any] = {"tries": int(entry.get("tries", 0)) + 1}
    if result.passed and "solved" not in entry:
        changes["solved"] = int(time.time())
    update(result.id, **changes)


def progress() -> Table:
    """Your progress, chapter by chapter."""
    from optinfer.course import exercises

    known = load()
    rows, done, total = [], 0, 0
    for chapter in exercises.CHAPTERS:
        ours = exercises.of_chapter(chapter.prefix)
        solved = [exercise for exercise in ours if "solved" in known.get(exercise.id, {})]
        points, possible = sum(e.points for e in solved), sum(e.points for e in ours)
        done, total = done + points, total + possible
        left = [exercise.id for exercise in ours if exercise not in solved]
        bar = "█" * len(solved) + "░" * len(left)
        rows.append(
            (chapter.title, bar, f"{len(solved)}/{len(ours)}", f"{points}/{possible}", left[0] if left else "done")
        )
    caption = f"{done} of {total} points. Kept in {str(path()).replace(str(Path.home()), '~', 1)}"
    return Table(("chapter", "", "solved", "points", "next"), tuple(rows), caption)
