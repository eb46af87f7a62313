"""The text a draft is trained on: who says what, and that nothing in it is what the draft is measured by."""

import itertools
import re

import pytest
import torch

from optinfer import data, load_model
from optinfer.speculative.training.questions import questions
from optinfer.speculative.training.self_talk import self_talk

USER, ANSWER, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


@pytest.fixture(scope="module")
def model():
    return load_model(dtype=torch.float32)


@pytest.mark.thorough
def test_questions_take_the_users_turns(model):
    model, tokenizer = model
    asked = ["Why?", "And how does that work?", "Name one."] * 20
    talk = self_talk(model, tokenizer, rows=3, length=96, seed=1, questions=iter(asked))
    for tokens in talk["tokens"]:
        text = tokenizer.decode(tokens)
        turns = list(re.finditer(re.escape(USER) + "(.*?)" + re.escape(END), text, re.DOTALL))
        assert turns and {turn[1] for turn in turns} <= set(asked)
        for turn in turns:
            after = f"\n{ANSWER}"
            assert after.startswith(text[turn.end() : turn.end() + len(after)])


@pytest.mark.thorough
@pytest.mark.parametrize("with_questions", [False, True])
def test_the_marked_tokens_are_the_targets_own_choice(model, with_questions):
    model, tokenizer = model
    given = itertools.repeat("What is a river?") if with_questions else None
    talk = self_talk(model, tokenizer, rows=4, length=72, seed=2, questions=given)
    tokens = talk["tokens"].long()
    with torch.inference_mode():
        best = model(tokens).logits.argmax(-1)
    greedy_rows = talk["answer"][::2, 1:]
    assert greedy_rows.any()
    assert (best[::2, :-1] == tokens[::2, 1:])[greedy_rows].all()
    for row, answered in zip(tokens, talk["answer"]):
        said = tokenizer.decode(row[answered])
        assert "im_start" not in said and "What is a river" not in said


def test_hidden_states_are_the_targets(model):
    model, tokenizer = model
    talk = self_talk(model, tokenizer, rows=2, length=48, seed=3, questions=questions(3))
    with torch.inference_mode():
        expected = model.model(talk["tokens"].long()).last_hidden_state
    torch.testing.assert_close(talk["hidden"], expected, atol=2e-3, rtol=2e-3)
    assert not any(tensor.is_inference() for tensor in talk.values())  # a head is trained on them


def test_no_question_is_about_what_the_draft_is_measured_by():
    drawn = " ".join(itertools.islice(questions(0), 50_000)).lower()
    assert len(set(itertools.islice(questions(1), 5_000))) > 3_000
    for prompt in data.prompts("chat"):
        assert prompt.lower() not in drawn
    for subject in (
        "climate and weather",
        "sky is blue",
        "bicycle",
        "used car",
        "a bill",
        "cats",
        "vaccine",
        "apology",
    ):
        assert subject not in drawn, subject
    for subject in ("compound interest", "detective", "start running", "trains", "small town", "first day of autumn"):
        assert subject not in drawn, subject
