"""Tests of this folder run where the plugin has installed a pretend GPU; `tests/test_pretend_gpu.py` starts them."""

import os

import pytest
import torch

from tests.pretend_gpu.log import counting
from tests.pretend_gpu.plugin import installed


def pytest_collection_modifyitems(items):
    if not installed():
        for item in items:
            if "/pretend_gpu/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="needs -p tests.pretend_gpu.plugin"))


@pytest.fixture(scope="module", autouse=True)
def unplaced_is_on_the_cpu():
    """What these tests leave unplaced is the forgotten device that they are about, also by `make test-gpu`."""
    torch.set_default_device(None)
    yield
    torch.set_default_device(os.environ.get("OPTINFER_TEST_DEVICE") or None)


@pytest.fixture
def log():
    """What happens on the GPU during the test."""
    with counting() as fresh:
        yield fresh
