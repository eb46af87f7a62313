"""`optinfer doctor`: what this machine is, what is installed, and which of the three ways each feature will run.

Everything in the course runs *compiled* on a GPU, *interpreted* or in plain torch on a CPU, and is shown as *recorded*
where the reader's machine cannot run it.
"""

import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from optinfer.card import Table

# (package, what it is for, oldest version that works or None, whether the course cannot run without it)
_NEEDS = (
    ("torch", "tensors", (2, 11), True),
    ("transformers", "models", (5, 15), True),
    ("triton", "GPU kernels, compiled or interpreted", (3, 6), False),
    ("bitsandbytes", "the peer of lesson 1", (0, 49), False),
    ("ipywidgets", "widgets", (7, 7), True),
    ("anywidget", "widgets", (0, 9, 21), True),
    ("matplotlib", "figures", (3, 10), True),
    ("jupyterlab", "notebooks on this machine (Colab brings its own)", None, False),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` says what to do when something is wrong, and ``fatal`` that the course cannot run."""

    name: str
    value: str
    fix: str = ""
    fatal: bool = False


def versions() -> list[Finding]:
    """Python and the packages the course uses, each with what to do when it is missing or too old."""
    found = [Finding("Python", platform.python_version())]
    for package, purpose, floor, required in _NEEDS:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            fix = f"pip install {package} ({purpose})"
            if package == "triton" and sys.platform != "linux":
                fix = "Triton exists for Linux only: kernels are read here and run in Colab"
            found.append(Finding(package, "missing", fix, fatal=required))
            continue
        if floor and _as_tuple(version) < floor:
            wanted = ".".join(map(str, floor))
            found.append(Finding(package, version, f"pip install -U '{package}>={wanted}'", fatal=required))
        else:
            found.append(Finding(package, version))
    return found


def _as_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def machine() -> list[Finding]:
    """Processor or GPU, memory, and the two measured ceilings."""
    import torch

    from optinfer import hardware
    from optinfer_kernels import acting_capability

    m = hardware.this_machine()
    capability = f", compute capability {m.capability[0]}.{m.capability[1]}" if m.capability else ""
    kind = "multiprocessors" if m.device == "cuda" else "cores"
    found = [
        Finding("device", f"{m.name}{capability}, {m.cores} {kind}"),
        Finding("memory", f"{m.memory_bytes / 1e9:.1f} GB"),
        Finding("bandwidth", f"{m.bandwidth / 1e9:,.1f} GB/s reading (measured)"),
        Finding("matmul", f"{m.matmul_flops / 1e9:,.0f} GFLOP/s in a linear layer, {m.dtype} (measured)"),
    ]
    if m.device == "cpu":
        found += arithmetic()
    if m.device == "cpu" and torch.version.cuda:
        fix = "torch was built for CUDA but finds no GPU: nvidia-smi shows whether the driver does"
        found.append(Finding("GPU", "none visible", fix))
    if acting := acting_capability():
        fix = "unset OPTINFER_CAPABILITY to go back to this machine's own ways"
        found.append(Finding("note", f"acting as compute capability {acting[0]}.{acting[1]}", fix))
    if m.capability and m.capability < (8, 0):
        fix = "compute in fp16; Triton has no tensor cores before sm_80, so attention uses torch's own"
        found.append(Finding("note", f"sm_{m.capability[0]}{m.capability[1]} has no bf16", fix))
    if m.memory_bytes < 4e9:
        found.append(Finding("memory", "less than 4 GB", "close other programs, or use Colab", fatal=True))
    return found


def arithmetic() -> list[Finding]:
    """Which instructions the processor has for matrix products, and what a model therefore runs in."""
    from optinfer import cpu
    from optinfer.processor import linear_speeds, this_processor

    p, speeds = this_processor(), linear_speeds()
    known = ", ".join(p.instructions) or "unknown"
    found = [Finding("processor", f"{p.vendor} family {p.family} model {p.model}: {known}".strip())]
    torch_s, kernels_s = speeds.bfloat16, speeds.bfloat16_kernels
    ratios = " and ".join(f"{half / full:.1f}x" for half, full in zip(torch_s, speeds.float32))
    text = f"models run in {str(speeds.dtype).removeprefix('torch.')}; bf16 in torch takes {ratios} the time of fp32"
    if kernels_s:
        text += ", in our kernels " + " and ".join(
            f"{half / full:.1f}x" for half, full in zip(kernels_s, speeds.float32)
        )
    found.append(Finding("16 bits", f"{text} (1 and 64 rows, measured)"))
    if cpu.kernels() is None:
        fix = "install a C++ compiler (g++ or clang): CPU kernels are compiled once, and make 16 bits and fewer fast"
        found.append(Finding("CPU kernels", "none: no C++ compiler", fix))
    return found


def ways() -> list[Finding]:
    """How each lesson runs here: compiled, interpreted, in plain torch, or recorded."""
    import torch

    from optinfer import cpu, hardware
    from optinfer.attention import select_backend

    gpu = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    kernels = "compiled" if gpu and triton else "interpreted (slow, exact; for study)" if triton else "not at all"
    device = torch.device("cuda" if gpu else "cpu")
    on_cpu = "in C++ compiled for this processor" if cpu.kernels() is not None else "in plain torch"
    backend, reason = select_backend(device=device, capability=hardware.capability(device))
    return [
        Finding("quantized products", "on the GPU" if gpu else on_cpu),
        Finding("attention, auto", f"{backend}: {reason}"),
        Finding("Triton kernels", kernels, "" if triton else "install triton (Linux) to run them"),
        Finding("KV cache, speculation, serving", "on the GPU" if gpu else on_cpu),
        Finding("GPU figures", "measured here" if gpu else "shown as recorded, where a recording exists"),
    ]


def default_model() -> list[Finding]:
    """Whether the default model is in the cache."""
    from optinfer import folders, models

    folder = folders.cache_directory() / models.DEFAULT_MODEL
    if models.is_intact(folder):
        shown = str(folder).replace(str(Path.home()), "~", 1)
        return [Finding("default model", f"{models.DEFAULT_MODEL} in {shown}")]
    return [Finding("default model", "not fetched yet", "it is fetched on first use (98 MB): optinfer.load_model()")]


def examine() -> list[Finding]:
    """The whole examination; stops after the versions when the course cannot run at all."""
    found = versions()
    if any(finding.fatal for finding in found):
        return found
    return found + machine() + default_model() + ways()


def report(findings: list[Finding]) -> Table:
    """One line for each finding; what to do about it follows an arrow."""
    rows = tuple(
        (f.name, f.value + (" -> " if f.fix else "") + ("MUST FIX: " if f.fatal else "") + f.fix) for f in findings
    )
    fatal = any(f.fatal for f in findings)
    return Table(("what", "here"), rows, "The course cannot run yet." if fatal else "The course can run.")
