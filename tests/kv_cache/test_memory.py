"""Bytes per token against published sizes, and against what another engine reports."""

from types import SimpleNamespace

import pytest
import torch

from optinfer.kv_cache import kv_bytes_per_token, num_blocks_for, num_sequences_that_fit


def shape(layers, heads, kv_heads, head_dim):
    return SimpleNamespace(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )


SMOLLM2 = shape(30, 9, 3, 64)


@pytest.mark.parametrize(
    ("config", "kib"),
    [
        (shape(32, 32, 32, 128), 512),  # Llama-2-7B
        (shape(40, 40, 40, 128), 800),  # Llama-2-13B, OPT-13B
        (shape(32, 32, 8, 128), 128),  # Mistral-7B, Llama-3-8B: grouped queries
        (shape(80, 64, 8, 128), 320),  # Llama-3-70B
        (shape(28, 16, 8, 128), 112),  # Qwen3-0.6B: head_dim is not hidden_size / heads
        (SMOLLM2, 22.5),
    ],
)
def test_bytes_per_token_of_known_models(config, kib):
    assert kv_bytes_per_token(config, "bfloat16") == kib * 1024
    assert kv_bytes_per_token(config, torch.float32) == 2 * kib * 1024


def test_one_gibibyte_holds_what_vllm_says():
    """vLLM's CPU build, 1 GiB, fp32, this model, blocks of 16: "GPU KV cache size: 23,296 tokens"."""
    assert num_blocks_for(2**30, SMOLLM2, "float32", block_size=16) * 16 == 23_296


def test_fields_may_be_missing_or_named_otherwise():
    multi_head = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
    assert kv_bytes_per_token(multi_head, "float16") == 2 * 2 * 4 * 8 * 2
    from transformers import GPT2Config

    assert kv_bytes_per_token(GPT2Config(), "float16") == 2 * 12 * 768 * 2


def test_int8_counts_its_scales():
    assert kv_bytes_per_token(SMOLLM2, "int8") == 2 * 30 * 3 * (64 + 4)


def test_requests_are_rounded_up_to_whole_blocks():
    per_block = 16 * kv_bytes_per_token(SMOLLM2)
    assert num_sequences_that_fit(10 * per_block, SMOLLM2, tokens=17) == 5
    assert num_sequences_that_fit(10 * per_block - 1, SMOLLM2, tokens=16) == 9
    assert num_sequences_that_fit(0, SMOLLM2, tokens=16) == 0


def test_bad_arguments_are_refused():
    for call, message in [
        (lambda: kv_bytes_per_token(SMOLLM2, "int3"), "dtype must be one of"),
        (lambda: kv_bytes_per_token(SimpleNamespace(), "int8"), "config does not describe"),
        (lambda: num_blocks_for(-1, SMOLLM2), "memory_bytes"),
        (lambda: num_blocks_for(1, SMOLLM2, block_size=0), "block_size"),
        (lambda: num_sequences_that_fit(1, SMOLLM2, tokens=0), "tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
