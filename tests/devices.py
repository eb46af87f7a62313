"""Where tests run: on the CPU, or with OPTINFER_TEST_DEVICE=cuda on a GPU (`make test-gpu`)."""

import os

import pytest

ON_GPU = os.environ.get("OPTINFER_TEST_DEVICE") == "cuda"
cpu_only = pytest.mark.skipif(ON_GPU, reason="about the CPU alone")
