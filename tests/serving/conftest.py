"""Small random models in fp32, and the reference: transformers' `generate`, one prompt at a time."""

import random

import pytest
import torch

from optinfer.speculative import DraftTree, TreeDraft


def build(config, seed=0):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device("cpu"):  # the same numbers, and so the same text, on every device
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():  # spread the logits: ties would make "the" greedy text ambiguous
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.25)
    return model.to(torch.get_default_device())


SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def tiny_llama(**changes):
    from transformers import LlamaConfig

    return build(LlamaConfig(**{**SHAPE, **changes}))


def generate(model, prompt, max_tokens):
    """transformers' greedy continuation of one prompt, as a list."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def model():
    return tiny_llama()


@pytest.fixture(scope="session")
def byte_model():
    return tiny_llama(vocab_size=256)


@pytest.fixture(scope="session")
def reference(model):
    """Greedy continuation by `generate`, remembered: `reference(prompt, max_tokens)`."""
    known: dict = {}

    def continuation(prompt, max_tokens):
        key = (tuple(prompt), max_tokens)
        if key not in known:
            known[key] = generate(model, prompt, max_tokens)
        return known[key]

    return continuation


@pytest.fixture(scope="session")
def build_model():
    return build


@pytest.fixture(scope="session")
def hf_generate():
    return generate


class ByteTokenizer:
    """Token i is byte i, so that one character may take several tokens; 2 ends the text."""

    eos_token_id = 2

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, skip_special_tokens=False, **kwargs):
        return bytes(i for i in ids if not (skip_special_tokens and i == 2)).decode(errors="replace")


@pytest.fixture
def byte_tokenizer():
    return ByteTokenizer()


class ScriptedModel:
    """Stands in for the model runner: logits put everything on a token that a function of the text chooses."""

    def __init__(self, engine, next_token):
        self.engine, self.next_token = engine, next_token
        engine.runner = engine._loop.runner = self

    def is_current(self):
        return True

    def run(self, chunks, num_logits, copies=()):
        text_of = {tuple(c.block_table): self._text(c) for c in chunks}
        rows = []
        for chunk, count in zip(chunks, num_logits):
            text = text_of[tuple(chunk.block_table)]
            end = chunk.start + len(chunk.token_ids)
            for position in range(end - count, end):
                row = torch.full((self.engine.vocab_size,), -20.0)
                row[self.next_token(text[: position + 1])] = 20.0
                rows.append(row)
        return torch.stack(rows)

    def _text(self, chunk):
        manager = self.engine.manager
        for seq_id in manager.sequence_ids:
            if manager.block_table(seq_id) == chunk.block_table:
                return manager.token_ids(seq_id)
        raise AssertionError("a chunk of no live sequence")


@pytest.fixture(scope="session")
def scripted():
    return ScriptedModel


@pytest.fixture(scope="session")
def byte_tokenizer_class():
    return ByteTokenizer


class KnowingTree(TreeDraft):
    """Some guesses at random, and among them what is right, as far as the texts are known: rarely the first branch."""

    on_host = True

    def __init__(self, texts, seed=0, vocabulary=97):
        self.texts, self.rng, self.vocabulary = texts, random.Random(seed), vocabulary

    def propose_tree(self, input_ids, num_tokens=None):
        text = input_ids[0].tolist()
        right = next((full[len(text) :] for full in self.texts if full[: len(text)] == text), [])
        right = right[: self.rng.randint(0, 6)]
        wrong = [self._guess(self.rng.randint(1, 4)) for _ in range(self.rng.randint(0, 3))]
        branches = [*wrong, right, right[:1] + self._guess(2), right[:2] + self._guess(1)]
        return DraftTree.of_chains(branch[:num_tokens] for branch in branches)

    def _guess(self, length):
        return [self.rng.randrange(3, self.vocabulary) for _ in range(length)]


@pytest.fixture(scope="session")
def knowing_tree():
    return KnowingTree
