"""The day's command: a step is a process with a limit, what was measured stays, and what failed is named with its command."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optinfer import results
from optinfer.bench import rows as bench_rows
from optinfer.bench.gpu_day import checks, steps, tiles, work
from optinfer.bench.gpu_day.__main__ import main, run_day
from optinfer.bench.gpu_day.journal import Journal
from optinfer.bench.gpu_day.steps import STEPS, Step
from tests.pretend_gpu import CARDS, environment

ROOT = Path(__file__).parents[1]
SUITES = {step.suite for step in STEPS if step.suite} - {"tiles"}


@dataclasses.dataclass(frozen=True)
class Script(Step):
    """A step whose process runs this code; `rows` is the file for its rows."""

    code: str = ""

    def command(self, rows_file, tiny):
        head = "import json, sys, time; rows = open(sys.argv[1], 'a')\n"
        head += "def say(**line): rows.write(json.dumps(line) + '\\n'); rows.flush()\n"
        return [*self.tool, sys.executable, "-c", head + self.code, rows_file]


FACTS = {"device": "Some GPU", "capability": [9, 0], "date": "2026-01-01T00:00:00", "versions": {}}
SAYS = f"say(provenance={FACTS})\nsay(row={{'peer': 'a', 'seconds': 1.5}})\n"
RIGHT = Script("doctor", 60, "", code=SAYS)
MEASURED = Script("attention", 60, "", suite="attention", code=SAYS)
FAILS = Script("check-attention", 60, "", code="say(row={'case': 'odd', 'ok': False, 'error': 3})\nraise SystemExit(1)")
HANGS = Script(
    "speculative", 2, "", suite="speculative", code=SAYS + "rows.write('{\"row\": {'); rows.flush(); time.sleep(60)"
)
MISSING = Step("memcheck-paged", 60, "", tool=("no-such-program",))


def outcomes(journal):
    return {name: entry["status"] for name, entry in journal.steps.items()}


def test_each_step_is_written_and_what_a_cut_leaves_is_kept(tmp_path):
    run_day(Journal(tmp_path), 5, [RIGHT, MEASURED, FAILS, HANGS, MISSING])
    journal = Journal(tmp_path)  # as another process reads it
    assert outcomes(journal) == {
        "doctor": "done", "attention": "done", "check-attention": "failed", "speculative": "out of time",
        "memcheck-paged": "not here",
    }  # fmt: skip
    summary = journal.summary()
    assert "--only check-attention --out" in summary and "odd: 3" in summary and "no-such-program is not" in summary
    rows = {record["suite"]: record["rows"] for record in journal.recordings.values()}
    assert rows["speculative"] == [
        {"peer": "a", "seconds": 1.5, "step": "speculative"}
    ]  # the whole lines of the hung step
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_second_run_goes_on_and_only_repeats(tmp_path):
    run_day(Journal(tmp_path), 5, [MEASURED])
    journal = Journal(tmp_path)
    journal.steps["attention"]["seconds"] = -1
    run_day(journal, 5, [MEASURED, RIGHT])
    assert journal.steps["attention"]["seconds"] == -1 and journal.steps["doctor"]["status"] == "done"
    run_day(journal, 5, [MEASURED], again=True)
    assert journal.steps["attention"]["seconds"] >= 0
    assert [len(record["rows"]) for record in journal.recordings.values()] == [1]


def test_what_does_not_fit_is_named_and_comes_the_next_time(tmp_path):
    now = iter([0.0, 50.0, 50.0])
    journal = Journal(tmp_path)
    run_day(journal, 1, [RIGHT, MEASURED], clock=lambda: next(now))
    assert set(outcomes(journal).values()) == {"not run"} and "10 s were left" in journal.steps["doctor"]["why"]
    run_day(journal, 5, [RIGHT])
    assert journal.steps["doctor"]["status"] == "done"


def test_recordings_are_read_by_results(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "day")
    run_day(journal, 5, [MEASURED])
    (path,) = journal.keep(tmp_path / "data" / "results")
    assert path.name == "attention-some-gpu.json" and results.read(path).rows == [{"peer": "a", "seconds": 1.5}]
    monkeypatch.setattr("optinfer.data.root", lambda: tmp_path)
    assert results.load("attention").chip == "Some GPU"


def test_the_plan():
    assert [step.name for step in STEPS[:2]] == ["doctor", "check-attention"]  # right before fast
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        module, function = step.work.split(":")
        assert callable(getattr(__import__(f"{steps.__package__}.{module}", fromlist=[function]), function))


MEASURING = {step.work: step for step in STEPS if step.suite is not None}


@pytest.mark.parametrize("step", MEASURING.values(), ids=lambda step: step.name)
def test_what_is_recorded_are_the_suites_rows(step):
    measured = bench_rows.read(step.suite, list(step.rows(tiny=True)))
    assert measured and all(row.skipped or row.seconds or row.as_dict().get("speedup") for row in measured)


def test_a_wrong_kernel_is_a_failed_row_and_one_that_raises_too(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(checks, "paged_attention", lambda q, *a, **k: q * float("nan"))
    assert work.work("check-paged", tmp_path / "rows", tiny=True) == 1
    lines = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert not any(line["row"]["ok"] for line in lines if "row" in line)
    monkeypatch.setattr(checks, "paged_attention", lambda *a, **k: 1 / 0)
    assert all("ZeroDivisionError" in row["why"] for row in checks.paged(tiny=True))


@pytest.mark.parametrize("check", [checks.paged, checks.ragged, checks.engine])
def test_the_checks_hold_here(check):
    pytest.importorskip("triton")
    rows = list(check(tiny=True))
    assert rows and all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]


def test_tiles_become_a_patch_that_python_reads(tmp_path):
    pytest.importorskip("triton")
    rows = [
        bench_rows.TileRow(kernel=kernel, arch=90, head_dim=128, tile=(64, 64, 4, n), in_use=n == 2, seconds=seconds)
        for kernel in ("flash_attention", "flash_attention_tma", "flash_attention_ws")
        for n, seconds in ((2, 1.0), (3, 0.5))
    ]
    for path, before, after in tiles.proposals(rows):
        name = Path(path).stem
        space: dict[str, Any] = {"__name__": name, "__file__": path}
        added = [line for line in after.splitlines() if line not in before.splitlines()]
        assert len(added) == 1
        module = __import__(f"optinfer_kernels.{name}", fromlist=["TILES"])
        space |= {"TILES": dict(module.TILES), "Tile": module.Tile}
        exec(added[0], space)
        assert module.Tile(64, 64, 4, 3) in (
            space["TILES"].values() if name.endswith("ws") else space["TILES"][90].values()
        )
    slower = [dataclasses.replace(row, seconds=1.0) for row in rows]
    assert not tiles.proposals(slower)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("card", CARDS)
def test_rehearsed_on_a_pretended_card(card, tmp_path, monkeypatch):
    """The whole day by its command, each step in a process that pretends; what it brings is read as it is."""
    pytest.importorskip("triton")
    for name, value in environment(card).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPTINFER_DAY_PYTHON", f"{sys.executable} -m tests.pretend_gpu")
    monkeypatch.chdir(ROOT)
    day = tmp_path / "day"
    code = main(["--minutes", "115", "--tiny", "--out", str(day)])
    journal = Journal(day)
    watched = {step.name for step in STEPS if step.missing()}
    expected = {step.name: "not here" if step.name in watched else "done" for step in STEPS}
    assert code == 0 and outcomes(journal) == expected, journal.summary()
    for name in watched:
        assert "compute-sanitizer is not installed" in journal.steps[name]["why"]
    files = list(day.iterdir())
    assert len(files) <= 8 and max(file.stat().st_size for file in files) < 16e6

    kept = journal.keep(tmp_path / "data" / "results")
    monkeypatch.setattr("optinfer.data.root", lambda: tmp_path)
    assert len(results.recordings()) == len(kept) == len(SUITES)
    for suite in SUITES:
        recorded = results.load(suite, card)
        record = journal.recordings[results.file_name(suite, recorded.provenance)]
        assert recorded.on_gpu and recorded.chip == f"Pretend {card.upper()}"
        assert recorded.rows == [{k: v for k, v in row.items() if k != "step"} for row in record["rows"]]

    journal.finish(STEPS[0], "failed", 1.0, "")  # the command that the summary gives repeats it
    (command,) = [line.split("`")[1] for line in journal.summary().splitlines() if line.startswith("- doctor")]
    subprocess.run([*os.environ["OPTINFER_DAY_PYTHON"].split(), *command.split()[1:], "--tiny"], check=True)
    assert Journal(day).steps["doctor"]["status"] == "done"
