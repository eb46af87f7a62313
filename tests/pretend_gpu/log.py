"""What happened on the pretend GPU: waits of the host, work left on the CPU, kernels launched."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator

_LIBRARIES = ("/site-packages/", "/lib/python3", "<frozen")
_HERE = "/tests/pretend_gpu/"


class Log:
    """Counters by kind and by the line of the project that caused them."""

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()  # (kind, line)
        self.cpu_work: Counter[tuple[str, str]] = Counter()  # (operation, line) -> elements
        self.launches: Counter[str] = Counter()  # kernel
        self.asserts: list[str] = []  # what would be device-side asserts, which end a process's CUDA

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    def wait(self, kind: str) -> None:
        """The host waits for the GPU. Raises RuntimeError while a graph is captured, as CUDA does."""
        if tapes:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind})")
        self.waits[kind, line_of_the_project()] += 1

    def __str__(self) -> str:
        lines = [f"waits of the host: {self.num_waits}"]
        lines += [f"  {count:6} {kind:16} {line}" for (kind, line), count in self.waits.most_common(20)]
        lines += [
            f"on the CPU: {n:,} elements of {name} at {line}" for (name, line), n in self.cpu_work.most_common(20)
        ]
        return "\n".join([*lines, *(f"device-side assert: {line}" for line in self.asserts)])


_log = Log()
tapes: list[list] = []  # of the graphs that are being captured: what was launched


def log() -> Log:
    """The log of now."""
    return _log


@contextlib.contextmanager
def counting() -> Iterator[Log]:
    """A fresh log for the block."""
    global _log
    before, _log = _log, Log()
    try:
        yield _log
    finally:
        _log = before


def line_of_the_project() -> str:
    """The innermost line on the stack that is neither torch's nor ours here."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if _HERE not in name and not any(part in name for part in _LIBRARIES):
            return f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
