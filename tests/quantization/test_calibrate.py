"""Calibration and the whole-model methods on small random models of several families."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

from optinfer import hardware
from optinfer.bench.calibrated_quantization import isolated
from optinfer.quantization.formats.grid import quantize_linear
from optinfer.quantization.layers import linear_layers
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.methods.awq import ALPHAS, awq, clip_weight, fold, gain_offset, scale_layer, scaling_groups
from optinfer.quantization.methods.calibrate import CalibrationError, add_gram, calibrate, decoder_layers
from optinfer.quantization.methods.gptq import gptq, output_error
from optinfer.quantization.methods.grid import Grid
from optinfer.quantization.methods.smoothquant import smoothquant

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "head_dim": 16,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, no GQA": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen2, biases": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2}),
    "mistral, sliding": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 8}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"num_key_value_heads": 2, "sliding_window": 8}),
}


class Letters:
    """A tokenizer for tests: one token per character."""

    bos_token_id = None

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(c) % 128 for c in text]}


TEXT = "".join(chr(33 + (i * i + 7 * i // 3) % 90) for i in range(1500))


def small_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**SMALL | options)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for p in model.parameters():
        p.data += 0.3 * p.data.std().nan_to_num(0.0) * torch.randn_like(p)
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
        else:
            p.data *= 2
    return model


def walk(model, **options):
    return calibrate(model, Letters(), TEXT, num_sequences=12, length=48, batch_size=5, progress=False, **options)


@torch.no_grad()
def logits(model):
    return model(torch.tensor([[ord(c) % 128 for c in TEXT[:40]]])).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_statistics_are_those_of_the_models_own_inputs(family):
    """What the walk gathers equals what hooks on one ordinary forward pass see; nothing is left on the model."""
    model = small_model(family)
    before = copy.deepcopy(model.state_dict())
    run = walk(model)
    gathered = {f"{layer.name}.{n}": s for layer in run for n, s in layer.statistics.items()}
    seen: dict[str, list] = {}
    names = [f"{p}.{n}" for p, layer in decoder_layers(model).items() for n in linear_layers(layer)]
    assert set(gathered) == set(names)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: seen.setdefault(name, []).append(a[0])
        )
        for name in names
    ]
    model(run.sequences)
    for hook in hooks:
        hook.remove()
    for name in names:
        x = torch.cat(seen[name]).flatten(0, -2).double()
        statistics = gathered[name]
        assert statistics.tokens == len(x) == run.num_tokens
        torch.testing.assert_close(statistics.hessian.double(), 2 * x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(statistics.mean_abs.double(), x.abs().mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(statistics.max_abs.double(), x.abs().amax(0), rtol=1e-3, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("width", [1, 255, 256, 600])
def test_gram_matrix_computed_by_halves(width):
    x = torch.randn(40, width)
    total = add_gram(torch.eye(width), x, 0.5)
    expected = torch.eye(width, dtype=torch.float64) + 0.5 * x.double().T @ x.double()
    assert torch.equal(total, total.T)
    assert torch.allclose(total.double(), expected, atol=1e-4)


def test_layers_that_share_an_input_share_statistics():
    for layer in walk(small_model("llama")):
        s = layer.statistics
        assert s["self_attn.q_proj"] is s["self_attn.k_proj"] is s["self_attn.v_proj"]
        assert s["mlp.gate_proj"] is s["mlp.up_proj"]
        assert s["self_attn.q_proj"] is not s["mlp.up_proj"]


def test_next_layer_sees_what_the_changed_layer_produces():
    model, changed = small_model("llama"), small_model("llama")
    changed.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    expected = [layer.statistics["mlp.up_proj"].hessian for layer in walk(changed)][1]
    found = []
    for layer in walk(model):
        found.append(layer.statistics["mlp.up_proj"].hessian)
        if layer.name.endswith(".0"):
            layer.module.mlp.down_proj.weight.data.mul_(3)
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_do_not_change_the_function(family):
    """Before rounding, the scaled model computes the original's logits."""
    model = small_model(family)
    expected = logits(model)
    for layer in walk(model):
        scale_layer(layer, Grid(3, 32, False), tokens=96)
        moved = 0.0
        target = decoder_layers(model)[layer.name]
        for a, b in zip(target.parameters(), layer.module.parameters()):
            moved = max(moved, float((a - b).detach().abs().max()))
            a.data.copy_(b.data)
        assert moved > 1e-3  # there was something to preserve
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
def test_whole_models(family, method):
    model = small_model(family)
    expected = logits(model)
    nearest = copy.deepcopy(model)
    for layer in decoder_layers(nearest).values():
        for linear in linear_layers(layer).values():
            linear.weight.data = quantize_linear(linear.weight, 4, 32, False).dequantize()
    options = {"bits": 4, "group_size": 32, "symmetric": False}
    if method == "gptq":
        assert gptq(model, walk(model), **options) is model
    else:
        awq(model, walk(model), rounding="gptq" if "gptq" in method else "nearest", **options)
    count = sum(isinstance(m, QuantizedLinear) for m in model.modules())
    assert count == 3 * 7
    ours, theirs = (logits(model) - expected).square().mean(), (logits(nearest) - expected).square().mean()
    assert torch.isfinite(ours)
    if "gptq" in method:  # AWQ alone promises smaller errors of each block it searched, not of a random model's logits
        assert ours < theirs


