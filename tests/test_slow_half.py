"""A processor whose torch is slow in 16 bits, on any processor.

There `load_model` gives a model's linear layers the class `cpu.Linear`. Whoever asks what kind a layer is must take it for
the plain linear layer that it is: quantized alike, merged alike, served alike.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from optinfer import cpu, hardware, models
from optinfer.quantization import SCHEMES, quantize
from optinfer.quantization.layers import select_layers
from optinfer.serving import Engine, SamplingParams
from optinfer.serving.fuse import merge

pytestmark = pytest.mark.skipif(cpu.kernels() is None, reason="no C++ compiler here")


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64)).bfloat16().eval()


def ours(model: nn.Module) -> nn.Module:
    return cpu.use_cpu_linear(copy.deepcopy(model))


@pytest.fixture
def slow_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_fast_half", lambda device: device.type != "cpu")


def test_the_model_is_loaded_with_our_layers_quantized_and_served(slow_half: None) -> None:
    model, tokenizer = models.load_model(dtype="bfloat16")
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {cpu.Linear}
    assert len(select_layers(model, watch=False).layers) == 210
    quantized = quantize(copy.deepcopy(model), "int4", progress=False)
    prompt = tokenizer("The capital of France is")["input_ids"]
    for served in (model, quantized):
        done = Engine(served, num_blocks=32).generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(done[0].token_ids) == 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_stores_the_same(scheme: str) -> None:
    plain = tiny()
    expected, got = (
        quantize(model, scheme, progress=False).state_dict() for model in (copy.deepcopy(plain), ours(plain))
    )
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_layers_that_others_read_are_found_there_too() -> None:
    """The short input runs through our products, and `left` says the same of them."""

    class Reads(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.inner.weight)

    model = ours(tiny())
    model.model.layers[0].mlp.up_proj = Reads(model.model.layers[0].mlp.up_proj)
    left = select_layers(model).left
    assert "model.layers.0.mlp.up_proj.inner" in left and "model.layers.1.mlp.up_proj" not in left


def test_another_subclass_is_still_left_alone() -> None:
    class Special(cpu.Linear):
        pass

    model = ours(tiny())
    model.model.layers[0].mlp.up_proj.__class__ = Special
    assert "Special" in select_layers(model).left["model.layers.0.mlp.up_proj"]


def test_they_are_merged() -> None:
    attention = ours(tiny()).model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    expected = torch.cat([layer.weight for layer in layers])
    merged = merge(layers)
    assert merged is not None and torch.equal(merged[0], expected)
