"""The forward pass without modules computes what the modules compute."""

import copy
import gc
import weakref

import pytest
import torch
import transformers

from optinfer.packed import PackedWeight, can_pack
from optinfer.serving import Engine, SamplingParams
from optinfer.serving import lean_decoder as lean
from optinfer.serving.lean_decoder import LeanDecoder, Product
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.paged_batch import Chunk

SHAPE = {
    "vocab_size": 211, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "mistral": ("MistralConfig", {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
}  # fmt: skip
needs_bf16 = pytest.mark.skipif(
    not can_pack(torch.empty(1, 1).bfloat16()), reason="this processor has no bf16 products"
)


def small(build_model, family, **changes):
    name, own = FAMILIES[family]
    return build_model(getattr(transformers, name)(**{**SHAPE, **own, **changes}), seed=4)


def logits(model, lengths, fuse):
    """All logits of prompts of these lengths, packed, in two steps."""
    runner = ModelRunner(model, 40, 8, fuse)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 211, (n,), generator=generator).tolist() for n in lengths]
    tables = [[5 * i + j for j in range(5)] for i in range(len(prompts))]
    out = []
    for half in (0, 1):
        chunks = []
        for prompt, table in zip(prompts, tables):
            middle = len(prompt) // 2
            part, start = (prompt[middle:], middle) if half else (prompt[:middle], 0)
            chunks.append(Chunk(part, start, table))
        out.append(runner.run(chunks, [len(c.token_ids) for c in chunks]))
    assert (runner.decoder is not None) == fuse
    return torch.cat(out).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32(build_model, family):
    model = small(build_model, family)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms' weights and biases that matter
            parameter.data += torch.randn_like(parameter) * 0.3
    expected = logits(model, (2, 9, 33), fuse=False)
    torch.testing.assert_close(logits(model, (2, 9, 33), fuse=True), expected, atol=2e-3, rtol=1e-4)


@needs_bf16
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_no_farther_from_fp32_than_the_modules_are(build_model, family):
    exact = small(build_model, family)
    for parameter in exact.parameters():
        parameter.data = (parameter.data * (0.2 if parameter.dim() > 1 else 1)).bfloat16().float()
    rounded = copy.deepcopy(exact).bfloat16()
    truth = logits(exact, (2, 9, 33), fuse=False)
    ours, theirs = ((logits(rounded, (2, 9, 33), fuse) - truth).norm() / truth.norm() for fuse in (True, False))
    assert 0 < ours < 1.2 * theirs < 0.2


@needs_bf16
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_packed_products(tokens):
    layers = [torch.nn.Linear(48, width).bfloat16() for width in (32, 7, 9)]
    x, other = torch.randn(tokens, 48).bfloat16(), torch.randn(tokens, 48).bfloat16()
    with torch.inference_mode():
        packed, plain = lean.product(*layers), Product(layers)
        assert type(packed) is PackedWeight
        for name, more in (("__call__", ()), ("silu", ()), ("times", (other,)), ("plus", (other,))):
            ours, theirs = getattr(packed, name)(x, *more), getattr(plain, name)(x, *more)
            torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)


def test_what_is_not_a_plain_layer_is_called(build_model):
    import optinfer

    model = small(build_model, "llama", hidden_size=192)
    optinfer.quantize(model, "int8", progress=False)
    decoder = LeanDecoder(model)
    assert type(decoder.layers[0].qkv) is Product and len(decoder.layers[0].qkv.layers) == 3
    expected = logits(model, (2, 9), fuse=False)
    torch.testing.assert_close(logits(model, (2, 9), fuse=True), expected, atol=2e-3, rtol=1e-3)


def test_changed_weights_are_noticed(build_model):
    model = small(build_model, "llama").bfloat16()
    first = LeanDecoder.of(model)
    assert LeanDecoder.of(model) is first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    assert LeanDecoder.of(model) is not first


def test_nothing_keeps_a_model_alive(build_model):
    model = small(build_model, "llama")
    Engine(model, num_blocks=8).generate([[5, 6]], SamplingParams(max_tokens=2))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_models_it_does_not_know(build_model, model):
    assert LeanDecoder.of(small(build_model, "llama", hidden_act="gelu")) is None
    gemma = build_model(transformers.GemmaConfig(**SHAPE))
    assert LeanDecoder.of(gemma) is None
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: seen.append(1))
    try:
        assert LeanDecoder.of(model) is None
        Engine(model, num_blocks=8).generate([[5, 6]], SamplingParams(max_tokens=2))
        assert seen
    finally:
        handle.remove()
    model.train()
    try:
        assert LeanDecoder.of(model) is None
    finally:
        model.eval()
