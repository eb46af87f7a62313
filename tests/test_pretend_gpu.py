"""Starts the tests of `tests/pretend_gpu` in processes that pretend to have a GPU: it cannot be undone within one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("card", ["h100", "t4"])
def test_as_on(card):
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.pretend_gpu.plugin",
        "tests/pretend_gpu",
        "-p",
        "no:cacheprovider",
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        command, cwd=ROOT, env=clean | {"PRETEND_GPU": card, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
