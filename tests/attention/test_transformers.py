"""`attn_implementation="optinfer"` against eager, on tiny random models of three families and on the default model."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import optinfer.attention  # noqa: F401  (registers the name)
from optinfer.attention import transformers_backend

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "soft-cap and both": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def in_both(model, call):
    results = []
    for name in ("eager", "optinfer"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(call(model))
    return results


def padded(side):
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 12))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((5, 0, 9)):
        where = slice(0, padding) if side == "left" else slice(12 - padding, 12)
        mask[row, where] = 0
        ids[row, where] = 0
    return ids, mask


def test_logits_equal_eager(model):
    ids = torch.randint(3, 97, (2, 19))
    eager, ours = in_both(model, lambda m: m(ids).logits)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding(model, side):
    ids, mask = padded(side)
    eager, ours = in_both(model, lambda m: m(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_full_mask_of_the_caller(model):
    ids = torch.randint(3, 97, (1, 9))
    blocks = torch.arange(9) // 3
    mask = (blocks[:, None] >= blocks[None])[None, None]
    additive = torch.zeros(1, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    if model.config.model_type == "gemma2":
        additive = {"full_attention": additive, "sliding_attention": additive}
    eager, ours = in_both(model, lambda m: m(ids, attention_mask=additive).logits)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", (None, "static"))
@pytest.mark.parametrize("batch", ("alone", "padded"))
def test_generate_is_token_equal(model, cache, batch):
    ids, mask = (
        padded("left") if batch == "padded" else (torch.randint(3, 97, (1, 9)), torch.ones(1, 9, dtype=torch.long))
    )
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    if cache:
        options["cache_implementation"] = cache
    eager, ours = in_both(model, lambda m: m.generate(ids, attention_mask=mask, **options))
    assert torch.equal(ours, eager)


def test_prefill_in_chunks(model):
    """The second chunk starts in the middle: queries are fewer than keys."""
    ids = torch.randint(3, 97, (1, 20))

    def chunked(m):
        first = m(ids[:, :11], use_cache=True)
        return m(ids[:, 11:], past_key_values=first.past_key_values).logits

    eager, ours = in_both(model, chunked)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_unpadded_prefill_and_decode_use_no_mask(monkeypatch):
    """Not only right, but by our function: a mask would mean that torch did the work."""
    model = MODELS["sliding window"]().eval()
    calls = []
    ours = transformers_backend.flash_attention
    monkeypatch.setattr(
        transformers_backend, "flash_attention", lambda *a, **k: calls.append(k["window"]) or ours(*a, **k)
    )
    model.set_attn_implementation("optinfer")
    model.generate(torch.randint(3, 97, (1, 9)), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert calls == [6] * 2 * 4


def test_gradients_flow():
    model = MODELS["llama"]()
    model.set_attn_implementation("optinfer")
    model(torch.randint(3, 97, (1, 9))).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_bidirectional_model():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    model = BertModel(config).eval()
    ids, mask = padded("right")
    eager, ours = in_both(model, lambda m: m(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    eager, ours = in_both(model, lambda m: m(ids).last_hidden_state)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_refuses_what_it_cannot_do():
    model = MODELS["llama"]()
    attention = model.model.layers[0].self_attn
    q = torch.zeros(1, 4, 5, 16)
    with pytest.raises(ValueError, match="dropout"):
        transformers_backend.attention_forward(attention, q, q, q, None, dropout=0.1)
    for asked in ({"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(5)}, {"never_heard_of": 3}):
        with pytest.raises(ValueError, match="sinks|position_bias|never_heard_of"):
            transformers_backend.attention_forward(attention, q, q, q, None, **asked)
    usual = {"position_ids": torch.arange(5), "use_cache": True, "never_heard_of": None}
    transformers_backend.attention_forward(attention, q, q, q, None, **usual)


@pytest.mark.thorough
@pytest.mark.parametrize("order", ("before", "after"))
def test_registered_whatever_is_imported_first(order):
    lines = ["import optinfer", "import transformers.modeling_utils"]
    code = lines if order == "before" else lines[::-1]
    code.append("from transformers import AttentionInterface as A; assert 'optinfer' in A().valid_keys()")
    code.append(
        "from transformers.masking_utils import AttentionMaskInterface as M; assert 'optinfer' in M().valid_keys()"
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_registered_for_a_folder_of_ours_and_our_attention(tmp_path):
    """`import optinfer` alone, as a user would: models with our attention, and folders in our format."""
    import optinfer

    model = MODELS["llama"]()
    optinfer.quantize(model, "int8", progress=False).save_pretrained(tmp_path)
    code = f"""
import sys
import optinfer
assert "transformers" not in sys.modules and "torch" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation="optinfer")
assert type(model.model.layers[0].self_attn.q_proj).__name__ == "QuantizedLinear"
import torch
model(torch.tensor([[5, 6, 7]]))
assert not any(type(finder).__name__ == "_RegisterAfterImport" for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_attention_does_not_import_transformers():
    code = "import sys, optinfer.attention; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_default_model_in_fp32_alone_and_in_a_padded_batch():
    import optinfer

    try:
        model, tokenizer = optinfer.load_model(dtype=torch.float32)
    except Exception as error:
        pytest.skip(f"default model not at hand: {error}")
    prompts = ["The capital of France is", "In 1905 Einstein published", "Water"]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for batch in ([prompts[0]], prompts):
        encoded = tokenizer(batch, return_tensors="pt", padding=True).to(model.device)
        eager, ours = in_both(model, lambda m, e=encoded: m.generate(**e, max_new_tokens=16, do_sample=False))
        assert torch.equal(ours, eager)


def test_kernel_inside_a_model(monkeypatch):
    """The same, with the Triton kernel doing the work (interpreted on a CPU)."""
    pytest.importorskip("triton")
    ours = transformers_backend.flash_attention
    monkeypatch.setattr(transformers_backend, "flash_attention", lambda *a, **k: ours(*a, **k, backend="triton"))
    for build in MODELS.values():
        model = build().eval()
        ids = torch.randint(3, 97, (1, 9))
        eager, kernel = in_both(model, lambda m, ids=ids: m.generate(ids, max_new_tokens=3, do_sample=False))
        assert torch.equal(kernel, eager)


def test_the_static_cache_trap_is_real(monkeypatch):
    """Without the mask for static caches, the last key is an empty slot, and the tokens are wrong."""
    model = MODELS["llama"]().eval()
    ids = torch.randint(3, 97, (1, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    model.set_attn_implementation("eager")
    eager = model.generate(ids, **options)
    from transformers.masking_utils import AttentionMaskInterface

    AttentionMaskInterface.register("optinfer", lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation("optinfer")
        assert not torch.equal(model.generate(ids, **options), eager)
    finally:
        transformers_backend.register()
