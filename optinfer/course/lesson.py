"""One running notebook: its set-up line, the reader's predictions, and the ledger of claims it put to a measurement."""

import datetime
import importlib.metadata
import inspect
import logging
import platform
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optinfer.card import Card, Folded, Table, Tone
from optinfer.course import claims
from optinfer.course.verdicts import VERDICTS, Verdict, side

if TYPE_CHECKING:
    import torch

    from optinfer.hardware import Machine

_SHOWN = ("torch", "transformers", "triton", "bitsandbytes")


@dataclass(frozen=True)
class _LedgerLine:
    claim: int
    measured: str
    where: str
    verdict: Verdict
    note: str

    @property
    def said(self) -> str:
        return ": ".join(filter(None, (self.verdict, self.note)))


@dataclass
class Lesson:
    """What `setup` returns. ``device`` and ``dtype`` are what the lesson's tensors should use.

    Attributes:
        name: the notebook's name, such as ``"01_quantization"``.
        device: the GPU when there is one.
        dtype: bf16, or fp16 on GPUs before Ampere.
        seed: every random generator was seeded with it.
    """

    name: str
    device: "torch.device"
    dtype: "torch.dtype"
    seed: int
    _guesses: dict[str, tuple[float, str]] = field(default_factory=dict, repr=False)
    _ledger: dict[int, _LedgerLine] = field(default_factory=dict, repr=False)

    @property
    def machine(self) -> "Machine":
        """This machine with its measured ceilings; the first use measures for a second or two."""
        from optinfer.hardware import this_machine

        return this_machine()

    def predict(self, name: str, value: float, unit: str = "") -> Card:
        """Keep the reader's guess under a name, to be compared later."""
        self._guesses[name] = (float(value), unit)
        return Card(f"Your prediction for {name}: {_number(value)} {unit}".rstrip(), tone="note")

    def compare(
        self, guess: str | float, measured: float, unit: str = "", even: float | None = None, spread: float = 0.0
    ) -> Card:
        """Show a guess, or the prediction kept under a name, beside what was measured: the direction first, then the size.

        Args:
            even: where the direction turns; default 1 where the unit says "times", else 0.
            spread: how far the measured value may be off.

        Raises:
            KeyError: no prediction was made under that name.
        """
        if isinstance(guess, str):
            if guess not in self._guesses:
                raise KeyError(f"no prediction named {guess!r}; predicted so far: {', '.join(self._guesses) or 'none'}")
            guess, kept_unit = self._guesses[guess]
            unit = unit or kept_unit
        even = even if even is not None else 1.0 if "times" in unit else 0.0
        title = f"You said {_number(guess)} {unit}, it is {_number(measured)} {unit}".replace(" ,", ",").rstrip()
        line, tone = _compared(guess, measured, even, spread)
        return Card(title, (line,), tone=tone)

    def say(self, *cases: tuple[bool, str] | str) -> None:
        """Say the first sentence whose condition holds. A sentence alone, at the end, is said where no other was.

        Conditions are made from measured values, with `side` and `judge` of `optinfer.course.verdicts` where there is
        noise, so that the words cannot contradict the numbers above them.

        Raises:
            TypeError: a case is neither a sentence nor a condition and a sentence.
        """
        for case in cases:
            when, sentence = (True, case) if isinstance(case, str) else case
            if not isinstance(sentence, str):
                raise TypeError(f"a case is (condition, sentence) or a sentence, not {case!r}")
            if when:
                self._show(Card(sentence, tone="said"))
                return

    def source(self, *functions: Any, title: str = "") -> Folded:
        """The source of functions or Triton kernels, one after the other, folded until the reader opens it."""
        plain = [getattr(function, "fn", function) for function in functions]
        names = ", ".join(f"`{function.__name__}`" for function in plain)
        return Folded(title or f"Read {names}", "\n\n".join(inspect.getsource(function).rstrip() for function in plain))

    def _show(self, card: Card) -> None:
        from IPython.display import display

        display(card)

    def claim(
        self, number: int, measured: str, verdict: Verdict | bool | None, note: str = "", where: str = ""
    ) -> None:
        """Enter a measurement in the ledger.

        Args:
            number: the claim's number, 1 to 14.
            measured: a short sentence made from measured values.
            verdict: ``"holds"``, ``"in part"``, ``"does not hold"`` or ``"not tested here"``, computed from the
                measurement; True, False and None stand for the first, the third and the last.
            note: what the verdict depends on.
            where: where the figure comes from when that is not this machine, such as a recording's caption.

        Raises:
            ValueError: there is no claim of that number, or no such verdict.
        """
        from optinfer import data

        if number not in data.claims():
            raise ValueError(f"number must be a claim from 1 to {max(data.claims())}, not {number!r}")
        if verdict is None:
            verdict = "not tested here"
        elif type(verdict).__name__ in ("bool", "bool_"):
            verdict = "holds" if verdict else "does not hold"
        if verdict not in VERDICTS:
            raise ValueError(
                f"verdict must be one of {', '.join(map(repr, VERDICTS))}, or a bool or None, not {verdict!r}"
            )
        where = where or f"{self.device_name()}, {datetime.date.today().isoformat()}"
        self._ledger[number] = line = _LedgerLine(number, measured, where, verdict, note)
        claims.record(number, lesson=self.name, measured=measured, verdict=line.said, where=where)

    def ledger(self) -> Table:
        """The claims of this lesson: what was said, what was measured, on what, and the verdict."""
        from optinfer import data

        rows = [
            (str(line.claim), data.claims()[line.claim], line.measured, line.where, line.said)
            for line in sorted(self._ledger.values(), key=lambda line: line.claim)
        ]
        return Table(("#", "claim", "measured", "on", "verdict"), tuple(rows))

    def claims(self) -> Table:
        """The fourteen claims of the course: who makes them, and where they are measured."""
        return claims.listed()

    def course_ledger(self) -> Table:
        """The claims of all lessons, as far as they were run on this computer."""
        return claims.table()

    def model_ledger(self) -> Table:
        """The claims about memory for each known model, computed from its shape."""
        return claims.of_models()

    def device_name(self) -> str:
        import torch

        from optinfer import hardware, processor

        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{processor.this_processor().name}, {hardware.usable_cores()} cores"

    def __repr__(self) -> str:
        return f"Lesson {self.name!r} on {self.device_name()} in {str(self.dtype).removeprefix('torch.')}"


