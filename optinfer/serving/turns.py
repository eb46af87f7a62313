"""Whose turn it is: threads take turns in the order in which they came, and an interrupt waits for the end of a turn."""

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class FairLock:
    """A lock that threads get in the order in which they asked for it. Not for a thread that has it already."""

    def __init__(self) -> None:
        self._guard = threading.RLock()  # Python may drop a stream, which asks for a turn, while we are in here
        self._queue: deque[threading.Lock] = deque()
        self._held = False

    def acquire(self, blocking: bool = True) -> bool:
        """True once the lock is ours; without `blocking` False at once if somebody has it."""
        with self._guard:
            if not self._held:
                self._held = True
                return True
            if not blocking:
                return False
            turn = threading.Lock()
            turn.acquire()
            self._queue.append(turn)
        turn.acquire()  # until `release` hands the lock over
        return True

    def release(self) -> None:
        with self._guard:
            if self._queue:
                self._queue.popleft().release()  # it stays held, by the next in the queue
            else:
                self._held = False


class Interrupts:
    """Ctrl-C raises KeyboardInterrupt between any two lines. Where the books are half written, it has to wait.

    Only the main thread gets interrupts; in others, and where somebody else handles the signal, this does nothing.
    """

    def __init__(self) -> None:
        self._usual: Any = None
        self._pending: tuple[int, FrameType | None] | None = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """An interrupt within the block is raised at its end."""
        usual = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(usual) or self._usual is not None:
            yield
            return
        signal.signal(signal.SIGINT, self._remember)  # from here on nothing is raised
        try:
            self._usual = usual
            yield
        finally:
            self._usual = None
            signal.signal(signal.SIGINT, usual)
            self._raise_pending(usual)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Within a deferred block, a part that may be interrupted: nothing is half written in it."""
        usual = self._usual
        if usual is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._raise_pending(usual)
        signal.signal(signal.SIGINT, usual)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._pending = number, frame

    def _raise_pending(self, usual: Any) -> None:
        if self._pending is not None:
            arguments, self._pending = self._pending, None
            usual(*arguments)
