"""What the day has brought so far, in a folder of a few files, each whole at any moment."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from optinfer import results
from optinfer.bench.gpu_day import tiles
from optinfer.bench.gpu_day.steps import STEPS, Step
from optinfer.bench.rows import TileRow
from optinfer.folders import write_whole

LOG_BYTES = 1 << 20  # of all steps together; the oldest lines go first
FINAL = ("done", "failed", "out of time", "not here")  # a second run does not repeat these


class Journal:
    """The state of the day in `folder`, which is made when there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: dict[str, dict[str, Any]] = self._read("day.json", {})
        self.recordings: dict[str, dict[str, Any]] = self._read("recordings.json", {})

    def _read(self, name: str, default: Any) -> Any:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default

    @property
    def rows_file(self) -> Path:
        return self.folder / "running.jsonl"

    def is_over(self, step: Step) -> bool:
        return self.steps.get(step.name, {}).get("status") in FINAL

    def not_run(self, step: Step, why: str, status: str = "not run") -> None:
        self.steps[step.name] = {"status": status, "why": why}
        self.write()

    def finish(self, step: Step, status: str, seconds: float, output: str) -> None:
        """Take the rows of the step that just ended, and write everything."""
        lines = [json.loads(line) for line in self._whole_lines()]
        facts = {kind: value for line in lines for kind, value in line.items() if kind != "row"}
        rows = [line["row"] for line in lines if "row" in line]
        if "not_here" in facts:
            status = "not here"
        entry: dict[str, Any] = {"status": status, "seconds": round(seconds, 1)}
        if why := facts.get("not_here") or facts.get("error"):
            entry["why"] = why
        entry["device"] = facts.get("provenance", {}).get("device")
        if step.suite is None:
            entry["rows"] = rows
        elif rows:
            self._record(step, rows, facts["provenance"])
            entry["rows_recorded"] = len(rows)
        self.steps[step.name] = entry
        self._log(step, output)
        self.write()
        self.rows_file.unlink(missing_ok=True)

    def _whole_lines(self) -> list[str]:
        if not self.rows_file.exists():
            return []
        return [line for line in self.rows_file.read_text(encoding="utf-8").splitlines(True) if line.endswith("}\n")]

    def _record(self, step: Step, rows: list[dict[str, Any]], provenance: dict[str, Any]) -> None:
        """Rows of one suite on one device stay together; a step that is repeated replaces its own."""
        suite, device = str(step.suite), provenance["device"]
        key = results.file_name(suite, provenance)
        record = self.recordings.setdefault(key, {"suite": suite, "device": device, "rows": []})
        record["provenance"] = provenance
        kept = [row for row in record["rows"] if row["step"] != step.name]
        record["rows"] = kept + [{**row, "step": step.name} for row in rows]

    def _log(self, step: Step, output: str) -> None:
        path = self.folder / "log.txt"
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        write_whole(path, f"{before}\n==== {step.name}\n{output[-(LOG_BYTES // 8) :]}"[-LOG_BYTES:])

    def write(self) -> None:
        for name, content in (("day.json", self.steps), ("recordings.json", self.recordings)):
            write_whole(self.folder / name, json.dumps(content, indent=1) + "\n")
        write_whole(self.folder / "summary.md", self.summary())
        if patch := self.patch():
            write_whole(self.folder / "tiles.patch", patch)

    def summary(self) -> str:
        """Every step with its outcome; then what failed, with the command that repeats it."""
        lines = ["| step | outcome | seconds | |", "|---|---|---|---|"]
        failures = []
        for step in STEPS:
            entry = self.steps.get(step.name, {"status": "not run"})
            rows = entry.get("rows", [])
            bad = [row for row in rows if row.get("ok") is False]
            text = entry.get("why", "") or (f"{len(rows) - len(bad)} of {len(rows)} hold" if rows else "")
            lines.append(f"| {step.name} | {entry['status']} | {entry.get('seconds', '')} | {text} |")
            if entry["status"] in ("failed", "out of time"):
                failures.append(
                    f"- {step.name}: {entry.get('why', entry['status'])}; again: `{repeat(step, self.folder)}`"
                )
                failures += [f"  - {row.get('case')}: {row.get('why') or row.get('error')}" for row in bad[:10]]
        return "\n".join(["# The day", "", *lines, "", "## What failed", "", *(failures or ["Nothing."])]) + "\n"

    def patch(self) -> str:
        records = [record for record in self.recordings.values() if record["suite"] == "tiles"]
        rows = [TileRow.read(row) for record in records for row in _without_step(record["rows"])]
        text = ""
        for path, before, after in tiles.proposals(rows):
            text += "".join(
                difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{path}", f"b/{path}")
            )
        return text

    def keep(self, folder: Path) -> list[Path]:
        """The recordings as files of `data/results`, where lessons look for them. Tiles stay here: they are a proposal."""
        written = []
        for name, record in self.recordings.items():
            if record["suite"] != "tiles":
                order = ("suite", "device", "provenance")
                content = {key: record[key] for key in order} | {"rows": _without_step(record["rows"])}
                write_whole(folder / name, json.dumps(content, indent=1) + "\n")
                written.append(folder / name)
        return written


def _without_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as their suite knows them."""
    return [{key: value for key, value in row.items() if key != "step"} for row in rows]


def repeat(step: Step, folder: Path) -> str:
    return f"python -m optinfer.bench.gpu_day --only {step.name} --out {folder}"
