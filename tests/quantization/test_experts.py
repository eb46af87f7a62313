"""Experts in stacks: each matrix is quantized as if it stood alone, in every scheme, whichever way it lies."""

import copy

import pytest
import torch
import transformers
from torch import nn

from optinfer.quantization import (
    SCHEMES,
    OptinferConfig,
    QuantizedLinear,
    gptq,
    memory_footprint,
    quantize,
    save_bitsandbytes,
    save_checkpoint,
)
from optinfer.quantization.experts import QuantizedExperts, expert_stacks, quantized_experts, restore_experts
from optinfer.quantization.footprint import allocated_bytes, empty_model
from optinfer.quantization.layers import select_layers
from optinfer.quantization.schemes import resolve_scheme

IDS = torch.tensor([[5, 6, 7, 8, 9, 11, 12, 2]])
SIZES = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = ("MixtralConfig", "Qwen3MoeConfig", "GptOssConfig", "Llama4TextConfig", "JetMoeConfig")
TRANSPOSED = ("GptOssConfig", "Llama4TextConfig")
VARIANTS = [(name, {}) for name in SCHEMES] + [
    ("nf4", {"double_quant": True}),
    ("int4", {"symmetric": False, "group_size": 24}),
]


def build(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, family)(**SIZES))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize(("family", "scheme", "options"), [
    *((FAMILIES[i % len(FAMILIES)], *variant) for i, variant in enumerate(VARIANTS)),
    *((family, "int4", {}) for family in FAMILIES),
])  # fmt: skip
def test_each_matrix_is_quantized_as_if_alone(family, scheme, options):
    model = build(family)
    original = copy.deepcopy(model)
    want = memory_footprint(model, scheme, **options)
    quantize(model, scheme, progress=False, **options)
    assert allocated_bytes(model) == want
    stacks = dict(quantized_experts(model))
    assert stacks.keys() == expert_stacks(original).keys() and len(stacks) == (8 if family == "JetMoeConfig" else 4)
    alone = resolve_scheme(scheme, **options)
    for name, experts in stacks.items():
        own = original.get_parameter(name)
        for i in range(4):
            matrix = own[i].T.contiguous() if family in TRANSPOSED else own[i]
            layer = alone.quantize(matrix.detach()).dequantize()
            assert torch.equal(experts[i], layer.T if family in TRANSPOSED else layer)
        own.data = experts.dequantize()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            original.get_submodule(name).weight.data = layer.quantized.dequantize()
    if scheme == "llm_int8":  # its linear layers round activations too
        assert (logits(model) - logits(original)).norm() < 0.1 * logits(original).norm()
    else:
        torch.testing.assert_close(logits(model), logits(original), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "scheme", "skip"), [
    ("MixtralConfig", "nf4", ()), ("Qwen3MoeConfig", "int8", ("layers.0.mlp",)), ("GptOssConfig", "int4", ("*.self_attn",)),
    ("Llama4TextConfig", "nf4", ()), ("JetMoeConfig", "fp8", ()),
])  # fmt: skip
def test_saved_reloaded_and_quantized_on_load_are_one(family, scheme, skip, tmp_path):
    build(family).save_pretrained(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    quantize(model, scheme, skip=skip, progress=False)
    stacks = 8 if family == "JetMoeConfig" else 4
    assert len(list(quantized_experts(model))) == (2 if skip == ("layers.0.mlp",) else stacks)
    model.save_pretrained(tmp_path / "ours")
    config = OptinferConfig(scheme, modules_to_not_convert=list(skip) or None)
    on_load = type(model).from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config)
    on_load.save_pretrained(tmp_path / "on load")
    for path in ("ours", "on load"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / path)
        assert torch.equal(logits(again), logits(model))
        assert {n: type(m) for n, m in again.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert torch.equal(logits(on_load), logits(model))


def test_what_asks_for_a_whole_stack_is_told(tmp_path):
    experts = quantize(build("Llama4TextConfig"), "int8", progress=False).model.layers[0].feed_forward.experts.down_proj
    x = torch.randn(4, 3, experts.in_features)
    assert torch.equal(torch.bmm(x, experts), torch.stack([x[i] @ experts[i] for i in range(4)]))
    with pytest.raises(TypeError):
        torch.matmul(x, experts)


def test_a_missing_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    quantize(build("MixtralConfig"), "nf4", progress=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj.weight_absmax"
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is missing"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_copies_other_dtypes_gradients_and_back():
    model = quantize(build("GptOssConfig"), "int4", group_size=32, progress=False)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    owner = twin.model.layers[0].mlp.experts
    assert owner.forward.__self__ is owner  # the copy computes with its own experts
    for _, experts in quantized_experts(twin):
        experts.weight.data.zero_()
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)
    before = {n: p.dtype for n, p in model.named_parameters() if "_proj.weight" in n}
    half = copy.deepcopy(model)
    nn.Module.to(half, torch.bfloat16)
    assert {n: p.dtype for n, p in half.named_parameters() if "_proj.weight" in n} == before
    x = torch.randn(3, 64, requires_grad=True)
    picked = torch.tensor([[0, 1], [2, 3], [1, 2]])
    experts = model.model.layers[0].mlp.experts
    experts(x, picked, torch.full((3, 2), 0.5)).sum().backward()
    assert x.grad.abs().min() > 0
    restore_experts(model)
    assert not list(quantized_experts(model)) and "forward" not in vars(experts)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_the_trial_sees_owners_that_read_the_whole_stack():
    model = build("MixtralConfig")
    kind = type(model.model.layers[0].mlp.experts)

    def whole(self, x, *_):
        return x @ self.gate_up_proj.sum(0)[:64].T

    usual = kind.forward
    state, order = copy.deepcopy(model.state_dict()), [n for n, _ in model.named_parameters()]
    try:
        kind.forward = lambda self, *args: whole(self, *args)
        kind.forward.__wrapped__ = whole
        with pytest.raises(ValueError, match="does not run once its linear layers"):
            select_layers(model)
    finally:
        kind.forward = usual
    assert order == [n for n, _ in model.named_parameters()]
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all("forward" not in vars(m) for m in model.modules())


class Tokens:
    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [5] * 4000}


def test_what_does_not_reach_experts_says_so_and_changes_nothing(tmp_path):
    model = build("MixtralConfig")
    with pytest.raises(ValueError, match=r"stacks of experts .*gate_up_proj.*calibration does not reach"):
        gptq(model, Tokens(), "text", length=64)
    quantize(model, "nf4", progress=False)
    for call in (
        lambda: save_checkpoint(model, tmp_path / "a"),
        lambda: save_checkpoint(model, tmp_path / "b", "bitsandbytes"),
        lambda: save_bitsandbytes(model, tmp_path / "c"),
    ):
        with pytest.raises(ValueError, match="is a stack of quantized experts"):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model, "nf4")


def test_weights_that_are_not_numbers_are_named():
    model = build("Qwen3MoeConfig")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj has 1 NaN"):
        quantize(model, "int8", progress=False)
    assert not any(isinstance(m, (QuantizedLinear, QuantizedExperts)) for m in model.modules())


def test_footprint_of_a_large_mixture():
    """Mixtral-8x7B: 46.7 billion weights, of which 45.1 are experts'."""
    config = transformers.MixtralConfig(tie_word_embeddings=False)
    experts = sum(p.numel() for p in expert_stacks(empty_model(config)).values())
    assert round(experts / 1e9, 1) == 45.1
    whole, skipped = memory_footprint(config, "nf4"), memory_footprint(config, "nf4", skip="experts")
    assert skipped - whole == experts * 2 - experts // 2 - experts // 64 * 4
