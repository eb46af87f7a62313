"""Recorded measurements: rows of figures with their provenance, one JSON file per suite and device."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optinfer import data, hardware
from optinfer.folders import write_whole
from optinfer.processor import Processor, this_processor

_PACKAGES = ("optinfer", "torch", "triton", "transformers", "bitsandbytes", "numpy")


LIKE = 2  # from this likeness on, figures of one chip say something about the other


@dataclass(frozen=True)
class Recorded:
    """One file of ``data/results``: what was measured (``rows``), on what and with what (``provenance``)."""

    suite: str
    device: str
    provenance: dict[str, Any]
    rows: list[dict[str, Any]]

    def where(self, **equals: Any) -> list[dict[str, Any]]:
        """The rows whose fields have these values."""
        return [row for row in self.rows if all(row.get(k) == v for k, v in equals.items())]

    def caption(self) -> str:
        """One line for the reader: what they look at was recorded, where and when, and whether that is a chip like theirs."""
        p = self.provenance
        line = f"recorded on {self.chip}, {p['date'][:10]}, torch {p['versions'].get('torch', '?')}"
        if self.likeness() == 1:
            return f"{line}; a chip of the same name as the one here, perhaps not the same"
        return line if self.likeness() >= LIKE else f"{line}; not a chip like the one here"

    @property
    def on_gpu(self) -> bool:
        return self.provenance.get("capability") is not None

    @property
    def chip(self) -> str:
        """The device's name, of a processor with its family and model."""
        processor = self.provenance.get("processor")
        return self.device if self.on_gpu or not processor else _processor(processor).full_name

    def likeness(self) -> int:
        """How like the chip here that of the recording is: 3 the same, 2 as good as the same, 1 the same name, 0 neither."""
        if not self.on_gpu:
            return this_processor().likeness(self.provenance.get("processor") or {"name": self.device})
        import torch

        return 3 if torch.cuda.is_available() and torch.cuda.get_device_name() == self.device else 0


def _processor(facts: dict[str, Any]) -> Processor:
    return Processor(**{**facts, "instructions": tuple(facts["instructions"])})


def provenance() -> dict[str, Any]:
    """Device, driver, versions, date and source revision of a measurement made now."""
    import torch

    on_gpu = torch.cuda.is_available()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions.setdefault("torch", torch.__version__)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else this_processor().name,
        "processor": asdict(this_processor()),
        "cores": hardware.usable_cores(),
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "revision": _output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def slug(device: str) -> str:
    """A device's name as a file name: ``"NVIDIA H200"`` becomes ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def file_name(suite: str, provenance: dict[str, Any]) -> str:
    """``<suite>-<chip>.json``. A processor's family and model belong to it: two that are called "AMD EPYC" share no file."""
    return f"{suite}-{slug(Recorded(suite, provenance['device'], provenance, []).chip)}.json"


def save(
    suite: str, rows: list[dict[str, Any]], folder: str | os.PathLike[str], *, machine: hardware.Machine | None = None
) -> Path:
    """Write rows and provenance to ``<folder>/<suite>-<chip>.json``, whole or not at all.

    Args:
        suite: the benchmark's name.
        rows: flat dicts of numbers and strings; raw samples go in lists.
        folder: made when it is not there.
        machine: a `hardware.Machine` whose measured ceilings belong to these figures.

    Raises:
        ValueError: there are no rows, or a row holds what JSON cannot.
    """
    if not rows:
        raise ValueError(f"no rows to save for suite {suite!r}")
    facts = provenance()
    record = {"suite": suite, "device": facts["device"], "provenance": facts, "rows": rows}
    if machine is not None:
        record["provenance"]["machine"] = machine.as_dict()
    try:
        content = json.dumps(record, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rows of suite {suite!r} cannot be written as JSON: {error}") from error
    target = Path(folder) / file_name(suite, facts)
    write_whole(target, content + "\n")
    return target


def default_folder() -> Path:
    """Where new results go: the repository's ``data/results``, or ``./results`` outside of it."""
    in_repository = (data.root() / "pyproject.toml").is_file()
    return data.root() / "data" / "results" if in_repository else Path("results")


def read(path: str | os.PathLike[str]) -> Recorded:
    """Read one results file.

    Raises:
        ValueError: it is not one.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        return Recorded(record["suite"], record["device"], record["provenance"], record["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of recorded results: {error}") from error


def recordings() -> list[Recorded]:
    """All of the course's recorded results, by chip and suite."""
    found = map(read, (data.root() / "data" / "results").glob("*.json"))
    return sorted(found, key=lambda r: (r.chip, r.suite))


def load(suite: str, device: str | None = None) -> Recorded | None:
    """The course's recorded results of a suite; None when nobody has measured it.

    Of several the one whose chip is most like the reader's, the newest of those; its `caption` says when it is not like it.

    Args:
        suite: the benchmark's name.
        device: part of a device's name such as ``"h200"``; any device when None.
    """
    wanted = [r for r in recordings() if r.suite == suite and (device is None or slug(device) in slug(r.device))]
    return max(wanted, key=lambda r: (r.likeness(), r.provenance["date"]), default=None)
