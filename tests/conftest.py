"""Settings for all tests, made before torch is imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores. With a thread per core in each of them, every operation would wait for threads that the
    # system has put aside: hundreds of times slower. Notebooks and other processes that a test starts inherit this.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
