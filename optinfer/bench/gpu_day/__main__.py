"""The command line, and the loop over the steps."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from optinfer import results
from optinfer.bench.gpu_day.journal import Journal
from optinfer.bench.gpu_day.steps import BY_NAME, STEPS, Step

LEAST = 0.4  # a step starts when so much of its time is left


def run_day(
    journal: Journal,
    minutes: float,
    steps: Sequence[Step] = STEPS,
    tiny: bool = False,
    again: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Every step that is not over yet, in order, until the minutes are used up; those that do not fit are named."""
    end = clock() + 60 * minutes
    for step in steps:
        left = end - clock()
        if journal.is_over(step) and not again:
            continue
        if why := step.missing():
            journal.not_run(step, why, "not here")
        elif left < LEAST * step.seconds:
            journal.not_run(step, f"{max(0, left):.0f} s were left, it takes up to {step.seconds}")
        else:
            limit = left if tiny else min(left, step.seconds)  # a rehearsal is where no GPU is: its steps take longer
            status, seconds, output = _run(step, journal.rows_file, limit, tiny)
            journal.finish(step, status, seconds, output)
        entry = journal.steps[step.name]
        print(f"{step.name}: {entry['status']} {entry.get('seconds', '')} {entry.get('why', '')}".rstrip(), flush=True)


def _run(step: Step, rows: Path, limit: float, tiny: bool) -> tuple[str, float, str]:
    """Status, seconds and output. Past its limit the step and all its processes are ended; the rows it wrote stay."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.unlink(missing_ok=True)
    begin = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            step.command(str(rows), tiny), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return status, time.monotonic() - begin, output.read().decode(errors="replace")


def main(argv: list[str] | None = None) -> int:
    """0: nothing failed, 1: something did; either way everything is in the folder."""
    parser = argparse.ArgumentParser(prog="python -m optinfer.bench.gpu_day", description=__doc__)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument(
        "--out", type=Path, default=Path("day"), help="folder of the day's files; an unfinished day goes on"
    )
    parser.add_argument(
        "--only", nargs="+", choices=BY_NAME, metavar="STEP", help="these steps alone, again if need be"
    )
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: to rehearse the day")
    parser.add_argument("--keep", type=Path, metavar="DAY", help="put the recordings of this folder where lessons look")
    args = parser.parse_args(argv)
    if args.keep:
        print(*Journal(args.keep).keep(results.default_folder()), sep="\n")
        return 0
    journal = Journal(args.out)
    steps = [BY_NAME[name] for name in args.only] if args.only else STEPS
    run_day(journal, args.minutes, steps, args.tiny, again=bool(args.only))
    print(journal.summary())
    return int(any(journal.steps[s.name]["status"] in ("failed", "out of time") for s in steps))


if __name__ == "__main__":
    sys.exit(main())
