"""Model families run as they are: rotary variants, biases, norms on queries, sliding windows, soft caps."""

import pytest
import torch
import transformers

from optinfer.serving import Engine, SamplingParams
from tests.serving import conftest

SHAPE = {**conftest.SHAPE, "num_hidden_layers": 3}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama_mha_bias": ("LlamaConfig", {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_sliding": ("MistralConfig", {"sliding_window": 9}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 9, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 9, "query_pre_attn_scalar": 8}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, build_model, hf_generate):
    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**{**SHAPE, **changes})
    model = build_model(config, seed=1)
    prompts = [torch.randint(3, 97, (n,)).tolist() for n in (1, 5, 17, 30, 41)]
    prompts.append([*prompts[-1][:24], 7, 8])  # a prefix hit
    expected = [hf_generate(model, p, 10) for p in prompts]
    engine = Engine(model, num_blocks=40, block_size=4, max_batched_tokens=24, draft="prompt_lookup")
    done = engine.generate(prompts, SamplingParams(max_tokens=10))
    assert [c.token_ids for c in done] == expected
    assert engine.manager.num_free_blocks == 40


def test_a_model_outside_the_attention_interface_is_refused(build_model):
    model = build_model(transformers.LlamaConfig(**SHAPE))
    model._supports_attention_backend = False
    with pytest.raises(ValueError, match="attention"):
        Engine(model, num_blocks=4)


def test_merging_changes_no_result(build_model):
    from optinfer.serving.fuse import merge

    model = build_model(transformers.Qwen2Config(**SHAPE))
    ids = torch.randint(3, 97, (2, 9))
    before, names = model(ids).logits, [name for name, _ in model.named_parameters()]
    attention = model.model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    weight, bias = merge(layers)
    again, _ = merge(layers)
    assert again.data_ptr() == weight.data_ptr() and again.shape == weight.shape
    assert torch.equal(weight, torch.cat([layer.weight for layer in layers]))
    assert torch.equal(bias, torch.cat([layer.bias for layer in layers]))
    torch.testing.assert_close(model(ids).logits, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    with torch.no_grad():
        attention.k_proj.weight.mul_(2)  # seen through the merged weight
    assert torch.equal(weight[48:64], attention.k_proj.weight)
    assert merge([attention.q_proj, torch.nn.LayerNorm(3)]) is None


def test_quantized_weights(build_model, hf_generate):
    import optinfer

    model = build_model(transformers.LlamaConfig(**{**SHAPE, "hidden_size": 192, "intermediate_size": 128}))
    optinfer.quantize(model, "int8", progress=False)
    prompts = [[5, 6, 7], list(range(20, 50))]
    expected = [hf_generate(model, p, 8) for p in prompts]
    done = Engine(model, num_blocks=20).generate(prompts, SamplingParams(max_tokens=8))
    assert [c.token_ids for c in done] == expected
