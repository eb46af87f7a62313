"""The processor: what it is, which instructions it has, and how fast a linear layer of a model is on it.

Two processors may carry one name ("AMD EPYC") and differ by a factor of a hundred in 16-bit arithmetic. So what models
run in is measured, not looked up: once per machine, in less than two seconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from optinfer.folders import cache_directory, write_whole

if TYPE_CHECKING:
    import torch

# Instructions that decide how fast a matrix product is, as Linux names them, and what each is for.
INSTRUCTIONS = {
    "avx2": "registers of 32 bytes",
    "fma": "multiply and add in one",
    "f16c": "fp16 to fp32 and back",
    "avx512f": "registers of 64 bytes",
    "avx512_vnni": "products of 8 bits",
    "avx_vnni": "products of 8 bits",
    "avx512_bf16": "products of bf16",
    "avx512_fp16": "products of fp16",
    "amx_bf16": "tiles of bf16",
    "amx_int8": "tiles of 8 bits",
    "asimd": "registers of 16 bytes",
    "asimdhp": "products of fp16",
    "asimddp": "products of 8 bits",
    "bf16": "products of bf16",
    "i8mm": "matrix products of 8 bits",
}


@dataclass(frozen=True)
class Processor:
    """What the operating system says of the processor. `instructions`: those of `INSTRUCTIONS` that it has."""

    name: str
    vendor: str
    family: str
    model: str
    instructions: tuple[str, ...]

    @property
    def full_name(self) -> str:
        """With family and model, where they are known: the name alone is not one processor's."""
        numbers = [f"{what} {value}" for what, value in (("family", self.family), ("model", self.model)) if value]
        return f"{self.name} ({', '.join(numbers)})" if numbers else self.name

    def likeness(self, other: dict[str, Any] | None) -> int:
        """How like this one a recorded processor is: 3 the same model, 2 the same instructions, 1 the name, 0 neither."""
        if not other:
            return 0
        mine, theirs = asdict(self), {name: other.get(name) for name in ("vendor", "family", "model")}
        if all(theirs.values()) and theirs.items() <= mine.items():
            return 3
        if self.instructions and self.instructions == tuple(other.get("instructions", ())):
            return 2
        return 1 if self.name == other.get("name") else 0


@functools.cache
def this_processor() -> Processor:
    """Read from the operating system; fields that it does not tell are empty."""
    facts = _first_cpu(Path("/proc/cpuinfo"))
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return Processor(
        name=facts.get("model name") or platform.processor() or platform.machine(),
        vendor=facts.get("vendor_id", facts.get("CPU implementer", "")),
        family=facts.get("cpu family", facts.get("CPU architecture", "")),
        model=facts.get("model", facts.get("CPU part", "")),
        instructions=tuple(name for name in INSTRUCTIONS if name in flags),
    )


def _first_cpu(path: Path) -> dict[str, str]:
    try:
        first = path.read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


# ---- how fast a linear layer is

_MANY_ROWS = 64


@dataclass(frozen=True)
class LinearSpeeds:
    """Seconds of one linear layer on one thread, ``x @ W.T`` with W [1536, 576] from memory, for one row and for 64.

    `bfloat16_kernels`: by `optinfer.cpu`; None where there is no compiler.
    """

    float32: tuple[float, float]
    bfloat16: tuple[float, float]
    bfloat16_kernels: tuple[float, float] | None

    @property
    def dtype(self) -> torch.dtype:
        """What a model answers fastest in: a prompt of 64 tokens, then 64 tokens one by one."""
        import torch

        halves = [self.bfloat16] + ([self.bfloat16_kernels] if self.bfloat16_kernels else [])
        return torch.bfloat16 if min(map(_answer, halves)) < _answer(self.float32) else torch.float32

    @property
    def torch_half_is_fast(self) -> bool:
        """Whether torch's own bf16 products of many rows keep up with its float32 ones."""
        return self.bfloat16[1] < 1.5 * self.float32[1]


def _answer(seconds: tuple[float, float]) -> float:
    one, many = seconds
    return _MANY_ROWS * one + many


@functools.cache
def linear_speeds() -> LinearSpeeds:
    """Measured once per machine and remembered in the cache folder; ``OPTINFER_DTYPE`` decides without measuring."""
    if given := os.environ.get("OPTINFER_DTYPE"):
        return _as_if(given)
    import torch

    from optinfer import cpu

    facts = [asdict(this_processor()), torch.__version__, cpu.kernels() is not None]
    path = cache_directory() / "linear_speeds.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["of"] == json.loads(json.dumps(facts)) and all(min(speed) > 0 for speed in known["seconds"] if speed):
            return LinearSpeeds(*(speed and tuple(speed) for speed in known["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    speeds = measure_linear()
    with contextlib.suppress(OSError):  # a cache that cannot be written: measured again next time
        write_whole(path, json.dumps({"of": facts, "seconds": list(asdict(speeds).values())}))
    return speeds


def _as_if(dtype: str) -> LinearSpeeds:
    """Speeds that make the given dtype the choice."""
    allowed = ("float32", "bfloat16")
    if dtype not in allowed:
        raise ValueError(f"OPTINFER_DTYPE must be one of {', '.join(allowed)}, got {dtype!r}")
    fast, slow = (1.0, 1.0), (2.0, 2.0)
    return LinearSpeeds(fast, slow, None) if dtype == "float32" else LinearSpeeds(slow, slow, fast)


def measure_linear() -> LinearSpeeds:
    """Time the layer in each way, on one thread and in its own seconds: a busy machine must not decide. Under two seconds."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure()
    finally:
        torch.set_num_threads(threads)


def _measure() -> LinearSpeeds:
    import torch

    from optinfer import cpu

    layers = [torch.nn.Linear(576, 1536, bias=False) for _ in range(24)]  # 85 MB in fp32: too much for a cache
    speeds: dict[str, tuple[float, float] | None] = {}
    with torch.inference_mode():
        speeds["float32"] = _time(layers, torch.float32)
        layers = [layer.bfloat16() for layer in layers]
        speeds["bfloat16"] = _time(layers, torch.bfloat16)
        speeds["bfloat16_kernels"] = None
        if cpu.kernels() is not None:
            speeds["bfloat16_kernels"] = _time([cpu.use_cpu_linear(layer) for layer in layers], torch.bfloat16)
    return LinearSpeeds(**speeds)  # type: ignore[arg-type]


def _time(layers: list[Any], dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of one layer for one row and for many; of a few measurements the middle one."""
    import torch

    row, rows = torch.randn(1, 576).to(dtype), torch.randn(_MANY_ROWS, 576).to(dtype)
    one = _seconds(lambda: [layer(row) for layer in layers]) / len(layers)
    return one, _seconds(lambda: layers[0](rows))


def _seconds(run: Callable[[], object]) -> float:
    """The process's own seconds; on virtual machines its clock was seen to stand still, then those of the wall."""
    for clock in (time.process_time, time.perf_counter):
        if (middle := median(_elapsed(run, clock) for _ in range(5))) > 0:
            return middle
    raise RuntimeError("no clock of this machine moves")


def _elapsed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start
