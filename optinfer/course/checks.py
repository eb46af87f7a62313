"""Check an answer: run it on many inputs, compare, and say what the pattern of the errors usually means.

How a misconception is recognized: every exercise knows its usual wrong answers as code. Where the reader's answer
fails, those are run on the same inputs, and the one that fails in the same way names the misconception.
"""

import inspect
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from optinfer.card import Card, shown
from optinfer.course import exercises
from optinfer.course.compare import Difference, difference, show
from optinfer.course.exercise import Case, Draw, Exercise, Refused, Wrong, plain
from optinfer.course.time_limit import TooSlow, time_limit

_COURSE = str(Path(__file__).parent) + os.sep
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_MACHINERY = (__file__, str(Path(__file__).with_name("time_limit.py")), str(Path(__file__).parents[1] / "plugins.py"))
_KERNELS = f"{os.sep}optinfer_kernels{os.sep}"
_WATCHED_BY = tuple(
    f"{_KERNELS}{name}.py" for name in ("interpreter", "memory_check", "__init__")
)  # what runs the reader's kernels, or says that there is no Triton
_LIBRARIES = (_PACKAGE, *(path + os.sep for path in sysconfig.get_paths().values()))  # no code of the reader's


@dataclass(frozen=True)
class Result:
    """What a check found. True if every input passed.

    Attributes:
        id: of the exercise.
        passed: every input passed.
        cases, passed_cases: inputs tried, and those that passed.
        attempted: False while the stub still raises NotImplementedError.
        points: that the exercise is worth; `score` is all or none of them.
        misconception: the name of the one recognized, if any.
        card: what the reader sees.
    """

    id: str
    passed: bool
    cases: int
    passed_cases: int
    attempted: bool
    points: int
    misconception: str | None
    card: Card

    @property
    def score(self) -> int:
        return self.points if self.passed else 0

    @property
    def message(self) -> str:
        return repr(self.card)

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return repr(self.card)

    def _repr_html_(self) -> str:
        return self.card._repr_html_()


class Shortcut(BaseException):
    """The answer called what it should have been; not an Exception, so that no `except Exception` hides it."""


@dataclass(frozen=True)
class _Outcome:
    """What an answer did with one input: a value, or an error and the reader's line that it comes from."""

    value: Any = None
    error: BaseException | None = None
    line: str = ""


def evaluate(exercise: Exercise, answer: object, seed: int = 0) -> Result:
    """Run an answer on all inputs of an exercise; raises nothing but KeyboardInterrupt."""
    if not callable(answer) and not hasattr(answer, "fn"):
        return _refused(
            exercise, f"Pass the function itself, not its result: `check({exercise.id!r}, {exercise.name})`."
        )
    run = _Run(exercise, seed, list(exercise.cases(Draw(seed))))
    for mine, theirs, untouched in zip(exercise.cases(Draw(seed)), exercise.cases(Draw(seed)), run.inputs):
        if mine.slow and run.failed:
            break  # the small inputs say more, and sooner
        outcome = _attempt(exercise, answer, mine, watched=True)
        if _not_attempted(outcome.error):
            return _not_started(exercise)
        if isinstance(outcome.error, Refused):
            return _refused(exercise, str(outcome.error))
        run.outcomes.append(outcome)
        run.expected.append(exercise.expected(*theirs.args))
        run.differences.append(_judge(exercise, outcome, run.expected[-1], mine, untouched))
        if isinstance(outcome.error, (Shortcut, TooSlow)):
            break  # one is enough
    return _failed(run) if run.failed else _passed(run)


@dataclass
class _Run:
    """An answer on all inputs: what was expected, what came out, where they differ. Slow inputs may not have been tried."""

    exercise: Exercise
    seed: int
    inputs: list[Case]
    expected: list[Any] = field(default_factory=list)
    outcomes: list[_Outcome] = field(default_factory=list)
    differences: list[Difference | None] = field(default_factory=list)

    @property
    def failed(self) -> list[int]:
        return [i for i, found in enumerate(self.differences) if found is not None]


