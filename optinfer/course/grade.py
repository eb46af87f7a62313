"""Grade notebooks: run each in a fresh kernel, ask that kernel for the answers, count the points.

`optinfer grade NOTEBOOK… [--json] [--junit FILE] [--min 0.8] [--assignment NOTEBOOK]`

What the notebook shows is not believed: after its cells have run, the kernel is asked to check every exercise again.
A cell that raises is passed over, one that hangs is interrupted, one that kills the kernel is left out of a second run.
"""

import json
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from optinfer.card import Table

if TYPE_CHECKING:
    from nbformat import NotebookNode

_CHECK = re.compile(r"""\bcheck\(\s*["']([\w.]+)["']""")
_MARK = "optinfer-grade:"
_RESTARTS = 6
_SECONDS_FOR_A_CHECK = 180

# Runs in the notebook's kernel after its cells. It takes the function by its name in the stub, or else what was last checked.
# The course's modules are loaded anew: whatever a cell did to them is gone.
_ASK = """\
def _optinfer_grade(id):
    import json, os, sys
    os.environ.pop("NBGRADER_EXECUTION", None)
    submitted = getattr(sys.modules.get("optinfer.course.checks"), "_submitted", {{}})
    if not hasattr(_optinfer_grade, "checks"):
        for name in [name for name in sys.modules if name.startswith("optinfer.course")]:
            del sys.modules[name]
        from optinfer.course import checks, exercises
        _optinfer_grade.checks, _optinfer_grade.exercises = checks, exercises
        _optinfer_grade.submitted = submitted
    exercises, found = _optinfer_grade.exercises, dict(id=id, points=0, score=0, passed=False, attempted=False)
    try:
        exercise = exercises.get(id)
    except exercises.UnknownExercise as error:
        found.update(message=str(error))
    else:
        found.update(points=exercise.points, message="no function " + exercise.name + " in the notebook")
        answer = globals().get(exercise.name, _optinfer_grade.submitted.get(id))
        if answer is not None:
            result = _optinfer_grade.checks.evaluate(exercise, answer)
            found.update(
                score=result.score, passed=result.passed, attempted=result.attempted, message=result.message)
    print({mark!r} + json.dumps(found))
"""


@dataclass(frozen=True)
class Score:
    """One exercise of one notebook."""

    id: str
    points: int
    score: int
    passed: bool
    attempted: bool
    message: str


@dataclass
class Grade:
    """One notebook: its scores, what went wrong while it ran, and seconds it took."""

    notebook: str
    scores: list[Score] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def points(self) -> int:
        return sum(score.points for score in self.scores)

    @property
    def score(self) -> int:
        return sum(score.score for score in self.scores)

    @property
    def fraction(self) -> float:
        """Share of the points, from 0 to 1; 0 for a notebook without exercises."""
        return self.score / self.points if self.points else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score, "points": self.points, "fraction": round(self.fraction, 4)}


def grade(
    path: str | Path,
    cell_timeout: float = 120,
    timeout: float = 900,
    memory: float = 8.0,
    folder: str | Path | None = None,
    assignment: str | Path | None = None,
) -> Grade:
    """Grade one notebook; the file is not touched, and nothing that it does raises here.

    Args:
        path: the notebook, whatever its name; its exercises are those of its metadata and of its calls of ``check``.
        cell_timeout: seconds one cell may take; then it is interrupted.
        timeout: seconds for the whole notebook; then its remaining cells are not run.
        memory: gigabytes that the kernel may use; then it is stopped.
        folder: working directory of the kernel; default an empty temporary one.
        assignment: the notebook that was handed out: its exercises count, whatever was deleted from this one.

    Raises:
        ValueError: `assignment` is no notebook with exercises.
    """
    wanted = _exercises_wanted(assignment) if assignment is not None else []
    start, result = time.perf_counter(), Grade(str(path))
    try:
        import nbformat

        notebook = nbformat.read(Path(path), as_version=4)
        ids = list(dict.fromkeys([*wanted, *exercises_of(notebook)]))
    except Exception as error:  # nbformat raises many kinds for files that are no notebooks
        result.problems.append(f"not a notebook: {_first_line(error)}")
        _fill_in(result, wanted)
        return result
    if not ids:
        result.problems.append('no exercise in it: no cell calls check("…", …)')
        return result
    with tempfile.TemporaryDirectory() as empty:
        limits = _Limits(cell_timeout, start + timeout, memory, str(folder or empty))
        skipped: set[int] = set()
        asked = list(ids)
        for _ in range(_RESTARTS):
            fatal = _run(notebook, asked, skipped, result, limits)
            if fatal is None:
                break
            if isinstance(fatal, str):
                asked.remove(fatal)
            else:
                skipped.add(fatal)
    _fill_in(result, ids)
    result.seconds = round(time.perf_counter() - start, 2)
    return result


