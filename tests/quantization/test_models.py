"""Whole models: quantize, save, reload, exchange folders with bitsandbytes; footprints; quality; bad input."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig

from optinfer.course.workshop import DESIGNS, Design
from optinfer.quantization import (
    SCHEMES,
    OptinferConfig,
    QuantizedLinear,
    Reference,
    kl_divergence,
    load_bitsandbytes,
    memory_footprint,
    perplexity,
    quantize,
    save_bitsandbytes,
)
from optinfer.quantization.footprint import allocated_bytes, empty_model

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": True,
    "attention_bias": True,
}
VARIANTS = [(name, {}) for name in SCHEMES] + [
    ("nf4", {"double_quant": True}),
    ("fp4", {"group_size": 128}),
    ("int4", {"symmetric": False}),
    ("int4", {"group_size": 48}),
    ("int8", {"group_size": 32}),
]
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with biases and tied embeddings, weights large enough for logits to differ."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    for p in model.parameters():
        p.data = p.data * 3 if p.dim() == 2 else p.data + 0.1 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def load(path, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("scheme", "options"), VARIANTS)
def test_in_place_on_load_saved_and_reloaded_are_one(folder, tmp_path, scheme, options, dtype):
    original = load(folder, dtype)
    want = memory_footprint(original, scheme, **options)
    in_place = quantize(load(folder, dtype), scheme, progress=False, **options)
    on_load = load(folder, dtype, quantization_config=OptinferConfig(scheme, **options))
    assert allocated_bytes(in_place) == want
    ours, theirs = in_place.state_dict(), on_load.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    out = logits(in_place)
    assert torch.equal(out, logits(on_load))
    assert not torch.equal(out, logits(original))
    in_place.save_pretrained(tmp_path / "a")  # after a forward: the re-ordered weights must not leak out
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert torch.equal(out, logits(reloaded))
    assert reloaded.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 14)
    assert type(reloaded.lm_head) is nn.Linear


@pytest.mark.parametrize("scheme", ("nf4", "fp4", "int4", "int8"))
def test_fused_products_do_not_change_what_is_stored(folder, scheme):
    layer = quantize(load(folder, torch.bfloat16), scheme, progress=False).model.layers[0].mlp.up_proj
    before, weight = {k: v.clone() for k, v in layer.state_dict().items()}, layer.quantized.dequantize()
    x = torch.randn(3, 7, 128).bfloat16()
    with torch.no_grad():
        out = layer(x)
    assert torch.equal(layer.quantized.dequantize(), weight)
    exact = x.double() @ weight.double().T
    assert (out.double() - exact).norm() / exact.norm() < 6e-3
    after = layer.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    moved = copy.deepcopy(layer).to(torch.float16)
    kept = {k: v.dtype for k, v in before.items() if k.startswith("weight")}
    assert {k: moved.state_dict()[k].dtype for k in kept} == kept


def test_slices_and_odd_addresses(folder):
    """The fused operators crash on unaligned memory; the layer must not."""
    for scheme in ("int8", "int4", "nf4"):
        layer = quantize(load(folder, torch.bfloat16), scheme, progress=False).model.layers[0].mlp.up_proj
        buffer = torch.randn(1 + 5 * 128).bfloat16()
        x = buffer[1:].view(5, 128)
        with torch.no_grad():
            assert torch.equal(layer(x), layer(x.clone()))
            assert layer(torch.randn(128, 5).bfloat16().T).shape == (5, 320)


def test_gradients_reach_the_input(folder):
    layer = quantize(load(folder), "nf4", progress=False).model.layers[0].mlp.up_proj
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.quantized.dequantize().sum(0).expand(3, -1), atol=1e-5)


def their_weight(layer):
    """What a layer of bitsandbytes stands for, in float32; before its first forward, which packs it anew."""
    from bitsandbytes.functional import dequantize_4bit

    if getattr(layer.weight, "quant_state", None) is not None:
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float() * (layer.weight.SCB[:, None] / 127)


def assert_same_weights_and_nearly_the_same_logits(theirs, ours):
    """Weights are equal to the last step of their type. Logits are not: every processor has kernels that round otherwise."""
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QuantizedLinear)}
    assert layers
    for name, layer in layers.items():
        other = theirs.get_submodule(name)
        assert "bitsandbytes" in type(other).__module__
        expected = layer.quantized.dequantize(torch.float32)
        torch.testing.assert_close(their_weight(other), expected, rtol=2**-8, atol=1e-7)
    found, expected = logits(theirs).float(), logits(ours).float()
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(("scheme", "options"), [
    ("nf4", {}), ("nf4", {"double_quant": True}), ("fp4", {}), ("llm_int8", {}),
])  # fmt: skip
def test_folders_of_bitsandbytes_both_ways(folder, tmp_path, scheme, options):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    ours = quantize(load(folder, torch.bfloat16), scheme, progress=False, **options)
    save_bitsandbytes(ours, tmp_path / "ours")
    config = BitsAndBytesConfig(
        load_in_8bit=scheme == "llm_int8",
        load_in_4bit=scheme != "llm_int8",
        bnb_4bit_quant_type=scheme if scheme != "llm_int8" else "nf4",
        bnb_4bit_use_double_quant=bool(options),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    by_them = load(tmp_path / "ours", torch.bfloat16)
    assert_same_weights_and_nearly_the_same_logits(by_them, ours)
    theirs = load(folder, torch.bfloat16, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_weights_and_nearly_the_same_logits(theirs, load_bitsandbytes(tmp_path / "theirs"))
    again = load_bitsandbytes(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))


def test_a_damaged_folder_is_named(folder, tmp_path):
    model = quantize(load(folder), "nf4", progress=False)
    path = save_bitsandbytes(model, tmp_path / "x")
    file = path / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    for change, words in (
        (lambda s: s.pop(name), "absmax is missing"),
        (lambda s: s.update({name: s[name][:-1].clone()}), "absmax is torch.float32"),
        (lambda s: s[name].fill_(math.nan), "absmax has NaN"),
        (lambda s: s.pop("model.norm.weight"), "missing: model.norm.weight"),
    ):
        state = {k: v.clone() for k, v in whole.items()}
        change(state)
        save_file(state, file)
        with pytest.raises(ValueError, match=words):
            load_bitsandbytes(path)
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut short"):
        load_bitsandbytes(path)
    with pytest.raises(ValueError, match="not in bitsandbytes format"):
        load_bitsandbytes(folder)


def test_a_damaged_checkpoint_of_ours_is_named(folder, tmp_path):
    quantize(load(folder), "nf4", progress=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.self_attn.o_proj.weight_absmax"

    def attempt(change):
        state = {k: v.clone() for k, v in whole.items()}
        change(state)
        save_file(state, file, metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match="o_proj.weight_absmax is missing"):
        attempt(lambda s: s.pop(name))
    with pytest.raises(ValueError, match="o_proj.weight_absmax has NaN"):
        attempt(lambda s: s[name].fill_(math.nan))
    with pytest.raises((ValueError, RuntimeError), match="mismatch|o_proj"):
        attempt(lambda s: s.update({name: s[name][:-3].clone()}))
    attempt(lambda s: None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["scheme"] = "nf3"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="scheme must be one of"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_bad_input_changes_nothing(folder):
    model = load(folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for call, error, words in (
        (
            lambda: quantize(model, "int5"),
            ValueError,
            "scheme must be one of int8, llm_int8, int4, int3, int2, nf4, fp4",
        ),
        (lambda: quantize(model, "nf4", group_size=100), ValueError, "group_size must be one of"),
        (lambda: quantize(model, "int4", double_quant=True), ValueError, "double_quant goes with nf4 and fp4"),
        (lambda: quantize(model, "nf4", symmetric=False), ValueError, "symmetric=False goes with"),
        (lambda: quantize(model, "nf4", skip=["no_such"]), ValueError, "no_such"),
        (lambda: quantize(nn.Sequential(nn.Embedding(3, 4), nn.ReLU())), ValueError, "no linear layers"),
        (lambda: quantize("model"), TypeError, "str"),  # type: ignore[type-var]
        (lambda: quantize(nn.Sequential(nn.Linear(4, 4).double())), TypeError, "float64"),
        (lambda: quantize(empty_model(LlamaConfig(**CONFIG))), ValueError, "meta"),
    ):
        with pytest.raises(error, match=words):
            call()
    last = model.model.layers[-1].mlp.down_proj
    last.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.weight has 1 NaN or Inf"):
        quantize(model, progress=False)
    last.weight.data[0, 0] = before["model.layers.1.mlp.down_proj.weight"][0, 0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    quantize(model, progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model)
    with pytest.raises(ValueError, match="quantized already"):
        memory_footprint(model, "nf4")


def test_skip_and_shared_modules(folder):
    model = quantize(load(folder), "int8", skip=["o_proj", "model.layers.0.mlp.up_proj"], progress=False)
    kinds = {n: type(m) for n, m in model.named_modules() if n.endswith("proj")}
    assert kinds["model.layers.1.self_attn.o_proj"] is nn.Linear
    assert kinds["model.layers.0.mlp.up_proj"] is nn.Linear
    assert kinds["model.layers.1.mlp.up_proj"] is QuantizedLinear
    shared = nn.Linear(64, 64)
    both = quantize(nn.Sequential(shared, nn.ReLU(), shared), "nf4", progress=False)
    assert both[0] is both[2]
    assert isinstance(both[0], QuantizedLinear)


def test_footprint_of_large_models():
    mistral = MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    assert round(memory_footprint(mistral) / 1e9, 2) == 14.48
    assert round(memory_footprint(mistral, "nf4", double_quant=True) / 1e9, 2) == 4.13


@pytest.mark.slow
def test_one_full_mistral_layer():
    """Random weights of one layer at full size: computed from shapes equals allocated."""
    config = MistralConfig(
        vocab_size=64, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    model = empty_model(config).to_empty(device="cpu")
    for p in model.parameters():
        p.data.uniform_(-0.02, 0.02)
    want = memory_footprint(config, "nf4", double_quant=True)
    assert memory_footprint(config) == allocated_bytes(model)
    quantize(model, "nf4", double_quant=True, progress=False)
    assert allocated_bytes(model) == want


def test_never_more_than_a_slab_is_restored():
    layer = QuantizedLinear.from_linear(nn.Linear(2048, 4096, bias=False), SCHEMES["nf4"])
    slabs = [slab.numel() for _, slab in layer.quantized.slabs()]
    assert sum(slabs) == 2048 * 4096
    assert max(slabs) <= 1 << 20


class Letters:
    """A tokenizer of one token per letter."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": torch.tensor([[ord(c) % 256 for c in text]])})


