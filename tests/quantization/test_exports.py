"""Folders for others, reopened by their own readers: plain, skipped, tied, biased, with pictures, with experts, with a head."""

import copy

import pytest
import torch
import transformers

from optinfer.quantization import QuantizedLinear, quantize, save_checkpoint
from optinfer.quantization.layers import replace_module
from tests.quantization.families import families
from tests.serving.families import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 11, 12, 2]])
CAUSAL, CLASSES, PICTURES = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForImageTextToText,
)
MODELS = {
    "plain": (CAUSAL, "LlamaConfig", {"tie_word_embeddings": False}, ()),
    "tied": (CAUSAL, "LlamaConfig", {"tie_word_embeddings": True}, ()),
    "skipped": (CAUSAL, "LlamaConfig", {}, ("k_proj", "layers.1.mlp")),
    "biased": (CAUSAL, "Qwen2Config", {}, ()),
    "experts": (CAUSAL, "Qwen3MoeConfig", {}, ("experts",)),
    "pictures": (PICTURES, "LlavaConfig", {}, ()),
    "pictures, text only": (PICTURES, "LlavaConfig", {}, ("vision_tower", "multi_modal_projector")),
    "head": (CLASSES, "Qwen2Config", {}, ()),
}
KIND = {CAUSAL: "text", CLASSES: "classes", PICTURES: "images and text"}


def made(name):
    auto, family, changes, skip = MODELS[name]
    return auto, tiny_model(families(KIND[auto])[family], auto=auto, intermediate_size=128, **changes), skip


def restored(model):
    """The same weights in ordinary layers."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, QuantizedLinear):
            replace_module(model, module, module.dequantize())
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("scheme", "options"), [("int8", {"group_size": "channel"}), ("int4", {"group_size": 16})])
def test_compressed_tensors(name, scheme, options, tmp_path):
    pytest.importorskip("compressed_tensors")
    auto, model, skip = made(name)
    quantize(model, scheme, skip=skip, progress=False, **options)
    folder = save_checkpoint(model, tmp_path / "out")
    theirs = auto.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(restored(model)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "tied", "skipped", "biased", "pictures, text only", "head"])
@pytest.mark.parametrize(
    ("scheme", "options", "dtype"),
    [
        ("fp8", {}, torch.float32),
        ("fp8", {"group_size": "tensor"}, torch.float32),
        ("mxfp8", {}, torch.bfloat16),
        ("mxfp4", {}, torch.bfloat16),
        ("nvfp4", {}, torch.bfloat16),
    ],
    ids=["fp8", "fp8 tensor", "mxfp8", "mxfp4", "nvfp4"],
)
def test_small_floats(name, scheme, options, dtype, tmp_path):
    """Their layers hold our numbers, their model says what one with these numbers says. They restore blocks to bfloat16,
    whatever the dtype asked for, bit for bit as we do.
    """
    pytest.importorskip("compressed_tensors")
    auto, model, skip = made(name)
    plain = copy.deepcopy(model.to(dtype))
    quantize(model, scheme, skip=skip, progress=False, **options)
    folder = save_checkpoint(model, tmp_path / "out")
    theirs = auto.from_pretrained(folder, dtype=dtype).eval()
    ours = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for n, layer in ours.items():
        plain.get_submodule(n).weight.data = layer.quantized.dequantize(dtype)
    plain.save_pretrained(tmp_path / "plain")
    plain = auto.from_pretrained(tmp_path / "plain", dtype=dtype).eval()  # what is not saved is computed as theirs is
    said = logits(theirs)  # restores the weights
    close = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-9}
    assert {n for n, m in theirs.named_modules() if hasattr(m, "quantization_scheme")} == set(ours)
    for n, layer in ours.items():
        torch.testing.assert_close(theirs.get_submodule(n).weight.data, layer.quantized.dequantize(dtype), **close)
    torch.testing.assert_close(said, logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "head"])
@pytest.mark.parametrize("scheme", ["nf4", "llm_int8"])
def test_bitsandbytes(name, scheme, tmp_path):
    pytest.importorskip("bitsandbytes")
    auto, model, skip = made(name)
    quantize(model, scheme, skip=skip, progress=False)
    folder = save_checkpoint(model, tmp_path / "out", "bitsandbytes")
    theirs = auto.from_pretrained(folder, dtype=torch.float32).eval()
    ours = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert {n for n, m in theirs.named_modules() if "bitsandbytes" in type(m).__module__} == ours
    for n in ours:  # exactly; their products on processors round in bfloat16
        layer = model.get_submodule(n)
        torch.testing.assert_close(their_weight(theirs.get_submodule(n)), layer.quantized.dequantize(torch.float32))
    others = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in ours}
    found = dict(theirs.named_parameters())
    assert all(torch.equal(found[n], p) for n, p in others.items())
    assert (logits(theirs) - logits(model)).norm() < 0.1 * logits(model).norm()


def their_weight(layer):
    """Before its first forward, which packs it anew."""
    from bitsandbytes.functional import dequantize_4bit

    if getattr(layer.weight, "quant_state", None) is not None:
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float() * (layer.weight.SCB[:, None] / 127)