def _exercises_wanted(assignment: str | Path) -> list[str]:
    import nbformat

    try:
        ids = exercises_of(nbformat.read(Path(assignment), as_version=4))
    except Exception as error:  # as above
        raise ValueError(f"assignment {str(assignment)!r} is not a notebook: {_first_line(error)}") from error
    if not ids:
        raise ValueError(f"assignment {str(assignment)!r} holds no exercises")
    return ids


def exercises_of(notebook: "NotebookNode") -> list[str]:
    """Ids of a notebook's exercises: those it was made with, then those that its cells check."""
    made_with = notebook.metadata.get("optinfer", {})
    ids = list(made_with.get("exercises", [])) if isinstance(made_with, dict) else []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            code = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith("#"))
            ids += _CHECK.findall(code)
    return list(dict.fromkeys(str(id) for id in ids))


@dataclass(frozen=True)
class _Limits:
    """Seconds of a cell, the moment when all cells must be done, gigabytes, and the folder that the kernel works in."""

    cell_timeout: float
    deadline: float
    memory: float
    folder: str


def _run(
    notebook: "NotebookNode", ids: list[str], skipped: set[int], result: Grade, limits: _Limits
) -> int | str | None:
    """Run the cells, then ask for the scores. Returns the cell, or the exercise, that killed the kernel, or None."""
    import copy

    from nbclient import NotebookClient

    client = NotebookClient(
        copy.deepcopy(notebook),
        timeout=limits.cell_timeout,
        interrupt_on_timeout=True,
        allow_errors=True,
        kernel_name="python3",
        startup_timeout=120,
    )
    client.resources["metadata"] = {"path": limits.folder}
    # A grade is no progress of the person who grades, and nbgrader's way of failing is not wanted here.
    progress = str(Path(limits.folder) / "progress.json")
    environment = {**_environment(), "OPTINFER_PROGRESS": progress, "MPLBACKEND": "agg"}
    result.scores = []
    with (
        client.setup_kernel(env=environment, stderr=subprocess.DEVNULL),
        _memory_limit(client, limits.memory) as exceeded,
    ):

        def killed() -> str:
            return f"used more than {limits.memory:g} GB" if exceeded else "killed the kernel"

        fatal = _run_cells(client, skipped, result, limits, killed)
        return _ask_for_scores(client, ids, result, killed) if fatal is None else fatal


