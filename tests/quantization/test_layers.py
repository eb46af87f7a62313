"""Which layers are quantized: by kind of layer, by name, and by watching who reads weights."""

import copy
import fnmatch

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optinfer.quantization import OptinferConfig, QuantizedLinear, memory_footprint, quantize, save_checkpoint
from optinfer.quantization.layers import recorded, select_layers

TINY = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def build(name, auto=transformers.AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    model = auto.from_config(getattr(transformers, name)(**{**TINY, **changes})).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    return model


def kinds(model):
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, QuantizedLinear))}


class Special(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Reader(transformers.PreTrainedModel):
    """Four linear layers: of two somebody else reads the weight or its dtype."""

    config_class = transformers.LlamaConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 64)
        self.plain, self.read, self.cast, self.special = (
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            Special(64, 64),
        )
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **_):
        x = self.plain(self.embed(input_ids))
        x = x @ self.read.weight.T
        x = self.special(self.cast(x.to(self.cast.weight.dtype)))
        return self.attention(x, x, x)[0]


class Expert(nn.Module):
    """As T5's and Switch Transformers' dense layers: the second one's dtype is asked for."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.wo(self.wi(x).to(self.wo.weight.dtype))


class Experts(transformers.PreTrainedModel):
    """Token 100 and above go to the second expert, and the short input has none of them."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(128, 64)
        self.experts = nn.ModuleDict({"low": Expert(), "high": Expert()})
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        high = input_ids >= 100
        out = torch.empty_like(x)
        for mask, name in ((high, "high"), (~high, "low")):
            if mask.any():
                out[mask] = self.experts[name](x[mask])
        return out


def test_what_is_read_of_one_expert_is_read_of_those_that_no_token_reached():
    model = Experts(transformers.LlamaConfig(**TINY | {"vocab_size": 128}))
    ids = torch.arange(96, 112)[None]
    before = model(ids)
    selection = select_layers(model)
    assert set(selection.layers) == {"experts.low.wi", "experts.high.wi"}
    assert selection.left["experts.high.wo"] == "other code reads its weight"
    quantize(model, "nf4", progress=False)
    assert (model(ids) - before).norm() < 0.2 * before.norm()


def test_layers_whose_weight_others_read_are_left_and_named():
    model = Reader(transformers.LlamaConfig(**TINY))
    before = model(IDS)
    selection = select_layers(model)
    assert list(selection.layers) == ["plain"]
    assert selection.left["read"] == selection.left["cast"] == "other code reads its weight"
    assert selection.left["special"] == "a Special, not a plain linear layer"
    assert "NonDynamicallyQuantizableLinear" in selection.left["attention.out_proj"]
    assert all(type(m) is not nn.Linear or m.weight.requires_grad for m in model.modules())  # as it was
    quantize(model, "int8", progress=False)
    assert (model(IDS) - before).norm() < 0.02 * before.norm()


def test_without_watching_it_would_be_garbage():
    """The test can fail: the rules alone choose layers whose weight is read."""
    model = Reader(transformers.LlamaConfig(**TINY))
    assert "read" in select_layers(model, watch=False).layers


class Secret(Reader):
    """Reads a weight, or asks for a layer's kind, where watching does not see it."""

    how = "parameters"

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        if self.how == "parameters":
            return self.cast(torch.nn.functional.linear(x, *self.plain.parameters()))
        if self.how == "dtype":
            return self.plain(x * (next(self.plain.parameters()).dtype == torch.float32))
        return self.plain(x) if isinstance(self.plain, nn.Linear) else x


@pytest.mark.parametrize("how", ["parameters", "dtype", "kind"])
def test_a_model_that_would_compute_garbage_is_refused_and_unchanged(how):
    torch.manual_seed(0)
    model = Secret(transformers.LlamaConfig(**TINY)).train()
    model.how = how
    before, state = model(IDS), copy.deepcopy(model.state_dict())
    draws, kinds_before = torch.get_rng_state(), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="once its linear layers are exchanged"):
        quantize(model, "int8", progress=False)
    assert torch.equal(draws, torch.get_rng_state()) and all(m.training for m in model.modules())
    assert [type(m) for m in model.modules()] == kinds_before
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(IDS), before)
    quantize(model, "int8", skip="plain", progress=False)  # what the message advises
    assert torch.allclose(model(IDS), before, atol=0.1 * before.abs().max().item())


