"""Caches that keep less: what they store is what they say, masks fit, and the judges tell good from bad."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralForCausalLM

from optinfer.kv_cache.smaller import GROUP, _Codes, find_needle, judge_cache, quantized_kv, sink_cache

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([4, 8]), st.sampled_from([-1, -2]), st.integers(0, 2**31))
def test_a_code_is_within_half_a_step(bits: int, dim: int, seed: int) -> None:
    x = (
        torch.randn(2, 3, 2 * GROUP, 3 * GROUP, generator=torch.Generator(torch.get_default_device()).manual_seed(seed))
        * 5
    )
    codes = _Codes.of(x, bits, dim)
    back = codes.values(dim, torch.float32)
    assert back.shape == x.shape
    groups = x.unflatten(dim, (-1, GROUP))
    spread = groups.amax(dim if dim == -1 else -2) - groups.amin(dim if dim == -1 else -2)
    # Half a step, and what 16-bit scales and the lowest value lose: 2^-8 of the largest number, and of the whole spread.
    allowed = spread / (2**bits - 1) / 2 + spread * 2**-8 + x.abs().max() * 2**-8
    error = (back - x).abs().unflatten(dim, (-1, GROUP)).amax(dim if dim == -1 else -2)
    assert bool((error <= allowed).all())
    assert codes.nbytes == x.numel() * bits // 8 + x.numel() // GROUP * 4


def test_bytes_of_a_quantized_cache(model) -> None:
    for bits in (4, 8):
        cache = quantized_kv(model.config, bits)
        with torch.no_grad():
            model(torch.randint(0, 97, (1, 70)), past_key_values=cache)
            model(torch.randint(0, 97, (1, 1)), past_key_values=cache)
        old, recent = 64, 7
        per_layer = 2 * (old * 32 * bits // 8 + old * 32 // GROUP * 4 + recent * 32 * 4)
        assert cache.nbytes == 2 * per_layer and cache.get_seq_length() == 71


def test_eight_bits_agree_and_four_bits_less(model) -> None:
    tokens = torch.randint(0, 97, (1, 100), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    kl = {
        bits: judge_cache(model, tokens, lambda bits=bits: quantized_kv(model.config, bits), 80).kl for bits in (4, 8)
    }
    assert 0 < kl[8] < kl[4] < 0.01


def test_a_channel_that_is_always_large_wants_a_scale_of_its_own() -> None:
    x = torch.randn(1, 1, 2 * GROUP, 2 * GROUP, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    x[..., 5] += 50
    error = {dim: (_Codes.of(x, 4, dim).values(dim, torch.float32) - x).square().mean() for dim in (-1, -2)}
    assert error[-2] < error[-1] / 10


def test_sinks_and_window_see_what_a_mask_would_show(model) -> None:
    """The cache against the full one with a mask that hides the same tokens, in one layer: deeper layers remember more."""
    config = LlamaConfig(**(CONFIG | {"num_hidden_layers": 1, "attn_implementation": "eager"}))
    torch.manual_seed(1)
    one = LlamaForCausalLM(config).eval()
    tokens, sinks, window, prompt = torch.randint(0, 97, (1, 40)), 3, 8, 20
    cache = sink_cache(config, sinks, window)
    with torch.no_grad():
        one(tokens[:, :prompt], past_key_values=cache)
        assert cache.layers[0].keys.shape[-2] == sinks + window - 1
        ours = [one(tokens[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(prompt, 40)]
        i, j = torch.arange(40)[:, None], torch.arange(40)
        seen = (j <= i) & ((j < sinks) | (j > i - window))
        mask = torch.zeros(1, 1, 40, 40).masked_fill(~seen, torch.finfo(torch.float32).min)
        masked = one(tokens, attention_mask=mask).logits[0]
    torch.testing.assert_close(torch.stack(ours), masked[prompt:], rtol=1e-4, atol=1e-5)


def test_no_sinks_is_a_sliding_window() -> None:
    """A window in every layer, deep ones included: the same tokens as Mistral's own cache."""
    from transformers import MistralConfig

    torch.manual_seed(2)
    model = MistralForCausalLM(MistralConfig(**CONFIG, sliding_window=6)).eval()
    tokens = torch.randint(0, 97, (1, 30))
    caches = DynamicCache(config=model.config), sink_cache(model.config, 0, 6)
    with torch.no_grad():
        for i in range(30):
            ours, theirs = (model(tokens[:, i : i + 1], past_key_values=cache).logits for cache in caches)
            torch.testing.assert_close(ours, theirs)


def test_judges(model) -> None:
    tokens = torch.randint(0, 97, (1, 60), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    same = judge_cache(model, tokens, lambda: DynamicCache(config=model.config), 40)
    assert same.kl == pytest.approx(0, abs=1e-9) and same.top1 == 1 and same.share == 1
    wide, narrow = (judge_cache(model, tokens, lambda w=w: sink_cache(model.config, 1, w), 40) for w in (59, 8))
    assert wide.kl == pytest.approx(0, abs=1e-6) and narrow.kl > 10 * abs(wide.kl) and narrow.share < 0.2
    with torch.no_grad():
        greedy = model.generate(tokens, max_new_tokens=3, do_sample=False)[0, 60:]
    assert find_needle(model, tokens, greedy, lambda: DynamicCache(config=model.config))[0]
    assert not find_needle(model, tokens, (greedy + 1) % 97, lambda: DynamicCache(config=model.config))[0]


def test_refusals(model) -> None:
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        quantized_kv(model.config, 3)
    with pytest.raises(ValueError, match="multiple of 32"):
        quantized_kv(LlamaConfig(**(CONFIG | {"head_dim": 48})))
    with pytest.raises(ValueError, match="window at least 1"):
        sink_cache(model.config, 4, 0)
    with pytest.raises(ValueError, match="leave two tokens"):
        judge_cache(model, torch.zeros(1, 5, dtype=torch.long), lambda: DynamicCache(config=model.config), 4)
