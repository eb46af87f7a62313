"""Experts in stacks: each matrix is quantized as if it stood alone, in every scheme, whichever way it lies."""

import copy

import pytest
import torch
import transformers
from torch import nn

from optinfer.quantization import (
    SCHEMES,
    CalibrationError,
    CheckpointError,
    OptinferConfig,
    QuantizedLinear,
    awq,
    calibrate,
    gptq,
    memory_footprint,
    qat,
    quantize,
    save_bitsandbytes,
    save_checkpoint,
    smoothquant,
)
from optinfer.quantization.experts import (
    QuantizedExperts,
    expert_stacks,
    quantized_experts,
    restore_experts,
    separate_experts,
)
from optinfer.quantization.footprint import allocated_bytes, empty_model
from optinfer.quantization.layers import select_layers
from optinfer.quantization.methods.awq import fold, scaling_groups
from optinfer.quantization.schemes import resolve_scheme
from tests.quantization.test_calibrate import TEXT, Letters

IDS = torch.tensor([[5, 6, 7, 8, 9, 11, 12, 2]])
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
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


CALIBRATED = ("MixtralConfig", "Qwen3MoeConfig", "GptOssConfig")


def walk(model):
    return calibrate(model, Letters(), TEXT, num_sequences=12, length=48, progress=False)


@torch.no_grad()
def error(model, original):
    """On the text that the model was calibrated on."""
    ids = torch.tensor([Letters()(TEXT)["input_ids"][:400]])
    expected = original(ids).logits
    return float((model(ids).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", CALIBRATED)
@torch.no_grad()
def test_an_experts_statistics_are_of_what_is_routed_to_it(family):
    model = build(family)
    run = walk(model)
    routed = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: routed.append(args[:2]))
    model(run.sequences)
    handle.remove()
    x, chosen = (torch.cat(parts) for parts in zip(*routed, strict=True))
    layer = next(iter(run))
    for i in range(4):
        mine = x[(chosen == i).any(-1)].double()
        statistics = layer.statistics[f"mlp.experts.gate_up_proj.{i}"]
        assert 0 < statistics.tokens == len(mine) < len(x)
        torch.testing.assert_close(statistics.hessian.double(), 2 * mine.T @ mine / len(mine), rtol=1e-3, atol=1e-4)
        assert layer.statistics[f"mlp.experts.down_proj.{i}"].tokens == len(mine)
    separate = layer.module.mlp.experts(x, chosen, torch.full(chosen.shape, 0.5))
    torch.testing.assert_close(separate, experts(x, chosen, torch.full(chosen.shape, 0.5)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*CALIBRATED, "JetMoeConfig", "Llama4TextConfig"])
def test_gptq_of_experts(family, tmp_path):
    original, report = build(family), []
    model = gptq(copy.deepcopy(original), walk(original), bits=4, group_size=32, report=report)
    assert sum(".experts." in row["name"] or "_linear" in row["name"] for row in report) >= 16
    assert all(row["error"] <= row["rtn_error"] for row in report)
    nearest = quantize(copy.deepcopy(original), "int4", group_size=32, progress=False)
    assert error(model, original) < 0.95 * error(nearest, original)
    kinds = {name: type(m) for name, m in model.named_modules()}
    assert kinds == {name: type(m) for name, m in nearest.named_modules()}
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", CALIBRATED)
@torch.no_grad()
def test_a_scale_folded_before_a_mixture_reaches_router_and_experts(family):
    model = build(family)
    expected = logits(model)
    separate_experts(model)
    scaling = scaling_groups(model.model.layers[0])[-1]
    assert len(scaling.linears) == 4 and len(scaling.routers) == 1
    fold(model.model.layers[0], scaling, torch.linspace(0.5, 2, 64))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.model.layers[0].mlp.get_submodule(scaling.routers[0].removeprefix("mlp.")).weight.data.neg_()
    assert (logits(model) - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("family", CALIBRATED)
def test_awq_and_smoothquant_of_experts(family, recwarn):
    original = build(family)
    model = awq(copy.deepcopy(original), walk(original), bits=4, group_size=32, symmetric=True)
    nearest = quantize(copy.deepcopy(original), "int4", group_size=32, progress=False)
    assert error(model, original) < error(nearest, original)
    smooth = smoothquant(copy.deepcopy(original), walk(original))
    assert error(smooth, original) < 0.15
    norms = [x.model.layers[1].post_attention_layernorm.weight for x in (original, smooth)]
    assert not torch.equal(*norms)
    assert len(list(quantized_experts(smooth))) == len(list(quantized_experts(model))) == 4
    assert not [w for w in recwarn if "left unscaled" in str(w.message)]


def test_experts_trained_with_rounded_weights():
    original, losses = build("MixtralConfig"), []
    model = qat(
        copy.deepcopy(original), Letters(), TEXT, group_size=32, steps=8, length=48, progress=False, losses=losses
    )
    assert losses[-1] < losses[0] and len(list(quantized_experts(model))) == 4
    assert error(model, original) < error(quantize(copy.deepcopy(original), "int4", group_size=32, symmetric=False,
                                                   progress=False), original)  # fmt: skip


def test_an_expert_that_nothing_is_routed_to_is_named():
    model = build("GptOssConfig")
    model.model.layers[1].mlp.router.bias.data[2] = -1e4
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"layers.1.mlp.experts.gate_up_proj.2 \(an expert that no token"):
        gptq(model, walk(model), group_size=32)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_experts_computed_in_a_way_that_cannot_be_followed_are_refused():
    model = build("MixtralConfig")
    separate_experts(model)
    with pytest.raises(ValueError, match="experts are computed by torch's einsum"):
        torch.einsum("ni,oi->no", torch.randn(3, 64), model.model.layers[0].mlp.experts.gate_up_proj[0])


def test_gpt_oss_in_its_own_format(tmp_path):
    model = quantize(build("GptOssConfig").bfloat16(), "mxfp4", skip="self_attn", progress=False)
    save_checkpoint(model, tmp_path / "theirs", "mxfp4")
    config = transformers.Mxfp4Config(dequantize=True)  # type: ignore[attr-defined]
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", quantization_config=config, dtype=torch.bfloat16
    )
    for name, experts in quantized_experts(model):
        assert torch.equal(again.get_parameter(name), experts.dequantize())
    torch.testing.assert_close(logits(again), logits(model), rtol=0.05, atol=0.05)
    for wrong, skip, match in (
        (build("GptOssConfig"), (), "expect codes for experts alone"),
        (build("MixtralConfig"), "self_attn", "hold GPT-OSS's experts"),
    ):
        quantize(wrong, "mxfp4", skip=skip, progress=False)
        with pytest.raises(CheckpointError, match=match):
            save_checkpoint(wrong, tmp_path / "wrong", "mxfp4")


def test_formats_without_experts_say_so_and_changes_nothing(tmp_path):
    model = build("MixtralConfig")
    quantize(model, "nf4", progress=False)
    for call in (
        lambda: save_checkpoint(model, tmp_path / "a"),
        lambda: save_checkpoint(model, tmp_path / "b", "bitsandbytes"),
        lambda: save_bitsandbytes(model, tmp_path / "c"),
    ):
        with pytest.raises(ValueError, match="is a stack of quantized experts.* hold 8[0-9]% of the weights"):
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