def test_gptq_report_never_above_round_to_nearest():
    model, report = small_model("llama"), []
    gptq(model, walk(model), bits=4, group_size=32, symmetric=False, report=report)
    assert len(report) == 21
    assert all(row["error"] <= row["rtn_error"] for row in report)


def test_where_awq_may_scale():
    grouped = scaling_groups(decoder_layers(small_model("llama"))["model.layers.0"])
    plain = scaling_groups(decoder_layers(small_model("llama, no GQA"))["model.layers.0"])
    assert "self_attn.v_proj" not in [s.previous for s in grouped]
    assert "self_attn.v_proj" in [s.previous for s in plain]
    gemma = scaling_groups(decoder_layers(small_model("gemma2"))["model.layers.0"])
    assert "pre_feedforward_layernorm" in [s.previous for s in gemma]
    assert gain_offset(decoder_layers(small_model("gemma2"))["model.layers.0"].input_layernorm) == 1.0
    assert gain_offset(decoder_layers(small_model("qwen3"))["model.layers.0"].input_layernorm) == 0.0


UNUSUAL = {
    "BitNet: a norm between v and o, and before down": (
        "BitNetConfig",
        {"num_key_value_heads": 4},
        ["v_proj", "up_proj"],
    ),
    "OLMo: norms without a gain": ("OlmoConfig", {"num_key_value_heads": 2}, ["input_layernorm", "post_attention"]),
}


@pytest.mark.parametrize("family", UNUSUAL)
@pytest.mark.parametrize("method", [awq, smoothquant])
def test_what_cannot_be_folded_is_left_and_named(family, method, monkeypatch):
    name, changes, left = UNUSUAL[family]
    monkeypatch.setitem(FAMILIES, family, (name, changes))
    model = small_model(family)
    expected = logits(model)
    options = {"bits": 8, "group_size": 32} if method is awq else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        method(model, walk(model), **options)
    said = [str(w.message) for w in said if "left unscaled" in str(w.message)]
    if method is awq:
        assert all(any(part in message for message in said) for part in left)
    assert (logits(model) - expected).norm() < (0.03 if method is awq else 0.1) * expected.norm()


def test_a_vision_tower_as_deep_as_the_decoder_is_not_the_decoder():
    from tests.quantization.families import families
    from tests.serving.families import tiny_model

    model = tiny_model(
        families("images and text")["LlavaConfig"], auto=transformers.AutoModelForImageTextToText, vocab_size=128
    )
    model.config.vision_config.num_hidden_layers = 4
    tower = model.model.vision_tower.encoder
    tower.layers.extend(copy.deepcopy(list(tower.layers)))
    assert len(tower.layers) == model.config.text_config.num_hidden_layers
    assert all("language_model" in name for name in decoder_layers(model))
    gptq(model, walk(model), bits=4, group_size=32)
    assert {type(m) for n, m in model.named_modules() if "vision" in n and n.endswith("_proj")} == {nn.Linear}


def test_folding_into_the_wrong_row_is_noticed():
    """The check of `test_scales_do_not_change_the_function` can fail: folding over GQA changes the logits."""
    model = small_model("llama, no GQA")
    expected = logits(model)
    layer = decoder_layers(model)["model.layers.0"]
    scaling = next(s for s in scaling_groups(layer) if s.previous == "self_attn.v_proj")
    scale = torch.linspace(0.5, 2, 64)
    fold(layer, scaling, scale)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    layer.self_attn.v_proj.weight.data = layer.self_attn.v_proj.weight.data.roll(1, 0)
    assert (logits(model) - expected).abs().max() > 1e-3


