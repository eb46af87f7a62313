"""Settings for all tests, made before torch is imported."""

import os
import re
import signal

import pytest
from hypothesis import HealthCheck, settings

# A busy machine must not fail a test: no example has to be ready in time.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores. With a thread per core in each of them, every operation would wait for threads that the
    # system has put aside: hundreds of times slower. Notebooks and other processes that a test starts inherit this.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """With OPTINFER_TEST_DEVICE=cuda tensors and models that a test does not place are on the GPU (`make test-gpu`)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell; some tests interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if device := os.environ.get("OPTINFER_TEST_DEVICE"):
        import torch

        torch.set_default_device(device)


def pytest_collection_modifyitems(items):
    """Two workers must name every test alike; an object's address in a name differs from process to process."""
    if moving := [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]+", item.nodeid)]:
        raise pytest.UsageError(f"names of tests hold addresses of objects, give them `ids`: {', '.join(moving)}")
