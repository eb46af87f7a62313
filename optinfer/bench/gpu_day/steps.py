"""What is done on the day, in order of value: each step in a process of its own, within its own time."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from optinfer.bench.rows import Row

Rows = Iterator[dict[str, Any]]


class NotHere(Exception):
    """This machine lacks what the step needs."""


@dataclass(frozen=True)
class Step:
    """One step. `suite`: under which name its rows are recorded; None: they say whether something holds."""

    name: str
    seconds: int  # at most, on a card of the H100's class
    work: str  # "module:function" below this package, called as function(tiny, **options)
    options: tuple[tuple[str, Any], ...] = ()
    suite: str | None = None
    tool: tuple[str, ...] = ()  # a program that watches the process

    def rows(self, tiny: bool) -> Rows:
        """Flat, as they are written."""
        module, function = self.work.split(":")
        call: Callable[..., Iterable[Row | dict[str, Any]]]
        call = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        for row in call(tiny, **dict(self.options)):
            yield row.as_dict() if isinstance(row, Row) else row

    def command(self, rows_file: str, tiny: bool) -> list[str]:
        python = shlex.split(os.environ.get("OPTINFER_DAY_PYTHON", "")) or [sys.executable]
        return [*self.tool, *python, "-m", f"{__package__}.work", self.name, rows_file, *["--tiny"] * tiny]

    def missing(self) -> str | None:
        """Why this step cannot run on this machine, as far as can be told before it is tried."""
        if self.tool and shutil.which(self.tool[0]) is None:
            return f"{self.tool[0]} is not installed"
        return None


def _watched(tool: str, check: str) -> Step:
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    return Step(f"{tool}-{check}", 90, f"checks:{check}", (("few", True),), tool=command)


def _measured(suite: str, name: str, seconds: int, function: str, /, **options: Any) -> Step:
    return Step(name, seconds, f"measurements:{function}", tuple(options.items()), suite)


CHECKS = ("attention", "quantized", "paged", "ragged")
LESSONS = (
    "00_start_here", "01_quantization", "02_calibrated_quantization", "03_flash_attention", "04_kv_cache",
    "05_speculative_decoding", "06_putting_it_together",
)  # fmt: skip
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))  # [out, in] of Llama-3-8B and 70B

STEPS = (
    Step("doctor", 60, "checks:doctor"),
    *(Step(f"check-{check}", 120, f"checks:{check}") for check in CHECKS),
    Step("check-engine", 90, "checks:engine"),
    Step("check-graphs", 120, "checks:graphs"),
    *(_watched(tool, check) for tool in ("memcheck", "racecheck") for check in CHECKS),
    _measured("attention", "attention", 150, "attention"),
    _measured("paged_attention", "paged-attention", 60, "paged_attention"),
    *(
        _measured("quantized_matmul", f"quantized-{n}x{k}", 60, "quantized_matmul", out_features=n, in_features=k)
        for n, k in LAYERS
    ),
    _measured("serving", "serving", 150, "serving"),
    _measured("speculative", "speculative", 60, "speculative"),
    *(
        _measured("quantized_matmul", f"model-{label}", seconds, "whole_model", name=name, variant=variant)
        for label, seconds, name, variant in (
            ("7b-nf4", 60, "Mistral-7B", "nf4 + double quantization"),
            ("7b-bf16", 60, "Mistral-7B", "bf16"),
            ("70b-nf4", 120, "Llama-3-70B", "nf4 + double quantization"),
        )
    ),
    _measured("tiles", "tiles-attention", 120, "attention_tiles"),
    _measured("tiles", "tiles-quantized", 60, "quantized_tiles"),
    *(Step(f"lesson-{lesson[:2]}", 180, "checks:lesson", (("name", lesson),)) for lesson in LESSONS),
)
BY_NAME = {step.name: step for step in STEPS}
