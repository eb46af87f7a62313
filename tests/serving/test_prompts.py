"""Every way in which a prompt can be handed over gives the same text, or is refused by name."""

import numpy as np
import pytest
import torch

from optinfer.models import load_model
from optinfer.serving import Engine, SamplingParams

SHORT = SamplingParams(max_tokens=4)
A, B = [5, 6, 7, 8], [9, 10]
PADDED, MASK = [A, [0, 0, *B]], [[1, 1, 1, 1], [0, 0, 1, 1]]
RIGHT, RIGHT_MASK = [A, [*B, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, num_blocks=24, block_size=4)


def encoding(**fields):
    from transformers import BatchEncoding

    return BatchEncoding(fields)


ONE = {
    "list": A,
    "tuple": tuple(A),
    "range": range(5, 9),
    "array": np.array(A),
    "int32 array": np.array(A, dtype=np.int32),
    "tensor": torch.tensor(A),
    "row": torch.tensor([A]),
    "list of 0-d tensors": list(torch.tensor(A)),
    "list of numpy ints": list(np.array(A)),
    "generator": (token for token in A),
    "vllm": {"prompt_token_ids": A},
    "mapping": {"input_ids": A, "attention_mask": [1] * 4},
    "BatchEncoding": encoding(input_ids=A, attention_mask=[1] * 4),
    "BatchEncoding of tensors": encoding(input_ids=torch.tensor([A]), attention_mask=torch.ones(1, 4)),
    "padded": encoding(input_ids=torch.tensor([[0, 0, *A]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])),
}


@pytest.mark.parametrize("kind", ONE)
def test_one_prompt(engine, reference, kind):
    prompt = list(ONE[kind]) if kind == "generator" else ONE[kind]
    (done,) = engine.generate(prompt, SHORT)
    assert done.token_ids == reference(A, 4)
    assert [t for delta in engine.stream(prompt, SHORT) for t in delta.token_ids] == reference(A, 4)
    engine.add_request(prompt, SHORT)
    done = []
    while engine.has_work:
        done += engine.step()
    assert [c.token_ids for c in done] == [reference(A, 4)]


SEVERAL = {
    "lists": [A, B],
    "tensors": [torch.tensor(A), torch.tensor(B)],
    "rows": [torch.tensor([A]), torch.tensor([B])],
    "arrays": [np.array(A), np.array(B)],
    "mixed": [{"prompt_token_ids": A}, torch.tensor(B)],
    "encodings": [encoding(input_ids=A, attention_mask=[1] * 4), encoding(input_ids=B, attention_mask=[1] * 2)],
    "encoding of lists": encoding(input_ids=[A, B], attention_mask=[[1] * 4, [1] * 2]),
    "padded left": encoding(input_ids=torch.tensor(PADDED), attention_mask=torch.tensor(MASK)),
    "padded right": encoding(input_ids=np.array(RIGHT), attention_mask=np.array(RIGHT_MASK)),
    "mapping of lists": {"input_ids": PADDED, "attention_mask": MASK},
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_prompts(engine, reference, kind):
    done = engine.generate(SEVERAL[kind], SHORT)
    assert [c.token_ids for c in done] == [reference(A, 4), reference(B, 4)]
    with pytest.raises(ValueError, match="one prompt is wanted"):
        engine.add_request(SEVERAL[kind], SHORT)


def test_no_prompts(engine):
    assert engine.generate([]) == engine.generate(iter([])) == []


REFUSED = {
    "an image": ({"input_ids": A, "pixel_values": torch.zeros(3)}, "pixel_values"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 4, 8)}, "inputs_embeds"),
    "messages": ([{"role": "user", "content": "hi"}], "engine.chat"),
    "a message": ({"role": "user", "content": "hi"}, "engine.chat"),
    "floats": (torch.tensor([1.5, 2.0]), "float32"),
    "bools": (torch.tensor([True, False]), "bool"),
    "three dimensions": (torch.zeros(1, 2, 3, dtype=torch.int64), "1, 2, 3"),
    "a number": (np.int64(5), "token ids"),
    "a mask with holes": ({"input_ids": A, "attention_mask": [1, 0, 1, 1]}, "middle"),
    "a mask of another shape": ({"input_ids": A, "attention_mask": [1, 1]}, "attention_mask"),
    "a batch in a batch": ([[A, B], [A, B]], "batch within a batch"),
    "all padding": ({"input_ids": A, "attention_mask": [0, 0, 0, 0]}, "empty"),
    "mixed list": ([5, "text"], "in place 0|tokenizer"),
    "bytes": (object(), "string or token ids"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(engine, kind):
    prompt, message = REFUSED[kind]
    before = engine.manager.snapshot()
    with pytest.raises((TypeError, ValueError), match=message):
        engine.generate(prompt, SHORT)
    assert engine.manager.snapshot() == before and not engine.has_work


@pytest.fixture(scope="module")
def real():
    model, tokenizer = load_model(dtype="float32")
    return Engine(model, tokenizer, num_blocks=60), tokenizer


def test_what_a_real_tokenizer_returns(real):
    engine, tokenizer = real
    texts = ["The capital of France is", "One, two, three,"]
    expected = [c.text for c in engine.generate(texts, SHORT)]
    tokenizer.padding_side = "left"
    for prompts in (
        tokenizer(texts),
        tokenizer(texts, return_tensors="pt", padding=True),
        tokenizer(texts, return_tensors="np", padding=True),
        [tokenizer(text, return_tensors="pt").input_ids for text in texts],
        [{"prompt": text} for text in texts],
    ):
        assert [c.text for c in engine.generate(prompts, SHORT)] == expected
    assert "".join(delta.text for delta in engine.stream({"prompt": texts[0]}, SHORT)) == expected[0]


def test_chat_is_the_template_and_its_tokens(real):
    engine, tokenizer = real
    talks = [[{"role": "user", "content": text}] for text in ("What is two and two?", "Name a colour.")]
    done = engine.chat(talks, SHORT)
    options = {"add_generation_prompt": True}
    templated = [tokenizer.apply_chat_template(talk, **options) for talk in talks]
    assert [c.text for c in engine.generate(templated, SHORT)] == [c.text for c in done]
    assert [c.text for c in engine.chat(talks[0], SHORT)] == [done[0].text]
    tensors = tokenizer.apply_chat_template(talks[0], return_tensors="pt", return_dict=True, **options)
    assert [c.text for c in engine.generate(tensors, SHORT)] == [done[0].text]


def test_a_special_token_as_a_stop_string(real):
    engine, tokenizer = real
    params = {"max_tokens": 40, "ignore_eos": True}
    prompt = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
        )
    ]
    free = engine.generate(prompt, SamplingParams(**params))[0]
    assert tokenizer.eos_token_id in free.token_ids
    for stop in ("<|im_end|>", ".<|im_end|>", "<|im_end|>\n"):
        (done,) = engine.generate(prompt, SamplingParams(**params, stop=stop))
        raw = tokenizer.decode(free.token_ids)
        expected = raw[: raw.index(stop)] if stop in raw else free.text
        assert (done.text, done.finish_reason) == (expected, "stop" if stop in raw else "length")
        streamed = "".join(delta.text for delta in engine.stream(prompt, SamplingParams(**params, stop=stop)))
        assert streamed == done.text
    assert tokenizer.decode(free.token_ids).count("<|im_end|>") and "<|im_end|>" not in free.text


def test_chat_without_a_template(engine):
    with pytest.raises(ValueError, match="chat template"):
        engine.chat([{"role": "user", "content": "hi"}])
