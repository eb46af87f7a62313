"""What this machine is, and what it can do at most: memory, bandwidth, arithmetic, and the roofline between them."""

import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optinfer import noise
from optinfer_kernels import acting_capability

if TYPE_CHECKING:
    import torch

GIB = 2**30


def default_device() -> "torch.device":
    """The current CUDA device when there is one, else the CPU. ``OPTINFER_DEVICE`` overrides."""
    import torch

    if given := os.environ.get("OPTINFER_DEVICE"):
        return torch.device(given)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def capability(device: "torch.device") -> tuple[int, int] | None:
    """The GPU's compute capability; None for a CPU. ``OPTINFER_CAPABILITY`` overrides, to take another GPU's path."""
    import torch

    if acting := acting_capability():
        return acting
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def default_dtype(device: "torch.device") -> "torch.dtype":
    """What a model runs in: on a GPU bf16, or fp16 before Ampere (``torch.cuda.is_bf16_supported()`` says yes on a T4, which
    emulates it); on a CPU what a linear layer was measured to be fastest in (`processor.linear_speeds`).
    """
    import torch

    known = capability(device)
    if known:
        return torch.float16 if known < (8, 0) else torch.bfloat16
    if device.type != "cpu":
        return torch.bfloat16
    from optinfer.processor import linear_speeds

    return linear_speeds().dtype


@dataclass(frozen=True)
class Machine:
    """One device and its measured ceilings.

    Attributes:
        name: the GPU's or the processor's name.
        device: ``"cuda"`` or ``"cpu"``.
        capability: the GPU's compute capability such as (9, 0); None for a CPU.
        cores: streaming multiprocessors of a GPU, usable cores of a CPU.
        memory_bytes: of the GPU, or of the computer.
        bandwidth: bytes per second, reading a large array once (measured).
        matmul_flops: floating-point operations per second of a linear layer with many rows, ``x @ W.T``, as a model of
            ``dtype`` computes it (measured).
        dtype: the type that models run in.
        processor: vendor, family, model and instructions of a CPU (see `processor.Processor`); None for a GPU.
    """

    name: str
    device: str
    capability: tuple[int, int] | None
    cores: int
    memory_bytes: int
    bandwidth: float
    matmul_flops: float
    dtype: str
    processor: dict[str, object] | None = None

    @property
    def ridge(self) -> float:
        """FLOP per byte above which arithmetic, not memory, sets the speed (Williams et al. 2009)."""
        return self.matmul_flops / self.bandwidth

    @property
    def matmul_gflops(self) -> float:
        return self.matmul_flops / 1e9

    def attainable_flops(self, flops_per_byte: float) -> float:
        """The roofline: operations per second possible at this arithmetic intensity."""
        return min(self.matmul_flops, self.bandwidth * flops_per_byte)

    def least_seconds(self, flops: float, bytes_moved: float) -> float:
        """No implementation on this machine can be faster than this."""
        return max(flops / self.matmul_flops, bytes_moved / self.bandwidth)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@functools.cache
def this_machine() -> Machine:
    """Measure this machine, once per process; takes one or two seconds."""
    import torch

    from optinfer.processor import Processor, this_processor

    device = default_device()
    dtype = default_dtype(device)
    processor: Processor | None = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, cores, memory = properties.name, properties.multi_processor_count, properties.total_memory
    else:
        processor = this_processor()
        name, cores, memory = processor.name, usable_cores(), memory_bytes()
    return Machine(
        name=name,
        device=device.type,
        capability=capability(device),
        cores=cores,
        memory_bytes=memory,
        bandwidth=measure_bandwidth(device),
        matmul_flops=measure_matmul(device, dtype),
        dtype=str(dtype).removeprefix("torch."),
        processor=asdict(processor) if processor else None,
    )


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def peak_memory_bytes() -> int:
    """The most resident memory that this process alone has had (`ru_maxrss` starts from the parent's)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timing(
    run: Callable[[], object], device: "torch.device", repeats: int = 7, warmup: int = 2, least: float = 0.0
) -> noise.Timing:
    """Several runs by the clock, and some more where they disagree; see `noise.repeat`."""
    import torch

    def sample() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return noise.repeat(sample, repeats, warmup, least)


def best_seconds(run: Callable[[], object], device: "torch.device", repeats: int = 7, warmup: int = 2) -> float:
    """The fastest of several runs: what is left when nothing else disturbs the machine."""
    return timing(run, device, repeats, warmup).seconds


def measure_bandwidth(device: "torch.device") -> float:
    """Bytes per second when an array far larger than any cache is read once, as a decode step reads the weights."""
    import torch

    if device.type == "cuda":
        array = torch.ones(2**30, device=device)
        return array.nbytes / best_seconds(lambda: array.sum(), device)
    from optinfer import cpu

    array = torch.ones(2**27)
    kernels = cpu.kernels()
    reads = [lambda: array.sum()] if kernels is None else [lambda: array.sum(), lambda: kernels.read_all(array)]
    return array.nbytes / min(best_seconds(read, device) for read in reads)


def measure_matmul(device: "torch.device", dtype: "torch.dtype") -> float:
    """Floating-point operations per second of a linear layer with many rows, as a model of this dtype computes it.

    Random values: zeros run unrealistically fast.
    """
    import torch

    from optinfer import cpu

    out_features, in_features, rows = (8192, 8192, 8192) if device.type == "cuda" else (1536, 576, 512)
    layer = torch.nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
    if device.type == "cpu" and not has_fast_half(device):
        cpu.use_cpu_linear(layer)
    x = torch.randn(rows, in_features, device=device).to(dtype)
    with torch.inference_mode():
        seconds = best_seconds(lambda: layer(x), device)
    return 2 * rows * out_features * in_features / seconds


def has_fast_half(device: "torch.device") -> bool:
    """Whether torch itself computes 16-bit products on the device at least as fast as in float32."""
    if device.type != "cpu":
        return True
    from optinfer.processor import linear_speeds

    return linear_speeds().torch_half_is_fast
