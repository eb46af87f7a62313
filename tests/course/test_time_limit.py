"""A time limit strikes inside its block, and nothing else, ever."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from optinfer.course.time_limit import TooSlow, time_limit

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="no such signals here")


def work(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_work_is_stopped_and_waiting_is_not():
    with pytest.raises(TooSlow, match="0.05 seconds"), time_limit(0.05):
        work(30)
    with time_limit(0.05):
        time.sleep(0.3)


def test_the_work_of_other_threads_does_not_count():
    other = threading.Thread(target=work, args=(0.3,))
    with time_limit(0.1):
        other.start()
        other.join()


def test_an_inner_limit_leaves_the_outer_one_in_force():
    with pytest.raises(TooSlow, match="0.15"), time_limit(0.15):
        with pytest.raises(TooSlow, match="0.05"), time_limit(0.05):
            work(30)
        with time_limit(20):
            work(30)


def test_a_signal_that_comes_late_strikes_nobody():
    with pytest.raises(TooSlow), time_limit(0.01):
        work(30)
    for _ in range(3):
        signal.raise_signal(signal.SIGPROF)  # would end the process, or raise, if nobody took care of it
    with time_limit(20):
        signal.raise_signal(signal.SIGPROF)  # too soon
        work(0.01)


def test_other_peoples_alarms_go_on_ringing():
    """pytest-timeout, for one, uses SIGALRM."""
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    before = signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with time_limit(30):
            while not rung:
                time.sleep(0.005)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)
    assert rung == [1]


def test_pytest_reports_a_failure_while_the_signal_rings_on(tmp_path):
    """It once struck in the middle of a traceback's printing, and pytest ended with INTERNALERROR."""
    (tmp_path / "test_it.py").write_text("""
import signal
from optinfer.course.time_limit import TooSlow, time_limit

def test_it():
    set_timer, left = signal.setitimer, []
    signal.setitimer = lambda which, seconds: set_timer(which, 1e-4, 1e-4)  # on and on, after the block too
    try:
        with time_limit(0.02):
            while True:
                left = list(range(1000))
    except TooSlow:
        pass
    assert left == "what it never is"
""")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "1 failed" in done.stdout and "INTERNALERROR" not in done.stdout + done.stderr