def test_perplexity_and_divergence_against_float64(folder):
    model, text = load(folder), "the quick brown fox jumps over the lazy dog; " * 3
    ids = Letters()(text).input_ids[0]
    losses = []
    for piece in ids.split(32):
        out = model(piece[None]).logits[0].double().log_softmax(-1)
        losses += [-out[i, piece[i + 1]].item() for i in range(len(piece) - 1)]
    p = perplexity(model, Letters(), text, window=32)
    assert p.tokens == len(losses)
    assert math.isclose(p.value, math.exp(sum(losses) / len(losses)), rel_tol=1e-5)
    assert 0 < p.stderr < p.value
    same = kl_divergence(model, model, Letters(), text, window=32)
    assert (same.value, same.top1) == (0, 1)
    nf4 = kl_divergence(model, quantize(load(folder), "nf4", progress=False), Letters(), text, window=32)
    int8 = kl_divergence(model, quantize(load(folder), "int8", progress=False), Letters(), text, window=32)
    assert 0 < int8.value < nf4.value
    reference = Reference(model, Letters(), text, window=32)
    assert reference.perplexity.value == pytest.approx(p.value, rel=1e-6)
    found, agreement = reference.compare(quantize(load(folder), "nf4", progress=False))
    assert agreement == nf4
    assert found.windows != reference.perplexity.windows
    assert found == perplexity(quantize(load(folder), "nf4", progress=False), Letters(), text, window=32)
    with pytest.raises(ValueError, match="2 are needed"):
        perplexity(model, Letters(), "a")
    with pytest.raises(ValueError, match="window"):
        perplexity(model, Letters(), text, window=1)


def test_a_design_of_the_workshop_is_judged_and_the_model_stays_as_it_is(folder):
    model = load(folder)
    before = copy.deepcopy(model.state_dict())
    reference = Reference(model, Letters(), "the quick brown fox jumps over the lazy dog; " * 3, window=32)
    own_scales = Design("a scale each", (*range(-8, 0), *range(1, 9)), 1, "float32").judge(reference)
    assert own_scales.value < 1e-6 < DESIGNS["MXFP4"].judge(reference).value
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