def test_dropout_and_hooked_layers_do_not_disturb_the_trial():
    model = build("LlamaConfig", attention_dropout=0.5).train()
    layer = model.model.layers[0].mlp.up_proj
    usual = layer.forward
    layer.forward = lambda x: usual(x)  # as accelerate hooks a layer
    selection = select_layers(model)
    assert len(selection.layers) == 14 and "model.layers.0.mlp.up_proj" in selection.layers


def test_what_the_model_keeps_in_float32():
    model = build(
        "T5Config", transformers.AutoModelForSeq2SeqLM, d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4
    )
    selection = select_layers(model)
    assert selection.layers and not any(name.endswith(".wo") for name in selection.layers)
    assert {why for name, why in selection.left.items() if name.endswith(".wo")} == {"the model keeps it in float32"}


@pytest.mark.parametrize(
    "auto", [transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification]
)
def test_heads_of_tasks(auto, tmp_path):
    model = build("Qwen2Config", auto)
    before = model(IDS).logits
    quantize(model, "int8", progress=False)
    assert type(model.score) is nn.Linear
    assert (model(IDS).logits - before).norm() < 0.1 * before.norm()
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    alone = transformers.AutoModel.from_pretrained(tmp_path)  # the same folder without its head
    assert {type(m) for n, m in alone.named_modules() if n.endswith("_proj")} == {QuantizedLinear}


def test_adapters_stay_and_their_layers_are_quantized():
    class Adapted(nn.Module):
        adapter_layer_names = ("lora_A", "lora_B")

        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})

        def forward(self, x):
            x = x.to(self.lora_A["default"].weight.dtype)
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    model = build("LlamaConfig")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    before = model(IDS).logits
    quantize(model, "int8", progress=False)
    assert type(attention.q_proj.base_layer) is QuantizedLinear
    assert (
        type(attention.q_proj.lora_A["default"]) is nn.Linear and type(attention.q_proj.lora_B["default"]) is nn.Linear
    )
    assert (model(IDS).logits - before).norm() < 0.1 * before.norm()


# ---------------------------------------------------------------------------------------------- skip


@pytest.mark.parametrize(("skip", "left"), [
    ("k_proj", "*k_proj"),
    (["model.layers.0"], "model.layers.0.*"),
    (["mlp"], "*.mlp.*"),
    (["layers.1.self_attn"], "model.layers.1.self_attn.*"),
    (["*.layers.[1-9].mlp.*_proj"], "model.layers.1.mlp.*"),
    (["model.layers.?.self_attn"], "*.self_attn.*"),
    (["model.layers.0.mlp.up_proj", "v_proj"], None),
])  # fmt: skip
def test_skip_by_name_component_container_and_pattern(skip, left, tmp_path):
    model = quantize(build("LlamaConfig"), "int4", group_size=32, skip=skip, progress=False)
    for name, kind in kinds(model).items():
        if left is None:
            kept = name == "model.layers.0.mlp.up_proj" or name.endswith(".v_proj")
        else:
            kept = fnmatch.fnmatchcase(name, left)
        assert (kind is nn.Linear) == (kept or name == "lm_head"), name
    config = model.config.quantization_config
    assert sorted(config.modules_to_not_convert) == sorted(n for n, kind in kinds(model).items() if kind is nn.Linear)
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert kinds(again) == kinds(model) and torch.equal(again(IDS).logits, model(IDS).logits)