def test_clipping_never_increases_a_groups_error():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    weight = torch.randn(16, 64, generator=generator) ** 3
    x = torch.randn(300, 64, generator=generator)
    hessian = 2 / 300 * x.T @ x
    clipped = clip_weight(weight, hessian, Grid(3, 32, False))
    assert (clipped != weight).any()
    for columns in (slice(0, 32), slice(32, 64)):
        block, w = hessian[columns, columns], weight[:, columns]
        plain = quantize_linear(w, 3, 32, False).dequantize()
        ours = quantize_linear(clipped[:, columns], 3, 32, False).dequantize()
        assert output_error(w, ours, block) <= output_error(w, plain, block)


def test_search_begins_at_no_scale_at_all():
    assert ALPHAS[0] == 0
    trace = {}
    model = small_model("llama")
    awq(model, walk(model), bits=3, group_size=32, trace=trace)
    assert len(trace) == 3 * 3
    assert all(search[0] == (0.0, 1.0) and min(e for _, e in search) <= 1 for search in trace.values())


# ------------------------------------------------------------------------------------------------------- bad input
def unchanged(model, call, error, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        call(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("method", [gptq, awq])
@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"texts": "too short"}, CalibrationError, "too little calibration text: 9 tokens .* 96 inputs"),
        ({"texts": ""}, CalibrationError, "too little calibration text"),
        ({"group_size": 64}, ValueError, r"group_size=64 does not divide the 96 inputs of .*down_proj.*: 16, 32"),
        ({"bits": 5}, ValueError, "bits must be one of"),
        ({"length": 0}, ValueError, "length must be a positive int"),
    ],
)
def test_bad_input(method, options, error, match):
    def call(model):
        method(model, Letters(), **{"texts": TEXT, "group_size": 32, "progress": False} | options)

    unchanged(small_model("llama"), call, error, match)


class Experts(nn.Module):
    """Two experts and a router that never picks the second."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.idle = mlp, nn.Linear(64, 64)

    def forward(self, x):
        return self.mlp(x)


@pytest.mark.parametrize("at", [0, 2])
def test_a_layer_never_reached(at):
    model = small_model("llama")
    model.model.layers[at].mlp = Experts(model.model.layers[at].mlp)
    unchanged(
        model,
        lambda m: gptq(m, walk(m), group_size=32),
        CalibrationError,
        f"calibration never reached model.layers.{at}.mlp.idle",
    )


def test_interruption_leaves_the_model_alone():
    model = small_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaN"):
        gptq(model, walk(model), group_size=32)
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())


def test_unknown_wiring():
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SMALL | {"num_key_value_heads": 4, "pad_token_id": 0})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    unchanged(
        model, lambda m: awq(m, walk(m), group_size=32), ValueError, "does not know how Phi3DecoderLayer is wired"
    )
    gptq(model, walk(model), group_size=32)  # GPTQ needs no wiring
    assert torch.isfinite(logits(model)).all()


def peaks_of_walks() -> list[int]:
    """This process's peak of memory, in bytes, after a walk over 2 layers, over 8, and over 8 whose statistics stay."""

    def model(num_layers: int) -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=128, hidden_size=256, intermediate_size=2048, num_hidden_layers=num_layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    few, many, peaks = model(2), model(8), []
    for which, keep in ((few, False), (many, False), (many, True)):
        run = calibrate(which, Letters(), TEXT * 2, num_sequences=60, length=48, progress=False)
        kept = [layer.statistics if keep else None for layer in run]
        assert len(kept) == len(run)
        peaks.append(hardware.peak_memory_bytes())
    return peaks


@pytest.mark.thorough
def test_memory_holds_the_statistics_of_one_layer():
    """Six layers more, of 18 MB of statistics each, must cost a fraction of that."""
    one_layer = 4 * (3 * 256**2 + 2048**2)  # float32 Hessians: the inputs of q/k/v, of o, of gate/up, of down
    few, many, kept = isolated(peaks_of_walks)
    assert many - few < 2 * one_layer
    assert kept - many > 4 * one_layer