# ------------------------------------------------------------------------------------------------------ one input
def _attempt(exercise: Exercise, answer: Any, c: Case, watched: bool) -> _Outcome:
    try:
        with time_limit(exercise.limit):
            if exercise.run and (exercise.model or exercise.runs_the_package):  # watch only the reader's own part
                return _Outcome(exercise.run(_watched(exercise, answer) if watched else answer, *c.args))
            with _watch(exercise) if watched else _nothing():
                return _Outcome(exercise.run(answer, *c.args) if exercise.run else answer(*c.args))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return _Outcome(error=_chain(error)[0], line=_line(error))


def _chain(error: BaseException) -> list[BaseException]:
    """What went wrong inside a Triton kernel, then the interpreter's wrappings around it; one error otherwise."""
    chain = [error]
    while type(chain[0]).__name__ == "InterpreterError" and (inner := chain[0].__cause__ or chain[0].__context__):
        chain.insert(0, inner)
    return chain


def _line(error: BaseException) -> str:
    """The last line of the reader's own code on the way to an error."""
    for link in _chain(error):
        for frame in reversed(traceback.extract_tb(link.__traceback__)):
            if frame.line and not frame.filename.startswith(_LIBRARIES) and _KERNELS not in frame.filename:
                return frame.line
    return ""


def _judge(exercise: Exercise, outcome: _Outcome, expected: Any, mine: Case, untouched: Case) -> Difference | None:
    if outcome.error is not None:
        return Difference("error", _error_text(outcome))
    found = difference(expected, outcome.value, exercise.rtol, exercise.atol)
    if found is None and not exercise.changes_input:
        for name, before, after in zip(_parameters(exercise, mine), untouched.args, mine.args):
            if isinstance(before, (Tensor, list, dict)) and difference(before, after, 0, 0) is not None:
                return Difference("input", f"the result is right, but `{name}` was changed on the way")
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# ------------------------------------------------------------------------------------------------------ shortcuts
def _watched(exercise: Exercise, answer: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _watch(exercise):
            return answer(*args, **kwargs)

    return call


@contextmanager
def _watch(exercise: Exercise) -> Iterator[None]:
    """Stop an answer that calls the package, another answer of the course, or a function the exercise forbids."""
    given = {function.__name__ for function in exercise.given}
    found: list[str] = []

    def hook(frame: FrameType, event: str, arg: Any) -> None:
        name = None
        if event == "call":
            code = frame.f_code
            if _is_ours(code) and not _is_allowed(frame, given):
                name = f"{frame.f_globals.get('__name__', 'optinfer')}.{code.co_name}"
            elif code.co_name in exercise.forbidden and f"{os.sep}torch{os.sep}" in code.co_filename:
                name = code.co_name
        elif event == "c_call" and getattr(arg, "__name__", "") in exercise.forbidden:
            name = arg.__name__
        if name is not None:
            found.append(name)
            raise Shortcut(name)

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(before)
        if found and not isinstance(sys.exc_info()[1], Shortcut):
            raise Shortcut(found[0])


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_PACKAGE) or _KERNELS in code.co_filename


def _is_allowed(frame: FrameType, given: set[str]) -> bool:
    """The machinery of the check itself, layers of a model, and in the modules of exercises all but answers and references."""
    filename, name = frame.f_code.co_filename, frame.f_code.co_qualname.split(".")[0]
    if filename in _MACHINERY or filename.endswith(_WATCHED_BY) or _is_in_a_layer(frame):
        return True
    if not filename.startswith(_COURSE + "exercises"):
        return False
    ours = frame.f_globals.get("EXERCISES", ())
    answers = {plain(f).__name__ for e in ours for f in (e.answer, e.reference) if f is not None}
    return name in given or name not in answers


def _is_in_a_layer(frame: FrameType) -> bool:
    """Whether a torch module was called on the way here: what a model's layers compute with is not the reader's choice."""
    caller = frame.f_back
    while caller is not None:
        if caller.f_code is torch.nn.Module.__call__.__code__:
            return True
        caller = caller.f_back
    return False


