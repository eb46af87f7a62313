"""The kernels of `cpu_kernels.cpp`: compiled once for this processor, called through ctypes.

They are an extra. Without a C++ compiler, on another device or in another dtype `of` returns None, and the callers use
the torch formulas that stand beside each call.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optinfer.models import cache_directory

_SOURCE = Path(__file__).with_suffix(".cpp")
# Sums may be reordered, so that they fill vector registers; infinities and NaNs keep their meaning.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)
_NAMES = {torch.bfloat16: "bf16", torch.float32: "float"}
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "rms_norm": [*[_POINTER] * 3, _FLOAT, _INT, _INT, ctypes.c_int],
    "rotate": [*[_POINTER] * 3, *[_INT] * 4, ctypes.c_int],
    "write": [*[_POINTER] * 3, *[_INT] * 4],
    "attend": [*[_POINTER] * 7, *[_INT] * 7, _FLOAT, _INT, _FLOAT, ctypes.c_int],
}


class CpuKernels:
    """The compiled kernels for one dtype. Heads of a row of `q`, `k`, `v` are contiguous; rows may be apart."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        self._functions = {name: getattr(library, f"{name}_{_NAMES[dtype]}") for name in _ARGUMENTS}
        for name, function in self._functions.items():
            function.argtypes, function.restype = _ARGUMENTS[name], None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., width] -> the same, normalized."""
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        width = x.shape[-1]
        self._call("rms_norm", out, x, weight, eps, x.numel() // width, width, torch.get_num_threads())
        return out

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotary embedding of x [rows, heads, dim] in place; cos and sin [rows, dim]."""
        rows, heads, dim = x.shape
        self._call("rotate", x, cos, sin, rows, x.stride(0), heads, dim, torch.get_num_threads())

    def write(self, pages: Tensor, x: Tensor, places: Tensor) -> None:
        """Copy x [rows, kv_heads, dim] into one layer's pages [..., dim]; places [rows * kv_heads] are int64."""
        x = _whole_heads(x)
        rows, kv_heads, dim = x.shape
        self._call("write", pages, x, places, rows, x.stride(0), kv_heads, dim)

    def attend(
        self,
        out: Tensor,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        sequence: Tensor,
        position: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """Attention of single tokens over the pages of their sequences, up to and including themselves.

        Args:
            out: [rows, heads, dim], contiguous; written.
            q: [rows, heads, dim].
            keys, values: one layer's pages [blocks, kv_heads, block_size, dim].
            tables: [sequences, width] int64, the blocks of each sequence.
            sequence, position: [rows] int64, the line of `tables` and the place in the text of each row.
            window: sees so many tokens at most; None: all.
            softcap: scores become softcap * tanh(score / softcap); None: as they are.
        """
        q = _whole_heads(q)
        rows, heads, dim = q.shape
        _, kv_heads, block_size, _ = keys.shape
        shape = (rows, q.stride(0), heads, kv_heads, dim, block_size, tables.shape[1])
        where = (tables, sequence, position)
        threads = torch.get_num_threads()
        self._call("attend", out, q, keys, values, *where, *shape, scale, window or 0, softcap or 0.0, threads)

    def _call(self, name: str, *arguments: Any) -> None:
        self._functions[name](*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


def of(tensor: Tensor) -> CpuKernels | None:
    """The kernels for tensors like this one; None if there are none."""
    return _load(tensor.dtype) if tensor.device.type == "cpu" and tensor.dtype in _NAMES else None


@functools.cache
def _load(dtype: torch.dtype) -> CpuKernels | None:
    try:
        library = _library()
        return None if library is None else CpuKernels(ctypes.CDLL(str(library)), dtype)
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None  # no working compiler, or a cache that cannot be written


def _library() -> Path | None:
    """The compiled file, made if it is not in the cache; None without a compiler. Under a second, once."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        return None
    # What the compiler defines by itself names its version and this processor's instructions.
    machine = subprocess.run([compiler, *_FLAGS, "-dM", "-E", "-xc++", os.devnull], capture_output=True, check=True)
    key = hashlib.sha256(machine.stdout + _SOURCE.read_bytes() + repr(_FLAGS).encode()).hexdigest()[:16]
    target = cache_directory() / "kernels" / f"{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            made = Path(work) / target.name
            subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], capture_output=True, check=True)
            made.replace(target)  # whole or not at all
    return target


def _whole_heads(x: Tensor) -> Tensor:
    """x [rows, heads, dim] with each row's heads one after the other."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
