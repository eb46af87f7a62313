"""What layers keep, against the caches that transformers allocates: same layers, same bytes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, cache_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from optinfer.kv_cache import cache_layers, kv_bytes, kv_bytes_per_token
from optinfer.kv_cache.memory import kv_shape

CLASSES = {
    "full": "DynamicLayer",
    "latent": "DynamicLayer",
    "sliding": "DynamicSlidingWindowLayer",
    "chunked": "DynamicSlidingWindowLayer",
    "linear": "LinearAttentionLayer",
    "shared": "DummyLayer",
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
TINY = {
    "DeepseekV3Config": EXPERTS
    | LATENT
    | {
        "num_hidden_layers": 3,
        "q_lora_rank": 10,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Qwen3NextConfig": EXPERTS
    | {
        "num_hidden_layers": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 8,
        "shared_expert_intermediate_size": 16,
    },
    "Gemma3TextConfig": {"num_hidden_layers": 7, "sliding_window": 8},
    "GptOssConfig": {"num_hidden_layers": 4, "sliding_window": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Llama4TextConfig": {
        "num_hidden_layers": 4,
        "attention_chunk_size": 8,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
    },
    "KimiLinearConfig": EXPERTS
    | LATENT
    | {"num_hidden_layers": 5, "num_local_experts": 8, "linear_head_dim": 8, "linear_num_heads": 4},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "sliding_window": 8,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
    },
    "MistralConfig": {"num_hidden_layers": 2, "sliding_window": 8},
    "LlamaConfig": {"num_hidden_layers": 2},
}


def tiny(name: str) -> Any:
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    return getattr(transformers, name)(**(SIZES | TINY[name]))


def weigh(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds."""
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            held = getattr(layer, name, None)
            tensors = held.values() if isinstance(held, dict) else [held]
            total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    return total


@pytest.mark.parametrize("name", TINY)
def test_bytes_are_those_that_transformers_allocates(name: str) -> None:
    config = tiny(name)
    layers = cache_layers(config)
    if any(layer.kind == "linear" for layer in layers) and not hasattr(cache_utils, "LinearAttentionLayer"):
        pytest.skip("this transformers keeps the states of linear layers elsewhere")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = DynamicCache(config=config)
    tokens = torch.randint(3, 60, (1, 21))
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 20), (20, 21)):
            model(tokens[:, start:end], past_key_values=cache)
            # Between steps transformers keeps room for the next token: of a full window, one token less.
            waiting = sum(layer.bytes_per_token() for layer in layers if layer.window and end >= layer.window)
            if any(layer.kind == "latent" for layer in layers) and cache.layers[-1].keys.shape[1] > 1:
                pytest.skip("this transformers keeps the expanded keys and values")
            assert weigh(cache) == sum(kv_bytes(config, end).values()) - waiting


def test_kinds_are_told_apart() -> None:
    count = {name: kv_bytes(tiny(name), 10) for name in TINY if hasattr(transformers, name)}
    assert set(count["Gemma3TextConfig"]) == {"sliding", "full"} and set(count["DeepseekV3Config"]) == {"latent"}
    assert set(count["Llama4TextConfig"]) == {"chunked", "full"} and set(count["Qwen3NextConfig"]) == {"linear", "full"}
    assert count["Gemma3nTextConfig"]["shared"] == 0


@pytest.mark.parametrize(
    ("name", "per_token"),
    [("DeepseekV3Config", 61 * (512 + 64) * 2), ("Qwen3NextConfig", 12 * 2 * 2 * 256 * 2), ("KimiLinearConfig", 7 * 576 * 2)],
)  # fmt: skip
def test_published_configurations(name: str, per_token: int) -> None:
    config = getattr(transformers, name, None)
    if config is None:
        pytest.skip(f"this transformers has no {name}")
    layers = {"layer_types": ["full_attention" if i % 4 == 3 or i == 26 else "linear_attention" for i in range(27)]}
    assert kv_bytes_per_token(config(**(layers if name == "KimiLinearConfig" else {}))) == per_token


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.sampled_from([n for n in TINY if hasattr(transformers, n)]))
def test_the_next_token_adds_what_the_sum_grows_by(length: int, name: str) -> None:
    config = tiny(name)
    grown = sum(kv_bytes(config, length + 1).values()) - sum(kv_bytes(config, length).values())
    assert kv_bytes_per_token(config, length=length) == grown


def test_unknown_kinds_are_refused_by_name() -> None:
    base = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    with pytest.raises(ValueError, match="'conv'; known are full_attention"):
        kv_bytes(SimpleNamespace(**base, layer_types=["full_attention", "conv"]))
    with pytest.raises(ValueError, match="index_head_dim"):
        kv_bytes(SimpleNamespace(**base, index_head_dim=128))
    with pytest.raises(ValueError, match="state is not known"):
        kv_bytes(SimpleNamespace(**base, layer_types=["linear_attention"] * 2))
    with pytest.raises(ValueError, match="layers of kind 'latent'"):
        kv_shape(tiny("DeepseekV3Config"))


def weigh_against_transformers(name: str) -> bool | None:
    """Whether our count is the weight of the cache of a whole model of its default configuration, run without memory (on the
    meta device); None: we refuse it, or transformers cannot run it there."""
    try:
        config = CONFIG_MAPPING[name]().get_text_config()
        layers = cache_layers(config)
        if any(layer.kind == "linear" for layer in layers) and not hasattr(cache_utils, "LinearAttentionLayer"):
            return None
    except Exception:  # configurations without defaults, and what we refuse
        return None
    try:
        cache = DynamicCache(config=config)
        with torch.no_grad(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            model(torch.zeros(1, 9, dtype=torch.long), past_key_values=cache)
    except Exception:  # some models look into their tensors
        return None
    if [type(layer).__name__ for layer in cache.layers] != [CLASSES[layer.kind] for layer in layers]:
        return False
    return weigh(cache) == sum(layer.nbytes(9) for layer in layers)


def test_some_families_weighed() -> None:
    for name in ("llama", "qwen3", "falcon", "gpt2", "gpt_bigcode", "olmoe", "cohere2", "qwen3_next"):
        assert weigh_against_transformers(name) is not False, name


@pytest.mark.slow
def test_every_family_is_right_or_refused() -> None:
    found = {name: weigh_against_transformers(name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    assert [name for name, right in found.items() if right is False] == []
    assert sum(right is True for right in found.values()) > 80