# ------------------------------------------------------------------------------------------------------ diagnosis
@dataclass(frozen=True)
class _Diagnosis:
    """A misconception whose wrong answer does the same, the input to show, and whether it alone explains all errors."""

    wrong: Wrong
    input: int
    alone: bool


def diagnose(run: _Run) -> _Diagnosis | None:
    """The misconception whose wrong answer fails like this one.

    It is named as the cause only if it explains every failing input, at least two of them, fails nowhere else, and no
    other does the same. Otherwise the one that explains most is mentioned, if that is at least half.
    """
    found = []
    for wrong in run.exercise.wrong:
        explained, contradicted = _explained(run, wrong)
        if explained:
            found.append((len(explained) - contradicted, explained, wrong))
    if not found:
        return None
    score, explained, wrong = max(found, key=lambda entry: entry[0])  # the first of equals
    whole = [entry for entry in found if entry[0] == len(run.failed)]
    if len(whole) == 1 and len(run.failed) >= 2:
        return _Diagnosis(wrong, explained[0], True)
    if 2 * score < len(run.failed):
        return None
    values = [i for i in explained if run.outcomes[i].error is None]
    return _Diagnosis(wrong, (values or explained)[0], False)


def _explained(run: _Run, wrong: Wrong) -> tuple[list[int], int]:
    """The inputs on which a wrong answer fails like the reader's, and on how many it fails where the reader's does not.

    The second is looked for only where the first are enough for `diagnose`.
    """
    exercise, answer = run.exercise, run.exercise.wrong_answer(wrong)
    inputs = list(exercise.cases(Draw(run.seed)))
    tried = [i for i in range(len(run.outcomes)) if not inputs[i].slow]

    def fails(i: int) -> tuple[_Outcome, Difference | None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not the reader's
            outcome = _attempt(exercise, answer, inputs[i], watched=False)
        return outcome, _judge(exercise, outcome, run.expected[i], inputs[i], run.inputs[i])

    explained = []
    for i in [i for i in tried if run.differences[i] is not None]:
        (outcome, found), reader = fails(i), run.differences[i]
        if found is not None and (found.kind == "input") == (reader.kind == "input"):
            explained += [i] * _alike(exercise, run.outcomes[i], outcome)
    others = [i for i in tried if run.differences[i] is None] if 2 * len(explained) >= len(run.failed) else []
    return explained, sum(fails(i)[1] is not None for i in others)


def _alike(exercise: Exercise, mine: _Outcome, theirs: _Outcome) -> bool:
    if mine.error is not None or theirs.error is not None:
        return _kind(mine.error) == _kind(theirs.error)
    return difference(theirs.value, mine.value, exercise.rtol, exercise.atol, dtypes=False) is None


def _kind(error: BaseException | None) -> tuple[str, str]:
    return (type(error).__name__, str(error)[:60])


def _clue(run: _Run) -> str:
    """What a pattern of errors usually means where no misconception of the exercise fits."""
    first = run.failed[0]
    error, found = run.outcomes[first].error, run.differences[first]
    if isinstance(error, Shortcut):
        return f"Write it yourself: `{error}` must not be called here."
    if isinstance(error, TooSlow):
        return "A loop that never ends, or one over single numbers where a tensor operation would do."
    if isinstance(error, NameError):
        return "A name is used before it is defined: run the cells above first, or check its spelling."
    if isinstance(error, ImportError):
        return "Something that this exercise needs is not installed here."
    right = len(run.outcomes) - len(run.failed)
    some = f"{right} {'inputs pass' if right > 1 else 'input passes'}: what is special about this one?" if right else ""
    if error is not None:
        return f"The code stops on this input. {some or 'Make such an input in a cell, and run the lines one by one.'}"
    values = [outcome.value for outcome in run.outcomes]
    if values[first] is None:
        return "Nothing came back: is a `return` missing?"
    if found.kind == "input":
        return "An operation in place (ending in `_`, or `x[...] = …`, or `list.append`) reaches the caller: work on a copy."
    if found.kind in ("type", "shape", "dtype"):
        return "Compare the types, shapes and dtypes in the docstring with what is returned."
    if len(values) > 1 and all(difference(values[0], v, 0, 0) is None for v in values[1:]):
        return "The answer is the same for every input."
    if found.kind == "nan":
        return "A NaN comes from 0/0, inf - inf or inf * 0: look for a row, block or range that is empty, constant or masked."
    if some:
        return some
    ratio = _constant_ratio([(run.expected[i], values[i]) for i in run.failed])
    if ratio is not None and abs(ratio - 1) > 0.01:
        return f"Every number is {ratio:.6g} times the expected one: a factor is missing or too many."
    if ratio is not None:
        return "Very close: are some of the steps computed in too few bits?"
    return "Try the smallest failing input by hand, and compare each intermediate value."


def _constant_ratio(pairs: list[tuple[Any, Any]]) -> float | None:
    """By which one factor all numbers of several (expected, got) differ; at least two numbers."""
    ratios = []
    for expected, got in pairs:
        kind = Tensor if isinstance(expected, Tensor) else (int, float)
        if not (isinstance(expected, kind) and isinstance(got, kind)):
            return None
        wanted, mine = torch.as_tensor(expected).double(), torch.as_tensor(got).double()
        if mine.shape != wanted.shape:
            return None
        ratios.append((mine / wanted)[wanted != 0])
    ratio = torch.cat([r.flatten() for r in ratios])
    if len(ratio) > 1 and ratio.isfinite().all() and (ratio - ratio.mean()).abs().max() < 1e-3 * ratio.mean().abs():
        return float(ratio.mean())
    return None


# ------------------------------------------------------------------------------------------------------ in words
def _passed(run: _Run) -> Result:
    exercise, count = run.exercise, len(run.inputs)
    lines = [f"All {count} {exercise.noun}s {exercise.verb}. {exercise.points} point{'s' * (exercise.points > 1)}."]
    for c, outcome in zip(run.inputs, run.outcomes):
        if c.slow and isinstance(outcome.value, dict) and "text" in outcome.value:
            lines.append(f"{c.label[0].upper()}{c.label[1:]}: the model says {show(outcome.value['text'])}")
    card = Card(f"{exercise.id}: {exercise.title}", tuple(lines), "good")
    return Result(exercise.id, True, count, count, True, exercise.points, None, card)


def _not_started(exercise: Exercise) -> Result:
    lines = (
        f"Not started. Write the body of `{exercise.name}`, run its cell, then this one again.",
        f'A first nudge: `hint("{exercise.id}")`.',
    )
    card = Card(f"{exercise.id}: {exercise.title}", lines, "note")
    return Result(exercise.id, False, 0, 0, False, exercise.points, None, card)


def _refused(exercise: Exercise, line: str) -> Result:
    card = Card(f"{exercise.id}: {exercise.title}", (line,), "bad")
    return Result(exercise.id, False, 0, 0, True, exercise.points, None, card)


def _failed(run: _Run) -> Result:
    exercise, first, count = run.exercise, run.failed[0], len(run.inputs)
    stopped = isinstance(run.outcomes[first].error, (Shortcut, TooSlow))
    told = None if stopped or _is_typo(run.outcomes[first].error) else diagnose(run)
    at = told.input if told else first
    outcome, found = run.outcomes[at], run.differences[at]
    lines = [f"{exercise.noun.capitalize()}: {run.inputs[at].label}"]
    names = _parameters(exercise, run.inputs[at])
    lines += [f"  `{name}` = {show(value)}" for name, value in zip(names, run.inputs[at].args)]
    if not stopped:
        lines.append(f"Expected: {show(run.expected[at])}")
    if outcome.error is None:
        lines.append(f"Got: {show(outcome.value)}")
    lines.append(f"Difference: {found.text}.")
    lines += _explanation(run, told, at)
    if len(run.outcomes) < count and not stopped:
        lines.append("The real model was not run: it comes after the small inputs.")
    lines.append(f'Stuck? `hint("{exercise.id}")`')
    passed = 0 if stopped else len(run.outcomes) - len(run.failed)
    title = "stopped" if stopped else f"{passed} of {count} {exercise.noun}s {exercise.verb}"
    card = Card(f"{exercise.id}: {title}", tuple(lines), "bad")
    return Result(exercise.id, False, count, passed, True, exercise.points, told.wrong.name if told else None, card)


def _explanation(run: _Run, told: _Diagnosis | None, at: int) -> list[str]:
    """What is usually behind it, then the questions that other inputs with wrong results ask."""
    outcome = run.outcomes[at]
    asks = [run.inputs[i] for i in run.failed if run.inputs[i].clue and outcome.error is None]
    lines = [c.clue for c in asks if c is run.inputs[at]]
    if told is not None and told.alone:
        lines.append(f"This usually means: {told.wrong.name}. {told.wrong.meaning}")
    elif told is not None:
        lines.append(
            "The same result comes out of a common mistake, which may or may not be yours: "
            f"{told.wrong.name}. {told.wrong.meaning}"
        )
    elif (
        outcome.error is None
        and all(_is_input(run.outcomes[i].value, run.inputs[i].args) for i in run.failed)
        and len(run.failed) > 1
    ):
        lines.append("The input came back unchanged.")
    elif not lines:
        lines.append(_clue(run))
    return lines + [f"The same with: {c.label}. {c.clue}" for c in asks if c is not run.inputs[at]]


def _is_input(value: Any, args: tuple[Any, ...]) -> bool:
    return any(
        isinstance(value, (Tensor, list, tuple, dict))
        and type(value) is type(arg)
        and difference(arg, value, 0, 0) is None
        for arg in args
    )


def _is_typo(error: BaseException | None) -> bool:
    return isinstance(error, (NameError, SyntaxError, ImportError))


def _not_attempted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, NotImplementedError) and not str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _error_text(outcome: _Outcome) -> str:
    error = outcome.error
    if isinstance(error, Shortcut):
        return f"`{error}` was called"
    if isinstance(error, TooSlow):
        return str(error)
    text = str(error).strip().splitlines()
    where = f" in the line `{outcome.line}`" if outcome.line else ""
    return f"{type(error).__name__}: {text[0] if text else 'no message'}{where}".rstrip(".")


