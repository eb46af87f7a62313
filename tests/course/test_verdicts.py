"""Words from numbers: sides, verdicts, sentences, and guesses judged by their direction first."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optinfer.course.lesson import Lesson
from optinfer.course.verdicts import VERDICTS, every, judge, side

numbers = st.floats(-1e6, 1e6)
spreads = st.floats(0, 1e3)


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTINFER_PROGRESS", str(tmp_path))
    return Lesson("00_start_here", torch.device("cpu"), torch.float32, 0)


@given(numbers, numbers, spreads)
def test_a_side_is_claimed_only_outside_the_spread(value, of, spread):
    found = side(value, of, spread)
    assert (found == "level") == (abs(value - of) <= spread)
    if found != "level":
        assert (found == "more") == (value > of)


@given(numbers, numbers, st.floats(0, 1e3), spreads)
def test_verdicts_never_improve_as_a_value_falls_or_its_spread_grows(value, holds, below, spread):
    order = ["does not hold", "in part", "holds"]
    here = order.index(judge(value, holds, holds - below, spread))
    assert here >= order.index(judge(value - 1, holds, holds - below, spread))
    assert here >= order.index(judge(value, holds, holds - below, spread + 1))


def test_what_was_not_measured_is_not_tested_here():
    assert judge(None, 1) == judge(math.nan, 1, 0.5) == every([]) == "not tested here"
    assert side(math.nan) == "level"


@given(st.lists(st.sampled_from(VERDICTS), min_size=1))
def test_parts_agree_or_hold_in_part(parts):
    assert every(parts) == (parts[0] if len(set(parts)) == 1 else "in part")


def test_the_first_sentence_whose_condition_holds_is_said(lesson, capsys):
    lesson.say((False, "one"), (True, "two"), (True, "three"), "four")
    lesson.say((False, "five"))
    lesson.say((False, "six"), "seven")
    assert capsys.readouterr().out.split() == ["two", "seven"]
    with pytest.raises(TypeError, match="a case is"):
        lesson.say((True, 1))


@pytest.mark.parametrize(
    ("guess", "measured", "spread", "tone", "words"),
    [
        (1.2, 0.96, 0.0, "bad", "you said more than 1, it is less than 1"),  # close in size, and the other way round
        (1.2, 0.96, 0.1, "info", "no different from 1"),
        (1.05, 1.02, 0.1, "good", "no different from 1"),
        (1.2, 1.3, 0.0, "good", "direction is right, and the size within a quarter"),
        (1.2, 2.4, 0.0, "info", "direction is right. The measurement is 2 times your guess"),
        (0.5, 3.0, 0.0, "bad", "you said less than 1, it is more than 1"),
    ],
)
def test_a_guess_is_judged_by_its_direction_first(lesson, guess, measured, spread, tone, words):
    card = lesson.compare(guess, measured, "times as fast", spread=spread)
    assert card.tone == tone and words in repr(card)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_guess_on_the_wrong_side_of_one_is_never_good(guess, measured):
    card = Lesson("x", torch.device("cpu"), torch.float32, 0).compare(guess, measured, "times")
    if (guess - 1) * (measured - 1) < 0:
        assert card.tone == "bad"
    else:
        assert card.tone != "bad" or 1 in (guess, measured)


def test_without_a_direction_only_the_size_counts(lesson):
    assert lesson.compare(10, 11, "ms").tone == "good"
    assert lesson.compare(1.0, -0.2, "% more loss").tone == "bad"
    assert "direction" not in repr(lesson.compare(10, 100, "ms"))


def test_source_is_folded_and_escaped(lesson):
    shown = lesson.source(every, judge)
    assert "def every(" in repr(shown) and "def judge(" in repr(shown)
    assert "<details><summary>Read <code>every</code>, <code>judge</code></summary>" in shown._repr_html_()
    assert "-&gt;" in shown._repr_html_()
