"""Fake quantization and training through it."""

import copy

import pytest
import torch
import transformers

from optinfer.quantization import fake_quantize, qat, quantize_linear
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.methods.ladder import dequantize
from tests.quantization.test_calibrate import TEXT, Letters


def small_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= 4
    return model


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantize_is_quantize_and_back_with_a_straight_gradient(bits, symmetric, dtype):
    x = torch.randn(6, 96).to(dtype).float().requires_grad_()
    y = fake_quantize(x, bits, 32, symmetric, dtype)
    assert torch.equal(y, quantize_linear(x.to(dtype), bits, 32, symmetric).dequantize().float())
    gradient = torch.randn_like(x)
    y.backward(gradient)
    assert torch.equal(x.grad, gradient)


@torch.no_grad()
def test_training_beats_rounding_and_converts_exactly():
    model = small_model()
    ids = torch.tensor([[ord(c) % 128 for c in TEXT[:60]]])
    expected = model(ids).logits.log_softmax(-1)
    before = copy.deepcopy(model.state_dict())
    losses = []
    out = qat(model, Letters(), TEXT, bits=2, group_size=32, steps=30, batch_size=4, length=32,
              learning_rate=2e-3, progress=False, losses=losses)  # fmt: skip
    assert out is model
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    for name, value in before.items():
        if name.endswith("proj.weight"):
            before[name] = fake_quantize(value, 2, 32, False)
    nearest = small_model()
    nearest.load_state_dict(before)

    def divergence(m):
        return float((expected.exp() * (expected - m(ids).logits.log_softmax(-1))).sum(-1).mean())

    assert divergence(dequantize(model)) < divergence(nearest)


def test_an_error_leaves_the_model_alone():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not divide"):
        qat(model, Letters(), TEXT, group_size=64, steps=3, batch_size=2, length=32, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
