"""Watch the memory of interpreted kernels: what is read or written beyond a tensor, and programs in each other's way.

    with memory_check() as report:
        kernel[grid](x, out, n, BLOCK=64)      # interpreted: through `launch`, or with TRITON_INTERPRET=1
    print(report)                              # program (2, 0, 0) reads 112 numbers beyond q, line 10: q = tl.load(...)

On a GPU such a kernel may seem to work for months: memory beside a tensor mostly belongs to somebody, and programs mostly
run in a lucky order. Here what lies beyond is never touched (loads give NaN there) and programs run in shuffled order.
"""

import contextlib
import linecache
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optinfer_kernels import require_triton

require_triton()

from triton.runtime import interpreter  # noqa: E402

_MACHINERY = (interpreter.__file__, __file__, "<string>")
_PACKAGES = ("/triton/language/", "/triton/runtime/", "/numpy/", "/contextlib.py")


@dataclass(frozen=True)
class MemoryFinding:
    program: tuple[int, int, int]
    what: str  # "reads 112 numbers beyond q"
    line: int
    code: str

    def __str__(self) -> str:
        return f"program {self.program} {self.what}, line {self.line}: {self.code}"


@dataclass
class MemoryReport:
    """What was wrong, in the order in which it happened; false if nothing was."""

    findings: list[MemoryFinding] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings[:10])) or "no findings"


@contextlib.contextmanager
def memory_check(seed: int = 0) -> Iterator[MemoryReport]:
    """Inside, every interpreted kernel may touch only the elements of the tensors it is given, from first to last.

    Reported are reads and writes beyond them, writes of two programs to one element, and reads of what another
    program wrote: nothing orders programs. Atomic operations may meet. `seed` chooses the order of the programs.
    """
    report = MemoryReport()
    watch = _Watch(report, random.Random(seed))
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (interpreter.GridExecutor, "_init_args_hst"),
            (interpreter.InterpreterBuilder, "set_grid_dim"),
            (interpreter.InterpreterBuilder, "set_grid_idx"),
            (interpreter.InterpreterBuilder, "create_masked_load"),
            (interpreter.InterpreterBuilder, "create_masked_store"),
            (interpreter.InterpreterBuilder, "create_atomic_rmw"),
            (interpreter.InterpreterBuilder, "create_atomic_cas"),
        ):
            before = getattr(owner, name)
            setattr(owner, name, _watched(before, getattr(watch, name.strip("_"))))
            stack.callback(setattr, owner, name, before)
        yield report


def _watched(original: Any, watcher: Any) -> Any:
    def call(self, *args, **options):
        return watcher(lambda *a, **o: original(self, *a, **o), self, *args, **options)

    return call


class _Tensor:
    """The elements of one argument, and who wrote them."""

    def __init__(self, name: str, tensor: Any):
        self.name, self.item = name, tensor.element_size()
        self.low = tensor.data_ptr()
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else -1
        self.high = self.low + (last + 1) * self.item
        self.writer = np.full(last + 1, -1, np.int64)


class _Watch:
    """Each method stands before the interpreter's method of the same name."""

    def __init__(self, report: MemoryReport, order: random.Random):
        self.report, self.order = report, order
        self.tensors: list[_Tensor] = []

    def init_args_hst(self, original: Any, executor: Any, args: Any, kwargs: Any) -> Any:
        host, host_kwargs = original(args, kwargs)
        named = {**dict(zip(interpreter.inspect.getfullargspec(executor.fn).args, host)), **host_kwargs}
        tensors = {name: getattr(value, "base", value) for name, value in named.items()}
        self.tensors = [_Tensor(name, t) for name, t in tensors.items() if hasattr(t, "data_ptr")]
        return host, host_kwargs

    def set_grid_dim(self, original: Any, builder: Any, *grid: int) -> None:
        original(*grid)
        self.programs = list(np.ndindex(*map(int, grid)))
        self.order.shuffle(self.programs)
        self.grid = grid

    def set_grid_idx(self, original: Any, builder: Any, *index: int) -> None:
        self.current = int(np.ravel_multi_index(index, self.grid))
        x, y, z = map(int, self.programs[self.current])
        self.program = (x, y, z)
        original(*self.program)

    def create_masked_load(
        self, original: Any, builder: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any
    ) -> Any:
        inside = self._inside(ptrs, mask, "reads")
        if inside is mask:
            return original(ptrs, mask, other, *rest, **options)
        found = original(ptrs, inside, other, *rest, **options)
        beyond = np.asarray(mask.data) & ~inside.data
        if found.data.dtype.kind == "f":
            found.data[beyond] = np.nan
        return found

    def create_masked_store(
        self, original: Any, builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any
    ) -> Any:
        return original(ptrs, value, self._inside(ptrs, mask, "writes"), *rest, **options)

    def create_atomic_rmw(
        self, original: Any, builder: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        return original(op, ptr, value, self._inside(ptr, mask, "changes"), *rest)

    def create_atomic_cas(self, original: Any, builder: Any, ptr: Any, *rest: Any) -> Any:
        self._inside(ptr, interpreter.TensorHandle(np.ones_like(ptr.data, bool), interpreter.tl.int1), "changes")
        return original(ptr, *rest)

    def _inside(self, ptrs: Any, mask: Any, what: str) -> Any:
        """The mask without what lies beyond every tensor; the same object if nothing does."""
        address, active = np.broadcast_arrays(np.asarray(ptrs.data), np.asarray(mask.data).astype(bool))
        left = active.copy()
        for tensor in self.tensors:
            here = left & (address >= tensor.low) & (address < tensor.high)
            if here.any():
                left &= ~here
                self._programs_meet(
                    tensor, (address[here] - np.uint64(tensor.low)).astype(np.int64) // tensor.item, what
                )
        if not left.any():
            return mask
        first = int(address[left].min())
        near = min(self.tensors, key=lambda t: max(t.low - first, first - t.high), default=None)
        name = near.name if near is not None else "any tensor"
        where = "beyond" if near is None or first >= near.high else "before"
        self._report(f"{what} {int(left.sum())} numbers {where} {name}")
        return interpreter.TensorHandle(active & ~left, interpreter.tl.int1)

    def _programs_meet(self, tensor: _Tensor, index: np.ndarray, what: str) -> None:
        if what == "changes":
            return
        writer = tensor.writer[index]
        others = (writer >= 0) & (writer != self.current)
        if others.any():
            other = tuple(map(int, self.programs[int(writer[others][0])]))
            self._report(f"{what} {int(others.sum())} numbers of {tensor.name} that program {other} wrote")
        if what == "writes":
            tensor.writer[index] = self.current

    def _report(self, what: str) -> None:
        frame = sys._getframe()
        while frame.f_back and (
            frame.f_code.co_filename in _MACHINERY or any(part in frame.f_code.co_filename for part in _PACKAGES)
        ):
            frame = frame.f_back
        code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        self.report.findings.append(MemoryFinding(self.program, what, frame.f_lineno, code))