def _parameters(exercise: Exercise, c: Case) -> list[str]:
    """Names of an input's arguments: those of `run`, or of the answer itself; a run of *args takes prompts too."""
    parameters = list(inspect.signature(exercise.run or exercise.answer).parameters.values())[bool(exercise.run) :]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
        if c.slow:
            names = ["prompt", "new_tokens", "group_size"]
        elif not names:
            names = list(inspect.signature(exercise.answer).parameters)
    else:
        names = [parameter.name for parameter in parameters]
    return names[: len(c.args)] + [f"argument {i + 1}" for i in range(len(names), len(c.args))]


def check(exercise_id: str, answer: object, seed: int = 0) -> Result:
    """Check your answer to an exercise. Never raises in a notebook: the result says what to look at.

    Args:
        exercise_id: such as ``"quantization.absmax"``.
        answer: your function, class or kernel itself, not its result.
        seed: of the random inputs.

    Returns:
        A Result: true if everything passed; shown as a card in a notebook, as plain text in a console. A plain
        script prints it.

    Raises:
        AssertionError: only under nbgrader, which takes an exception in a test cell for zero points.
    """
    from optinfer.course import records

    try:
        exercise = exercises.get(exercise_id)
    except exercises.UnknownExercise as error:
        card = Card("No such exercise", (str(error),), "bad")
        result = Result(str(exercise_id), False, 0, 0, False, 0, None, card)
    else:
        result = evaluate(exercise, answer, seed)
        records.record(result)
    _submitted[str(exercise_id)] = answer
    shown(result)
    if os.environ.get("NBGRADER_EXECUTION") == "autograde" and not result:
        raise AssertionError(result.message)
    return result


# What this session checked last, by id: `optinfer grade` asks for it after running a notebook.
_submitted: dict[str, Any] = {}
