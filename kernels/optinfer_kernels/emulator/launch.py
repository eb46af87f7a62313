"""From a Triton launch to a run: specialized as Triton's launcher does, compiled by Triton, executed from its PTX."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from optinfer_kernels import require_triton

require_triton()

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from optinfer_kernels.interpreter import launches_go_to  # noqa: E402

from . import report  # noqa: E402
from .checks import Findings  # noqa: E402
from .instructions import Unsupported  # noqa: E402
from .machine import Machine  # noqa: E402
from .memory import GlobalMemory  # noqa: E402
from .ptx import Kernel, parse  # noqa: E402
from .report import Line, Totals  # noqa: E402
from .tensor_copies import TensorMap  # noqa: E402

ARCHITECTURES = (75, 80, 86, 89, 90, 120)  # sm_100 has instructions (tcgen05) that nobody here knows yet


@contextlib.contextmanager
def emulate(
    arch: int, *, processors: int = 8, check: bool = True, edit: Callable[[str], str] | None = None
) -> Iterator[Gpu]:
    """Inside, launches on CPU tensors are compiled for compute capability `arch` (90 is Hopper) and executed from PTX.

        with emulate(90) as gpu:
            out, lse = flash_attention(q, k, v)
        print(gpu.findings)
        print(gpu.runs[-1].report())

    processors: how many multiprocessors the launch functions are told of.
    check: look for races, uninitialized reads and missing fences in shared memory.
    edit: changes the PTX before it runs, for example to plant a bug.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(map(str, ARCHITECTURES))}; not {arch!r}")
    gpu = Gpu(arch, processors, check, edit)
    with launches_go_to(gpu):
        yield gpu


@dataclass
class Run:
    """One launch: what was executed, and what it did."""

    name: str
    arch: int
    grid: tuple[int, int, int]
    shared_bytes: int
    kernel: Kernel
    machine: Machine
    ptx: str
    ttgir: str
    compile_seconds: float  # on this machine, as the next: nothing here tells how long a GPU would take
    emulation_seconds: float

    def report(self) -> str:
        """Instructions, bytes, sectors, wavefronts, in words."""
        return report.summary(self)

    def lines(self, file: str | None = None) -> list[Line]:
        """What each line of the kernel's file cost, the most instructions first."""
        return report.lines(self, file)

    def by_line(self, file: str | None = None, rows: int = 15) -> str:
        """The same as a table."""
        return report.table(self.lines(file)[:rows])

    def totals(self) -> Totals:
        return report.totals(self)


