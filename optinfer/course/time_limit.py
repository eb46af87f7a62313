"""A limit on the work that a block may do, and an error that can strike nowhere else."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TooSlow(BaseException):
    """A block did more work than it may; not an Exception, so that no `except Exception` hides it."""


_limits: list[tuple[float, float]] = []  # of the blocks entered: when they end, in this thread's work; their limit
_SOON = 1e-3  # seconds; a timer set to nothing would never ring


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow after `seconds` of this thread's work; only where such signals exist and only in the main thread.

    Work, not waiting: on a busy machine a right answer waits for its turn. (So what only sleeps is not stopped.)
    """
    if not hasattr(signal, "SIGPROF") or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGPROF) is not _ring:
        signal.signal(signal.SIGPROF, _ring)
    mine = time.thread_time() + seconds, seconds
    try:
        _limits.append(mine)
        _set_timer()
        yield
    finally:
        if mine in _limits:
            _limits.remove(mine)
        _set_timer()


def _ring(*_: object) -> None:
    """The handler. It stays when no block is left: a signal may still be under way, and it must strike nobody else.

    Each limit is struck off before it raises, so it raises once, wherever in its block that is.
    """
    if _limits and min(_limits)[0] <= time.thread_time():
        mine = min(_limits)
        _limits.remove(mine)
        raise TooSlow(f"still running after {mine[1]:g} seconds")
    _set_timer()


def _set_timer() -> None:
    """For the limit that ends first. The timer counts the work of all threads, so it may ring too soon, never too late."""
    left = max(min(_limits)[0] - time.thread_time(), _SOON) if _limits else 0
    signal.setitimer(signal.ITIMER_PROF, left)
