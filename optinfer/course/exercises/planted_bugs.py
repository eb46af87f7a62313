"""A kernel, bugs planted in it, and the reader's inputs that must tell it from each of them.

A bug is an edit of the kernel's source, as a misconception is one of a solution's. Right kernel and wrong ones run
interpreted, their memory watched, on the same numbers; what comes out is compared with float64.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from optinfer.course.compare import difference, show
from optinfer.course.exercise import Case, Draw, Refused, Wrong, compiled, source_of
from optinfer.course.exercises.kernels import launched_reference

MOST, STEPS = 6, 32  # inputs of an answer, and turns of the kernel's loop that they take: one is 10 ms of a slow core
NO_CHANGE = "none: this is the right kernel"
_TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}

Input = dict[str, Any]


@dataclass(frozen=True, eq=False)
class PlantedBugs:
    """What an exercise needs to judge test inputs: its cases are the kernels, right and wrong.

    Attributes:
        kernel: the right one.
        bugs: edits of its source; the meaning of each is a question that leads to an input which shows it.
        fields: what an input holds, and the values allowed: a range of whole numbers, or a list of flags.
        promise: what the right kernel asks of an input, as a question; an input that breaks it tells nothing.
        steps: turns of the kernel's loop that an input takes, in all programs.
        launch: ``launch(kernel, input, draw)``: what came out of it, from `launched`.
        reference: ``reference(input, draw)``: what should, from float64.
    """

    kernel: Any
    bugs: tuple[Wrong, ...]
    fields: dict[str, Sequence[Any]]
    promise: str
    steps: Callable[[Input], int]
    launch: Callable[[Any, Input, Draw], dict[str, Any]]
    reference: Callable[[Input, Draw], Tensor]

    def cases(self, draw: Draw) -> Iterator[Case]:
        yield Case("the right kernel", (NO_CHANGE,), clue=self.promise)
        for change, bug in self.changes.items():
            yield Case(bug.name, (change,), clue=bug.meaning)

    def run(self, answer: Callable[[], object], change: str) -> str:
        """Whether the inputs that `answer` returns catch the kernel with this change; raises Refused."""
        tested = self.inputs(answer())
        no_tests = [one for one in tested if fails(self, "", tuple(one.items()))]
        if change == NO_CHANGE:
            return f"caught by input {tested.index(no_tests[0]) + 1}" if no_tests else "not caught"
        source = self.changes[change].source(source_of(self.kernel))
        tests = sorted((one for one in tested if one not in no_tests), key=self.steps)  # the cheapest may do
        return "caught" if any(fails(self, source, tuple(one.items())) for one in tests) else "not caught"

    def expected(self, change: str) -> str:
        return "not caught" if change == NO_CHANGE else "caught"

    def inputs(self, answer: object) -> list[Input]:
        """What an answer returned, if all of it is allowed; raises Refused."""
        if not isinstance(answer, (list, tuple)) or not 1 <= len(answer) <= MOST:
            raise Refused(f"Return a list of 1 to {MOST} inputs, not {show(answer)}.")
        for number, one in enumerate(answer, 1):
            if not isinstance(one, dict) or one.keys() != self.fields.keys():
                raise Refused(f"Input {number} must be a dict with the keys {', '.join(self.fields)}, not {show(one)}.")
            for name, allowed in self.fields.items():
                if type(one[name]) is not type(allowed[0]) or one[name] not in allowed:
                    raise Refused(f"{name} of input {number} must be {_words(allowed)}, not {show(one[name])}.")
        steps = [self.steps(one) for one in answer]
        if sum(steps) > STEPS:
            raise Refused(
                f"Your inputs take {' + '.join(map(str, steps))} steps of the loop; at most {STEPS} are allowed."
            )
        return [{name: one[name] for name in self.fields} for one in answer]

    @cached_property
    def changes(self) -> dict[str, Wrong]:
        """Each bug by what it changes, as the message shows it."""
        return {"; ".join(f"{old.strip()}  ->  {new.strip()}" for old, new in bug.edits): bug for bug in self.bugs}


@lru_cache(maxsize=4096)
def fails(planted: PlantedBugs, source: str, items: tuple[tuple[str, object], ...]) -> bool:
    """Whether one input shows that a kernel is wrong; an empty source means the right one. Always the same numbers."""
    one = dict(items)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a wrong kernel may compute NaN
        out = planted.launch(_kernel(planted, source), one, Draw(0))
    return difference(launched_reference(planted.reference(one, Draw(0))), out, **_TOLERANCE) is not None


@lru_cache(maxsize=256)
def _kernel(planted: PlantedBugs, source: str) -> Any:
    return compiled(source, planted.kernel, "a bug") if source else planted.kernel


def _words(allowed: Sequence[Any]) -> str:
    if isinstance(allowed, range):
        return f"a whole number from {allowed[0]} to {allowed[-1]}"
    return " or ".join(map(str, allowed))