def setup(name: str, min_memory: float = 0.0, seed: int = 0) -> Lesson:
    """Prepare a notebook: figure style, seeds, our plug-ins in transformers; print versions, device and memory.

    Safe to run twice, and to run in a session that has nothing but the installed package.

    Args:
        name: the notebook's name, such as ``"01_quantization"``.
        min_memory: gigabytes of free memory that the lesson needs; with less a warning is printed.
        seed: for Python, numpy and torch.
    """
    import numpy as np
    import torch
    import transformers

    from optinfer import hardware, plots

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # bitsandbytes asks for a package that is optional and comes from the hub; it computes without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    plots.style()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    device = hardware.default_device()
    lesson = Lesson(name, device, hardware.default_dtype(device), seed)
    _print_environment(lesson, min_memory)
    return lesson


def _print_environment(lesson: Lesson, min_memory: float) -> None:
    versions = []
    for package in _SHOWN:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    free = free_memory(lesson.device)
    dtype = str(lesson.dtype).removeprefix("torch.")
    print(f"Python {platform.python_version()} · " + " · ".join(versions))
    print(f"{lesson.device_name()} · {dtype} · {free / 1e9:.1f} GB of memory free · seed {lesson.seed}")
    if lesson.device.type == "cpu":
        print(
            "No GPU here: kernels run interpreted on the CPU, and GPU figures are shown as recorded where they exist."
        )
    if free < min_memory * 1e9:
        print(f"This lesson wants {min_memory:g} GB of free memory: close other notebooks first.")


def free_memory(device: "torch.device") -> int:
    """Bytes that can still be allocated on the device."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _close(guess: float, measured: float) -> bool:
    return guess == measured or (guess * measured > 0 and 0.8 <= guess / measured <= 1.25)


def _compared(guess: float, measured: float, even: float, spread: float) -> tuple[str, Tone]:
    """What to say about a guess, and the card's tone. A right size on the wrong side of even is a wrong guess."""
    guessed, found = side(guess, even, 0.0), side(measured, even, spread)
    level = f"no different from {_number(even)}"
    if found == "level" and spread:
        return f"Within what this measurement can tell, it is {level}.", "good" if abs(
            guess - even
        ) <= spread else "info"
    if guessed != found and not (_close(guess, measured) and "level" in (guessed, found)):
        words = {"more": f"more than {_number(even)}", "less": f"less than {_number(even)}", "level": level}
        return f"The direction is another one: you said {words[guessed]}, it is {words[found]}.", "bad"
    right = "The direction is right" if even else ""
    if _close(guess, measured) or abs(guess - measured) <= spread:
        return (f"{right}, and the size within a quarter." if right else "Within a quarter of it."), "good"
    if guess * measured <= 0:
        return f"Off by {_number(abs(guess - measured))}.", "info"
    ratio = measured / guess
    size = (
        f"The measurement is {_number(ratio)} times your guess."
        if ratio > 1
        else f"Your guess is {_number(1 / ratio)} times the measurement."
    )
    return " ".join(filter(None, (right and right + ".", size))), "info"
