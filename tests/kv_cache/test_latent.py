"""Latent attention: both orders agree in float64, and both agree with DeepSeek-V3's own layer."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as library

from optinfer.kv_cache import absorbed_latent_attention, expanded_latent_attention


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 20), st.integers(1, 9), st.integers(0, 2**31))
def test_absorbed_equals_expanded(heads: int, queries: int, before: int, rank: int, seed: int) -> None:
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    head_dim, rope_dim, value_dim, length = 6, 4, 5, before + queries
    shapes = [(heads, queries, head_dim), (heads, queries, rope_dim), (length, rank), (length, rope_dim)]
    shapes += [(heads, head_dim, rank), (heads, value_dim, rank)]
    arguments = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    expanded, absorbed = (f(*arguments, 0.3) for f in (expanded_latent_attention, absorbed_latent_attention))
    assert absorbed.shape == (heads, queries, value_dim)
    torch.testing.assert_close(absorbed, expanded, rtol=1e-12, atol=1e-12)
    wrong = absorbed_latent_attention(*arguments[:4], arguments[4] * 1.001, arguments[5], 0.3)
    if rank > 1 and length > 1 and queries < length:
        assert not torch.allclose(wrong, expanded, rtol=1e-12, atol=1e-12)


def test_both_equal_deepseek(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    eager = library.eager_attention_forward

    def watch(module, query, key, value, mask, scaling=None, **kwargs):
        out = eager(module, query, key, value, mask, scaling=scaling, **kwargs)
        seen.update(q=query[0], out=out[0][0].transpose(0, 1), scale=scaling, layer=module)
        return out

    monkeypatch.setattr(library, "eager_attention_forward", watch)
    torch.manual_seed(1)
    config = library.DeepseekV3Config(
        vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48, num_hidden_layers=2,
        kv_lora_rank=12, q_lora_rank=10, qk_rope_head_dim=8, v_head_dim=6, qk_nope_head_dim=10, first_k_dense_replace=2,
        pad_token_id=0,
    )  # fmt: skip
    model = library.DeepseekV3ForCausalLM(config).double().eval()
    model.config._attn_implementation = "eager"
    cache = DynamicCache(config=config)
    tokens = torch.randint(3, 60, (1, 17))
    with torch.no_grad():
        model(tokens[:, :12], past_key_values=cache)
        model(tokens[:, 12:], past_key_values=cache)
    if cache.layers[-1].keys.shape[1] != 1:
        pytest.skip("this transformers keeps the expanded keys and values")
    layer = seen["layer"]
    q, q_rope = seen["q"].split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
    w_k, w_v = layer.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank).split(
        [config.qk_nope_head_dim, config.v_head_dim], 1
    )
    latent, k_rope = cache.layers[-1].keys[0, 0], cache.layers[-1].values[0, 0]
    for attend in (expanded_latent_attention, absorbed_latent_attention):
        ours = attend(q, q_rope, latent, k_rope, w_k, w_v, seen["scale"])
        torch.testing.assert_close(ours, seen["out"], rtol=1e-6, atol=1e-6)  # the library's softmax is in float32
