"""Compile the kernels once for this processor, and call them through ctypes."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optinfer.cpu import structs
from optinfer.folders import cache_directory, new_file

FOLDER = Path(__file__).parent
# -ffp-contract=fast: a * b + c is one instruction and one rounding. Nothing that would change what infinities, NaNs or
# the order of sums mean.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
    *("-shared", "-fPIC", "-fvisibility=hidden", "-pthread"),
)
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "sizes": (_POINTER,),
    "linear": (_POINTER, _POINTER, _INT, _POINTER, ctypes.c_int, ctypes.c_int),
    "write": (_POINTER, _POINTER, _POINTER, _INT, _POINTER),
    "attend": (_POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER, ctypes.c_int),
    "decode": (_POINTER, _POINTER, ctypes.c_int),
    "likeliest": (_POINTER, _INT, _INT, _POINTER, ctypes.c_int),
    "read_all": (_POINTER, _INT, ctypes.c_int),
}


class CpuKernels:
    """The compiled functions. They take pointers: whoever calls them has checked shapes, dtypes and contiguity."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_float if name == "read_all" else None
            setattr(self, f"_{name}", function)
        sizes = (ctypes.c_int64 * len(structs.ALL))()
        self._sizes(sizes)  # type: ignore[attr-defined]
        if list(sizes) != [ctypes.sizeof(struct) for struct in structs.ALL]:
            raise OSError(f"{path} was compiled for other structs")

    def linear(self, weight: structs.Weight, x: Tensor, rounded: bool) -> Tensor:
        """x [tokens, columns] float32, contiguous -> [tokens, rows] float32; rounded: x holds bfloat16 numbers."""
        out = torch.empty(x.shape[0], weight.rows)
        self._call("linear", weight, x, x.shape[0], out, rounded, torch.get_num_threads())
        return out

    def write(self, pages: structs.Pages, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Copy k and v [tokens, kv_heads, head_dim] float32 to the pages' slots, int64 [tokens]."""
        self._call("write", pages, k, v, k.shape[0], slots)

    def attend(self, pages: structs.Pages, sequences: structs.Sequences, scoring: structs.Scoring, q: Tensor) -> Tensor:
        """q [tokens, heads, head_dim] float32, contiguous -> the same."""
        out = torch.empty(q.shape)
        self._call("attend", pages, sequences, scoring, q.shape[1], q, out, torch.get_num_threads())
        return out

    def decode(self, decoder: structs.Decoder, step: structs.Step) -> None:
        self._call("decode", decoder, step, torch.get_num_threads())

    def likeliest(self, x: Tensor) -> Tensor:
        """The column of the largest number in each row of x [rows, columns], float32, contiguous; -1 where that is not finite."""
        out = torch.empty(x.shape[0], dtype=torch.int64)
        self._call("likeliest", x, *x.shape, out, torch.get_num_threads())
        return out

    def read_all(self, x: Tensor) -> float:
        """Read x, float32, once; returns its sum, about."""
        return self._call("read_all", x, x.numel(), torch.get_num_threads())

    def _call(self, name: str, *arguments: Any) -> Any:
        return getattr(self, f"_{name}")(*map(_as_argument, arguments))


def _as_argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.data_ptr()
    return ctypes.byref(x) if isinstance(x, ctypes.Structure) else x


@functools.cache
def kernels() -> CpuKernels | None:
    """The kernels for this processor, compiled on first use; None without a working compiler."""
    try:
        path = _compiled()
        return None if path is None else CpuKernels(path)
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None  # no working compiler, or a cache that cannot be written


def _compiled() -> Path | None:
    """The library's file, made if it is not in the cache (about ten seconds, once); None without a compiler."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        return None
    # What the compiler defines by itself names its version and this processor's instructions.
    machine = subprocess.run([compiler, *_FLAGS, "-dM", "-E", "-xc++", os.devnull], capture_output=True, check=True)
    sources = [FOLDER / "library.cpp", *sorted(FOLDER.glob("*.hpp"))]
    parts = [machine.stdout, repr(_FLAGS).encode(), *(source.read_bytes() for source in sources)]
    key = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    target = cache_directory() / "kernels" / f"{key}.so"
    if not target.exists():
        _compile(compiler, sources[0], target)
    return target


def _compile(compiler: str, source: Path, target: Path) -> None:
    from tqdm.auto import tqdm

    with (
        new_file(target) as work,
        tqdm(total=1, desc="compiling kernels for this processor, once", leave=False) as bar,
    ):
        subprocess.run([compiler, *_FLAGS, str(source), "-o", str(work)], capture_output=True, check=True)
        bar.update()