@dataclass
class Gpu:
    """An imaginary GPU, and what was launched on it."""

    arch: int
    processors: int
    check: bool = True
    edit: Callable[[str], str] | None = None
    runs: list[Run] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    def launch(self, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if not isinstance(kernel, JITFunction):
            raise RuntimeError("cannot emulate while TRITON_INTERPRET is set: unset it and start Python again")
        began = time.perf_counter()
        stand_in = _Driver(self.arch)
        with _active(stand_in):
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            binder = kernel.device_caches[stand_in.get_current_device()][4]
            bound, specialization, _ = binder(*args, debug=False, **options)
        values = [item for item, spec in zip(bound.items(), specialization) if spec[0] != "constexpr"]
        compile_seconds = time.perf_counter() - began
        self._execute(compiled, values, (*grid, 1, 1)[:3], compile_seconds)

    def _execute(self, compiled: Any, values: list[tuple[str, Any]], grid: tuple, compile_seconds: float) -> None:
        began = time.process_time()
        ptx = compiled.asm["ptx"]
        kernel = parse(self.edit(ptx) if self.edit else ptx)
        parameters = Parameters(kernel, GlobalMemory(self.findings))
        parameters.fill(flattened(values, compiled.metadata), compiled.metadata, math.prod(grid))
        shared = compiled.metadata.shared
        machine = Machine(
            kernel, parameters.memory, parameters.octets, parameters.offsets, shared, self.findings, self.check
        )
        machine.tensor_copies.from_host = parameters.maps
        run = Run(
            kernel.name, self.arch, grid, shared, kernel, machine, ptx, compiled.asm["ttgir"], compile_seconds, 0.0
        )
        self.runs.append(run)
        machine.run(grid)
        run.emulation_seconds = time.process_time() - began


class _Driver:
    """As much of a Triton driver as it takes to compile without a GPU."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 1000 + self.target.arch  # a key of its own in every kernel's cache

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _active(stand_in: _Driver) -> Iterator[None]:
    before = driver._active
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = before


def flattened(values: list[tuple[str, Any]], metadata: Any) -> list[tuple[str, Any]]:
    """Arguments one by one: a tensor descriptor of the host is a tensor map, its shape and its strides."""
    flat: list[tuple[str, Any]] = []
    described = iter(getattr(metadata, "tensordesc_meta", None) or [])
    for name, value in values:
        if type(value).__name__ != "TensorDescriptor":
            flat.append((name, value))
            continue
        meta = next(described, None)
        if meta is None:
            raise Unsupported(f"{name}: a tensor descriptor on a GPU without a TMA unit")
        flat.append((name, (value, meta)))
        flat += [(f"{name}.shape", n) for n in value.shape] + [(f"{name}.stride", n) for n in value.strides]
    return flat


class Parameters:
    """The kernel's parameters as bytes, and the tensors that they point to."""

    def __init__(self, kernel: Kernel, memory: GlobalMemory):
        self.kernel, self.memory = kernel, memory
        self.offsets: dict[str, int] = {}
        self.maps: dict[int, TensorMap] = {}
        end = 0
        for name, (_, nbytes) in kernel.parameters.items():
            alignment = 64 if nbytes > 8 else nbytes
            self.offsets[name] = -(-end // alignment) * alignment
            end = self.offsets[name] + nbytes
        self.octets = _aligned(end)

    def fill(self, values: list[tuple[str, Any]], metadata: Any, blocks: int) -> None:
        scratch = _aligned(metadata.global_scratch_size * blocks)
        missing = len(self.kernel.parameters) - len(values)
        values = values + [("scratch", scratch), ("profiler's scratch", 0)][:missing]
        for (parameter, (kind, nbytes)), (name, value) in zip(self.kernel.parameters.items(), values, strict=True):
            at = self.offsets[parameter]
            if isinstance(value, tuple):
                self.maps[self.octets.ctypes.data + at] = self._map(name, *value)
                continue
            if isinstance(value, torch.Tensor | np.ndarray):
                value = self.memory.add(name, value)
            if kind == "f32":
                octets = np.array([value], np.float32).view(np.uint8)
            else:
                octets = np.frombuffer((int(value) & (1 << 8 * nbytes) - 1).to_bytes(nbytes, "little"), np.uint8)
            self.octets[at : at + nbytes] = octets
        self.memory.add("parameters", self.octets)

    def _map(self, name: str, descriptor: Any, meta: dict[str, Any]) -> TensorMap:
        item = meta["elem_size"]
        outer = list(descriptor.strides)[-2::-1]
        return TensorMap(
            self.memory.add(name, descriptor.base), len(descriptor.shape), item, meta["swizzle"],
            int(descriptor.padding == "nan"),
            dims=dict(enumerate(list(descriptor.shape)[::-1])),
            box=dict(enumerate(list(meta["block_size"])[::-1])),
            strides={k: stride * item for k, stride in enumerate(outer)},
            acquired=True,
        )  # fmt: skip


def _aligned(nbytes: int) -> np.ndarray:
    """Zeros at a multiple of 128 bytes, as tensor maps need."""
    octets = np.zeros(nbytes + 256, np.uint8)
    start = -octets.ctypes.data % 128
    return octets[start : start + max(nbytes, 16)]
