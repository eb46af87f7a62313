"""Speeds of the processor: measured by a clock that may stand still, remembered only where they are speeds."""

import json
import time

import pytest

from optinfer import processor


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTINFER_CACHE", str(tmp_path))
    monkeypatch.delenv("OPTINFER_DTYPE", raising=False)
    monkeypatch.setattr(processor, "linear_speeds", processor.linear_speeds.__wrapped__)  # not the process's memory
    return tmp_path / "linear_speeds.json"


def numbers(speeds):
    return [number for speed in (speeds.float32, speeds.bfloat16, speeds.bfloat16_kernels) if speed for number in speed]


@pytest.mark.parametrize("stuck", ["sometimes", "always"])
def test_a_clock_that_stands_still_gives_no_speed_of_zero(stuck, monkeypatch):
    real, asked = time.process_time, []

    def clock():
        asked.append(real())
        still = stuck == "always" or len(asked) % 10 < 4  # two of five measurements
        return 7.0 if still else asked[-1]

    monkeypatch.setattr(processor.time, "process_time", clock)
    assert all(number > 0 for number in numbers(processor.measure_linear()))


def test_remembered_zeros_are_measured_again(cache):
    first = processor.linear_speeds()
    known = json.loads(cache.read_text())
    assert processor.linear_speeds() == first  # remembered
    known["seconds"][0] = [0.0, 0.001]
    cache.write_text(json.dumps(known))
    assert all(number > 0 for number in numbers(processor.linear_speeds()))
    assert min(json.loads(cache.read_text())["seconds"][0]) > 0
