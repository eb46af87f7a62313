"""Noise: quiet repeats are believed, busy ones are repeated and said to be busy, no order is claimed within the spread."""

import itertools

import pytest

from optinfer import noise


def test_repeats_that_agree_are_enough():
    timing = noise.repeat(itertools.chain([9.0], itertools.cycle([1.0, 1.02, 1.01])).__next__, repeats=4)
    assert timing.seconds == 1.0 and len(timing.samples) == 4
    assert timing.believable and timing.doubt == ""


def test_it_waits_for_a_quiet_moment_and_says_when_none_came():
    busy_first = itertools.chain([5.0, 3.0, 2.0, 4.0], itertools.cycle([1.0]))
    timing = noise.repeat(busy_first.__next__, repeats=3, warmup=0)
    assert timing.seconds == 1.0 and timing.believable and len(timing.samples) == 7
    always = noise.repeat(iter([1.3**i for i in range(100)]).__next__, repeats=3, warmup=0)
    assert len(always.samples) == noise.PATIENCE * 3
    assert "69 %" in always.doubt and noise.BUSY in always.doubt


def test_a_time_that_beats_its_ceiling_is_said_to():
    timing = noise.Timing((1.0, 1.0, 1.0), least=1.5)
    assert not timing.believable and "1.50 times as fast as this machine's own ceiling" in timing.doubt
    assert noise.Timing((1.0, 1.0), least=1.02).believable  # ceilings are measured too


def test_no_order_within_the_noise():
    quiet, level, slow = (noise.Timing((t, t * 1.01, t * 1.02)) for t in (1.0, 1.04, 2.0))
    value, spread = quiet.ratio(level)
    assert abs(value - 1) <= spread
    value, spread = quiet.ratio(slow)
    assert value == pytest.approx(2) and value - spread > 1
    value, spread = noise.Timing((1.0, 1.9, 2.0)).ratio(slow)
    assert value - spread < 1  # too noisy to say


def test_the_worst_doubt_is_told():
    quiet, noisy = noise.Timing((1.0, 1.0)), noise.Timing((1.0, 1.5))
    assert noise.doubts([]) == noise.doubts([quiet]) == ""
    assert noise.doubts([quiet, noisy]) == noisy.doubt != ""
    with pytest.raises(ValueError, match="repeats"):
        noise.repeat(lambda: 1.0, repeats=0)
