"""One command for the day there is a GPU: what only a GPU can show, in order of value, within the minutes there are.

    python -m optinfer.bench.gpu_day --minutes 25 --out FOLDER

It needs torch, triton and transformers. Every step is a process of its own with a time limit, so that a crash or a hang
costs one step. `day.json` and `summary.md` are written anew after each: a cut loses the step that ran. Called again
with the same folder it goes on with what is not done. Beside the two there is one recording per suite, as
`optinfer bench` writes it; `results.load` reads them once they lie in data/results.

`OPTINFER_DAY_PYTHON` is the command that stands for Python in the steps, for a rehearsal with a pretended GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optinfer.results import write_whole

TAIL = 3000  # characters of a step's output that are kept
RESERVE = 5.0  # seconds that are left for writing
LEAST = 10.0  # seconds without which no step begins


@dataclass(frozen=True)
class Step:
    """One thing to do: its name, what it may take at most in seconds, and how it is called."""

    name: str
    seconds: float
    arguments: tuple[str, ...]
    needs: str = ""  # a program without which it cannot be done

    def command(self) -> list[str]:
        python = shlex.split(os.environ.get("OPTINFER_DAY_PYTHON", "")) or [sys.executable]
        return [*shlex.split(self.needs), *python, "-m", *self.arguments]


def _check(name: str) -> tuple[str, ...]:
    return ("optinfer.bench.gpu_day", "--step", name)


def steps(folder: Path) -> list[Step]:
    """All of them, the most valuable first: is it right, is memory safe, how fast is it."""
    out = ("--out", str(folder))
    sanitizer = "compute-sanitizer --error-exitcode 9 --tool"
    return [
        Step("doctor", 60, ("optinfer.cli", "doctor")),
        Step("kernels", 180, _check("kernels")),
        Step("engine", 120, _check("engine")),
        Step("attention", 240, (*_check("attention"), *out)),
        Step("paged_attention", 120, (*_check("paged_attention"), *out)),
        Step("quantized_matmul", 240, (*_check("quantized_matmul"), *out)),
        Step("serving", 240, (*_check("serving"), *out)),
        Step("speculative", 180, (*_check("speculative"), *out)),
        Step("random_model", 300, (*_check("random_model"), *out)),
        Step("memcheck", 240, _check("kernels"), f"{sanitizer} memcheck"),
        Step("racecheck", 240, _check("kernels"), f"{sanitizer} racecheck"),
    ]


# ---------------------------------------------------------------------------------------------- what a step does


def _kernels(folder: Path | None, quick: bool) -> Any:
    from optinfer import hardware
    from optinfer.bench import gpu_checks

    return gpu_checks.kernels(hardware.default_device())


def _engine(folder: Path | None, quick: bool) -> Any:
    from optinfer import hardware
    from optinfer.bench import gpu_checks

    return gpu_checks.engine(hardware.default_device())


def _suite(name: str) -> Callable[[Path | None, bool], Any]:
    def run(folder: Path | None, quick: bool) -> Any:
        import importlib

        from optinfer import hardware, results

        rows = importlib.import_module(f"optinfer.bench.{name}").run(quick=quick)
        if folder is None:
            return rows
        return str(results.save(name, rows, folder, machine=hardware.this_machine()))

    return run


SUITES = ("attention", "paged_attention", "quantized_matmul", "serving", "speculative", "random_model")
WORK: dict[str, Callable[[Path | None, bool], Any]] = {
    "kernels": _kernels,
    "engine": _engine,
    **{name: _suite(name) for name in SUITES},
}


# ---------------------------------------------------------------------------------------------- the day


class Day:
    """What was done so far, in a folder.

    Args:
        folder: of `day.json`; made when it is not there.
        minutes: for this call.
        quick: smaller sizes, for a rehearsal.
        clock: seconds.
    """

    def __init__(self, folder: Path, minutes: float, quick: bool = False, clock: Callable[[], float] = time.monotonic):
        if not minutes > 0:
            raise ValueError(f"minutes must be positive, got {minutes!r}")
        self.folder, self.quick, self._clock = folder, quick, clock
        self._end = clock() + 60 * minutes
        self._file = folder / "day.json"
        self.done: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self.done = json.loads(self._file.read_text(encoding="utf-8"))

    @property
    def left(self) -> float:
        """Seconds of this call."""
        return self._end - self._clock()

    def run(self, wanted: list[Step]) -> bool:
        """Do what is not done; whether nothing failed. A step that failed is tried again, one that is right is not."""
        for step in wanted:
            if self.done.get(step.name, {}).get("outcome") == "right":
                continue
            if step.needs and shutil.which(shlex.split(step.needs)[0]) is None:
                self._write(step, "not here", 0.0, f"{shlex.split(step.needs)[0]} is not installed")
            elif self.left < LEAST + RESERVE:
                self._write(step, "no time", 0.0, "")
            else:
                print(f"{step.name}: at most {min(step.seconds, self.left - RESERVE):.0f} s", flush=True)
                self._write(step, *self._do(step, min(step.seconds, self.left - RESERVE)))
        return all(entry["outcome"] in ("right", "not here", "no time") for entry in self.done.values())

    def _do(self, step: Step, limit: float) -> tuple[str, float, str]:
        start = self._clock()
        command = [*step.command(), *(["--quick"] if self.quick and "--step" in step.arguments else [])]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=limit)
            outcome = "right" if process.returncode == 0 else f"failed with code {process.returncode}"
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            outcome = f"cut after {limit:.0f} s"
        return outcome, self._clock() - start, said

    def _write(self, step: Step, outcome: str, seconds: float, said: str) -> None:
        self.done[step.name] = {
            "outcome": outcome,
            "seconds": round(seconds, 1),
            "command": shlex.join(step.command()),
            "output": said[-TAIL:],
        }
        write_whole(self._file, json.dumps(self.done, indent=1) + "\n")
        write_whole(self.folder / "summary.md", self.summary())
        print(f"{step.name}: {outcome} ({seconds:.0f} s)", flush=True)

    def summary(self) -> str:
        """A table of what became of each step, and for what failed the command that repeats it with its last words."""
        lines = ["# The day on a GPU", "", "| step | outcome | seconds |", "|---|---|---|"]
        lines += [f"| {name} | {entry['outcome']} | {entry['seconds']} |" for name, entry in self.done.items()]
        for name, entry in self.done.items():
            if entry["outcome"].startswith(("failed", "cut")):
                last = "\n".join(entry["output"].strip().splitlines()[-12:])
                lines += ["", f"## {name}: {entry['outcome']}", "", f"`{entry['command']}`", "", "```", last, "```"]
        return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m optinfer.bench.gpu_day", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25, help="how long it may take in all")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results; default: gpu-day")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, for a rehearsal")
    parser.add_argument("--step", choices=tuple(WORK), help="do one step here, without a limit")
    arguments = parser.parse_args(argv)
    if arguments.step:
        print(json.dumps(WORK[arguments.step](arguments.out, arguments.quick), indent=1, default=str))
        return 0
    folder = arguments.out or Path("gpu-day")
    return 0 if Day(folder, arguments.minutes, arguments.quick).run(steps(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
