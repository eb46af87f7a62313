"""SmoothQuant: the same function before rounding, less error after it, and nothing half done."""

import copy

import pytest
import torch
import transformers
from torch import nn

from optinfer.quantization.formats.llm_int8 import quantize_activations
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.methods.calibrate import calibrate
from optinfer.quantization.methods.smoothquant import smooth_layer, smoothing_scale, smoothquant
from optinfer.quantization.model import quantize

FAMILIES = ("LlamaConfig", "Qwen2Config", "MistralConfig", "GemmaConfig")
IDS = (torch.arange(1500) * 37 % 127).tolist()


class Numbers:
    """A tokenizer for tests: text is numbers already."""

    bos_token_id = None

    def __call__(self, text, **kwargs):
        return {"input_ids": IDS if len(text) > 1 else [0]}


def model_with_outliers(family: str = "LlamaConfig") -> nn.Module:
    """Small and random; some features of every norm are fifty times larger than the rest."""
    torch.manual_seed(0)
    config = getattr(transformers, family)(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, p in model.named_parameters():
        if "layernorm" in name:
            p.data[[3, 17, 40]] += 50
        elif "proj" in name:
            p.data *= 4
    return model


def walk(model):
    return calibrate(model, Numbers(), "text", num_sequences=12, length=48, batch_size=4, progress=False)


@torch.no_grad()
def logits(model):
    return model(torch.tensor([IDS[:40]])).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_smoothing_does_not_change_the_function(family):
    model = model_with_outliers(family)
    before = logits(model)
    for layer in walk(model):
        smooth_layer(layer)
        for name, p in layer.module.named_parameters():
            model.get_parameter(f"{layer.name}.{name}").data.copy_(p)
    after = logits(model)
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


@torch.no_grad()
def test_the_scale_is_equation_4():
    x_max, weights = (
        torch.tensor([4.0, 9.0, 0.0]),
        [torch.tensor([[1.0, -4.0, 2.0]]), torch.tensor([[-0.25, 1.0, 3.0]])],
    )
    assert smoothing_scale(x_max, weights, 0.5).tolist() == [2.0, 1.5, 1.0]  # a feature that is never there is left
    assert smoothing_scale(x_max, weights, 1.0)[:2].tolist() == [4.0, 9.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_outliers_cost_less_after_smoothing(family):
    """W8A8 with outliers in every token: rounding as it is, and after smoothing."""
    model = model_with_outliers(family)
    exact = logits(model)
    plain = logits(quantize(copy.deepcopy(model), "llm_int8", threshold=0.0, progress=False))
    smoothed = copy.deepcopy(model)
    smoothquant(smoothed, walk(smoothed))
    assert all(m.scheme.threshold == 0 for m in smoothed.modules() if isinstance(m, QuantizedLinear))
    smooth = logits(smoothed)
    assert (smooth - exact).norm() < 0.7 * (plain - exact).norm()


def test_one_scale_per_token_is_what_outliers_spoil():
    """The reason for it all, on one vector: the small features keep two of 255 levels."""
    x = torch.full((1, 64), 0.4)
    x[0, 5] = 50.0
    assert quantize_activations(x, threshold=0.0).codes[0, 0] == 1


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "half", True, float("nan")])
def test_bad_alpha_changes_nothing(alpha):
    model = model_with_outliers()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        smoothquant(model, walk(model), alpha=alpha)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