def _run_cells(client: Any, skipped: set[int], result: Grade, limits: _Limits, killed: Callable[[], str]) -> int | None:
    """The cell after which the kernel is of no more use, or None."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    for index, cell in enumerate(client.nb.cells):
        if cell.cell_type != "code" or index in skipped:
            continue
        left = limits.deadline - time.perf_counter()
        if left <= 0:
            result.problems.append(f"cell {index + 1} and those after it were not run: out of time")
            break
        client.timeout = max(1, int(min(limits.cell_timeout, left)))
        started = time.perf_counter()
        try:
            client.execute_cell(cell, index)
        except DeadKernelError:
            result.problems.append(f"cell {index + 1} {killed()}")
            return index
        except (CellTimeoutError, CellExecutionError) as error:
            result.problems.append(f"cell {index + 1}: {_first_line(error)}")
            return index
        if time.perf_counter() - started >= client.timeout:
            result.problems.append(f"cell {index + 1} was interrupted after {client.timeout:.0f} seconds")
        problem = next((o for o in cell.outputs if o.output_type == "error"), None)
        if problem is not None and problem.ename != "KeyboardInterrupt":
            result.problems.append(f"cell {index + 1} raised {problem.ename}: {_first_line(problem.evalue)}")
    return None


def _ask_for_scores(client: Any, ids: list[str], result: Grade, killed: Callable[[], str]) -> str | None:
    """Check each exercise in the kernel. Returns the one whose check killed it, or None."""
    import nbformat
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    client.timeout = _SECONDS_FOR_A_CHECK
    for i, id in enumerate(ids):
        code = f"_optinfer_grade({id!r})"
        cell = nbformat.v4.new_code_cell(code if i else f"{_ASK.format(mark=_MARK)}\n{code}")
        client.nb.cells.append(cell)
        try:
            client.execute_cell(cell, len(client.nb.cells) - 1)
        except DeadKernelError:
            result.problems.append(f"the check of {id} {killed()}")
            return id
        except (CellTimeoutError, CellExecutionError) as error:
            result.problems.append(f"the check of {id}: {_first_line(error)}")
            return None
        result.scores += _read_scores(cell)
    return None


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "NBGRADER_EXECUTION"}


def _read_scores(cell: Any) -> list[Score]:
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return [Score(**json.loads(line[len(_MARK) :])) for line in text.splitlines() if line.startswith(_MARK)]


def _fill_in(result: Grade, ids: list[str]) -> None:
    """An exercise that could not be checked scores 0 of its points."""
    from optinfer.course import exercises

    known = {score.id: score for score in result.scores}
    scores = []
    for id in ids:
        if id in known:
            scores.append(known[id])
            continue
        try:
            points = exercises.get(id).points
        except exercises.UnknownExercise:
            points = 0
        scores.append(Score(id, points, 0, False, False, "could not be checked: " + "; ".join(result.problems[-1:])))
    result.scores = scores


@contextmanager
def _memory_limit(client: Any, gigabytes: float) -> Iterator[list[int]]:
    """Kill the kernel when it, with its children, holds more than so much memory; the list is then not empty."""
    import psutil

    exceeded: list[int] = []
    done = threading.Event()

    def watch() -> None:
        kernel = psutil.Process(client.km.provisioner.pid)
        while not done.wait(0.1):
            try:
                family = [kernel, *kernel.children(recursive=True)]
                used = sum(process.memory_info().rss for process in family)
                if used > gigabytes * 1e9:
                    exceeded.append(used)
                    kernel.kill()
                    return
            except psutil.Error:
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield exceeded
    finally:
        done.set()
        thread.join()


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------ reports
def report(grades: list[Grade], minimum: float) -> str:
    """All grades as text: a table, then what the failed exercises said."""
    rows, details = [], []
    for found in grades:
        for score in found.scores:
            state = "solved" if score.passed else ("wrong" if score.attempted else "not done")
            rows.append((Path(found.notebook).name, score.id, state, f"{score.score}/{score.points}"))
            if score.attempted and not score.passed:
                details.append(f"\n{found.notebook}\n{score.message}")
        if found.problems:
            details.append("\n".join([f"\n{found.notebook}", *found.problems]))
        verdict = "" if found.fraction >= minimum and found.points else f"  (below {minimum:.0%})"
        rows.append(
            (Path(found.notebook).name, "", "", f"{found.score}/{found.points} = {found.fraction:.0%}{verdict}")
        )
    return "\n".join([repr(Table(("notebook", "exercise", "", "points"), tuple(rows))), *details])


def junit(grades: list[Grade]) -> str:
    """All grades as JUnit XML: a suite for each notebook, a case for each exercise."""
    root = ElementTree.Element("testsuites")
    for found in grades:
        failures = sum(not score.passed for score in found.scores)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=Path(found.notebook).stem,
            tests=str(len(found.scores)),
            failures=str(failures),
            errors="0" if found.scores else "1",
            time=str(found.seconds),
        )
        for score in found.scores:
            one = ElementTree.SubElement(suite, "testcase", classname=Path(found.notebook).stem, name=score.id)
            if not score.passed:
                failure = ElementTree.SubElement(one, "failure", message=_first_line(score.message))
                failure.text = _printable(score.message)
        if not found.scores:
            one = ElementTree.SubElement(suite, "testcase", classname=Path(found.notebook).stem, name="notebook")
            ElementTree.SubElement(one, "error", message=_printable("; ".join(found.problems)))
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _printable(text: str) -> str:
    """Without the control characters that XML forbids."""
    return re.sub(r"[^\t\n\r\x20-\uFFFD]", "", text)