def test_skip_on_load_is_recorded_in_full(tmp_path):
    build("LlamaConfig").save_pretrained(tmp_path / "plain")
    config = OptinferConfig("int8", modules_to_not_convert=["mlp"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert "model.layers.1.mlp.up_proj" in model.config.quantization_config.modules_to_not_convert
    model.save_pretrained(tmp_path / "ours")
    assert kinds(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) == kinds(model)


@pytest.mark.parametrize(
    "skip", [["nobody"], "nobody", ["k_proj", "model.layers.7"], ["*.kproj"], [3], ["layers.0.mlp.up"]]
)
def test_a_pattern_that_matches_nothing_is_an_error(skip):
    model = build("LlamaConfig")
    with pytest.raises(ValueError, match="skip"):
        quantize(model, "int8", skip=skip, progress=False)
    assert QuantizedLinear not in kinds(model).values()


NAMES = st.lists(st.sampled_from(["model", "layers", "0", "1", "mlp", "gate", "up"]), min_size=1, max_size=4).map(
    ".".join
)


@given(st.sets(NAMES, max_size=6), st.sets(NAMES, max_size=4))
def test_recorded_names_are_found_with_and_without_a_prefix(names, left):
    found = recorded(names, left)
    assert found <= names and names & left <= found
    assert recorded({f"model.{n}" for n in names}, {f"model.{n}" for n in names}) == {f"model.{n}" for n in names}
    if names:
        one = min(names)
        assert f"wrapped.{one}" in recorded({f"wrapped.{one}"}, {one}) and one in recorded({one}, {f"wrapped.{one}"})


# ---------------------------------------------------------------------------------------------- experts, offloading, export


def test_stacks_of_an_unknown_kind_are_refused_with_their_share_or_skipped_by_name():
    class Mixture(Reader):
        def __init__(self, config):
            super().__init__(config)
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.randn(4, 64, 64))

    model = Mixture(transformers.LlamaConfig(**TINY))
    before = copy.deepcopy(model.state_dict())
    share = sum(p.numel() for n, p in model.named_parameters() if "experts." in n) / sum(
        p.numel() for p in model.parameters()
    )
    for call in (lambda: quantize(model, "int8", progress=False), lambda: memory_footprint(model, "int8")):
        with pytest.raises(ValueError, match=f"holds {share:.0%} of its weights in stacks.*gate_up_proj"):
            call()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    expected = model(IDS)
    quantize(model, "int8", skip=["experts"], progress=False)
    assert QuantizedLinear in kinds(model).values()
    assert (model(IDS) - expected).norm() < 0.1 * expected.norm()


def test_offloaded_layers_are_named(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = build("LlamaConfig")
    model.save_pretrained(tmp_path / "plain")
    offloaded = accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match="is offloaded by accelerate"):
        quantize(offloaded, "int8", progress=False)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_values_beyond_float16_are_refused_before_anything_is_written(format, tmp_path):
    model = build("Qwen2Config", intermediate_size=128)
    model.model.layers[0].self_attn.q_proj.bias.data[3] = 1e5
    quantize(model, "int4", group_size=32, symmetric=False, progress=False)
    with pytest.raises(ValueError, match=r"q_proj.bias reaches 1e\+05, beyond float16"):
        save_checkpoint(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_skipped_layers_are_in_the_files_of_gptq(tmp_path):
    import json

    model = quantize(build("LlamaConfig"), "int4", group_size=32, skip=["k_proj"], progress=False)
    config = json.loads((save_checkpoint(model, tmp_path / "out", "gptq") / "config.json").read_text())
    assert set(config["quantization_config"]["dynamic"]) == {
        rf"-:^model\.layers\.{i}\.self_attn\.k_proj$" for i in (0, 1)
    }


def test_layers_that_a_reader_does_not_find_are_not_exported(tmp_path):
    model = quantize(build("GPT2Config", n_embd=64, n_layer=2, n_head=4), "int4", group_size=32, progress=False)
    with pytest.raises(ValueError, match="is a Conv1D in GPT2LMHeadModel"):
        save_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_gradients_through_int8_activations():
    """Straight through: the gradient of the product with the restored weight, though activations were rounded."""
    layer = quantize(build("LlamaConfig"), "llm_int8", progress=False).model.layers[0].mlp.up_proj
    x = torch.randn(2, 7, 64)
    x[0, 0, 3] = 20.0  # an outlier
    weight, upstream = layer.quantized.dequantize(), torch.randn(2, 7, 96)
    x.requires_grad_(True)
    with torch.no_grad():
        expected = layer(x)
    out = layer(x)
    assert torch.equal(out, expected)
    (out * upstream).sum().backward()
    assert torch.cosine_similarity(x.grad.flatten(), (upstream @ weight).flatten(), dim=0) > 0.9999


def test_a_summary_says_what_was_done(capsys):
    quantize(build("LlamaConfig"), "int8", skip=["v_proj"])
    said = capsys.readouterr().out
    assert said.startswith("int8: 12 linear layers, ") and "2: skip (model.layers.0.self_attn.v_proj, …)" in said
    assert "1: the output head (lm_head)" in said


@pytest.mark.parametrize("scheme", ["int8", "llm_int8", "int4", "nf4", "nvfp4"])
def test_another_dtype_after_quantizing(scheme, tmp_path):
    model = quantize(build("LlamaConfig").bfloat16(), scheme, progress=False)
    before = model(IDS).logits.float()
    after = model.to(torch.float16)(IDS).logits
    assert after.dtype == torch.float16 and (after.float() - before).norm() < 0.05 * before.norm()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again(IDS).logits.float() - before).norm() < 0.05 * before.norm()
