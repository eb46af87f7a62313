"""Exported checkpoints: bits against the format's own library, weights through unpackers that share no code with ours."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from optinfer.quantization import quantize
from optinfer.quantization.checkpoints import save
from optinfer.quantization.checkpoints.save import CheckpointError, save_checkpoint
from optinfer.quantization.checkpoints.words import pack_int32, unpack_int32
from optinfer.quantization.layers import replace_module
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.methods.gptq import gptq_quantize
from optinfer.quantization.methods.ladder import dequantize


def small_model(dtype=torch.float32, tied=True, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= 3
    return model


def restored(model):
    """An ordinary model with the quantized model's weights."""
    return dequantize(copy.deepcopy(model))


def act_ordered(model):
    for module in list(model.modules()):
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            x = torch.randn(300, module.in_features)
            q = gptq_quantize(module.weight, x.T @ x, 4, 32, act_order=True)
            replace_module(model, module, QuantizedLinear.from_quantized(q, module.bias))
    return model


IDS = torch.arange(24)[None] * 5 % 128


@given(bits=st.integers(1, 8), shape=st.tuples(st.integers(1, 5), st.integers(1, 70)), dim=st.sampled_from([0, 1]))
@settings(max_examples=80, deadline=None)
def test_packing_is_a_stream_of_bits(bits, shape, dim):
    codes = torch.randint(0, 1 << bits, shape)
    packed = pack_int32(codes, bits, dim)
    assert torch.equal(unpack_int32(packed, bits, shape[dim], dim), codes.to(torch.uint8))
    for line, words in zip(codes.movedim(dim, -1).tolist(), packed.movedim(dim, -1).tolist()):
        stream = sum(code << bits * i for i, code in enumerate(line))
        assert stream == sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_stays_on_the_device_of_its_input(bits):
    """Tensors on ``meta`` refuse, as those on a GPU do, to be mixed with others."""
    packed = pack_int32(torch.empty(3, 50, dtype=torch.uint8, device="meta"), bits)
    assert packed.device.type == unpack_int32(packed, bits, 50).device.type == "meta"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_packing_equals_compressed_tensors(bits, dim):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 1 << bits, (96, 64))
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_int32(codes, bits, dim), helpers.pack_to_int32(signed, bits, packed_dim=dim))


SCHEMES = [
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": "channel"}),
    ("int8", {"group_size": "channel"}),
    ("int3", {"group_size": 32}),
    ("act_order", {}),
]
AFFINE = [
    ("int4", {"group_size": 32, "symmetric": False}),
    ("int8", {"group_size": 64, "symmetric": False}),
    ("int3", {"group_size": 32, "symmetric": False}),
    ("int2", {"group_size": 16, "symmetric": False}),
]


def saved(folder, dtype, scheme, options, tied=True):
    model = small_model(dtype, tied)
    model = act_ordered(model) if scheme == "act_order" else quantize(model, scheme, progress=False, **options)
    save_checkpoint(model, folder / "out")
    assert [p.name for p in folder.iterdir()] == ["out"]
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme, options", SCHEMES)
@torch.no_grad()
def test_plain_transformers_loads_compressed_tensors(tmp_path, tied, scheme, options):
    pytest.importorskip("compressed_tensors")
    model = saved(tmp_path, torch.float32, scheme, options, tied)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (loaded(IDS).logits - restored(model)(IDS).logits).abs().max() <= 1e-3


@pytest.mark.parametrize("scheme, options", AFFINE)
@torch.no_grad()
def test_affine_compressed_tensors_warn(tmp_path, scheme, options):
    """Goes on to the logits once transformers can load such files."""
    pytest.importorskip("compressed_tensors")
    with pytest.warns(UserWarning, match="transformers cannot load affine compressed-tensors"):
        model = saved(tmp_path, torch.float32, scheme, options)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    except (RuntimeError, ValueError) as error:
        pytest.xfail(f"transformers {transformers.__version__}: {error}")
    assert (loaded(IDS).logits - restored(model)(IDS).logits).abs().max() <= 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_same_file_as_compressed_tensors_own_compressor(tmp_path, symmetric):
    """Names, shapes, dtypes and bits of what the library itself makes of our scales and zero points."""
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationScheme

    model = saved(tmp_path, torch.float32, "int4", {"group_size": 32, "symmetric": symmetric})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            q: Any = module.quantized
            state = {"weight": q.dequantize(), "weight_scale": q.scale}
            if not symmetric:
                state["weight_zero_point"] = (q.zero_points().to(torch.int16) - 8).to(torch.int8)
            theirs = base.PackedQuantizationCompressor.compress(state, scheme)
            ours = {k.removeprefix(name + "."): v for k, v in stored.items() if k.startswith(name + ".")}
            assert theirs.keys() == ours.keys()
            for key, tensor in theirs.items():
                assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme, options", SCHEMES + AFFINE)
@pytest.mark.filterwarnings("ignore:transformers cannot load affine")
def test_compressed_tensors_own_decompressor_restores_our_weights(tmp_path, dtype, scheme, options):
    """Affine files too, which transformers 5.23 with compressed-tensors 0.20 refuses to load: it expects the zero points
    unpacked, where compressed-tensors itself, and vLLM, pack them."""
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationScheme

    model = saved(tmp_path, dtype, scheme, options)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state = {k.removeprefix(name + "."): v for k, v in stored.items() if k.startswith(name + ".")}
            weight = base.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
            assert torch.equal(weight, module.quantized.dequantize())


def nibbles(words: np.ndarray) -> np.ndarray:
    """``[..., n]`` int32 to ``[..., n, 8]``, lowest nibble first."""
    return words.astype(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_files_decode_to_the_same_weights(tmp_path, symmetric):
    model = quantize(small_model(torch.float16), "int4", group_size=32, symmetric=symmetric, progress=False)
    save_checkpoint(model, tmp_path / "out", format="gptq")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    plus = 1 if config["checkpoint_format"] == "gptq" else 0
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        t = {k: stored[f"{name}.{k}"].numpy() for k in ("qweight", "qzeros", "scales", "g_idx")}
        codes = nibbles(t["qweight"].T).reshape(t["qweight"].shape[1], -1)  # [out, in]
        zeros = nibbles(t["qzeros"]).reshape(t["scales"].shape) + plus  # [groups, out]
        weight = (codes - zeros.T[:, t["g_idx"]].astype(np.int64)) * t["scales"].T[:, t["g_idx"]].astype(np.float32)
        np.testing.assert_array_equal(weight.astype(np.float16), module.quantized.dequantize().numpy())
    if symmetric:
        assert stored["model.layers.0.mlp.up_proj.qzeros"].unique().tolist() == [0x77777777]


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_files_decode_to_the_same_weights(tmp_path, symmetric):
    model = quantize(small_model(torch.float16), "int4", group_size=32, symmetric=symmetric, progress=False)
    save_checkpoint(model, tmp_path / "out", format="awq")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    inverse = [0, 4, 1, 5, 2, 6, 3, 7]  # where column 0, 1 … is found among the nibbles
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        t = {k: stored[f"{name}.{k}"].numpy() for k in ("qweight", "qzeros", "scales")}
        codes = nibbles(t["qweight"])[..., inverse].reshape(t["qweight"].shape[0], -1)  # [in, out]
        zeros = np.repeat(nibbles(t["qzeros"])[..., inverse].reshape(t["scales"].shape), 32, 0)
        weight = (codes.astype(np.int64) - zeros) * np.repeat(t["scales"].astype(np.float32), 32, 0)
        np.testing.assert_array_equal(weight.T.astype(np.float16), module.quantized.dequantize().numpy())


def test_a_zero_point_of_zero_does_not_borrow(tmp_path):
    """Version 1 of the format stores zero - 1; with a zero point of 0 the file says version 2 instead."""
    model = small_model(torch.float16)
    model.model.layers[0].mlp.up_proj.weight.data.abs_()
    quantize(model, "int4", group_size=32, symmetric=False, progress=False)
    save_checkpoint(model, tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gptq", "awq"])
@torch.no_grad()
def test_gptqmodel_loads_them(tmp_path, format):
    pytest.importorskip("gptqmodel")  # compiles its kernel for this processor, once
    if format == "gptq":
        pytest.importorskip("optimum")  # transformers asks for it
    model = quantize(small_model(torch.float16), "int4", group_size=32, symmetric=False, progress=False)
    save_checkpoint(model, tmp_path / "out", format=format)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.bfloat16)
    assert (loaded(IDS).logits.float() - restored(model).float()(IDS).logits).abs().max() < 0.1


# ------------------------------------------------------------------------------------------------------- bad input
def test_existing_folder(tmp_path):
    model = quantize(small_model(), "int4", group_size=32, progress=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists: choose another folder"):
        save_checkpoint(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("step", ["save_file", "rename"])
def test_disk_full_leaves_nothing(tmp_path, monkeypatch, step):
    model = quantize(small_model(), "int4", group_size=32, progress=False)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        *(("safetensors.torch.save_file", full) if step == "save_file" else (type(tmp_path), "rename", full))
    )
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="GB free"):
        save_checkpoint(quantize(small_model(), "int4", group_size=32, progress=False), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "scheme, format, match",
    [
        (None, "compressed-tensors", "no quantized layers"),
        ("nf4", "compressed-tensors", "try format='bitsandbytes'"),
        ("int3", "awq", "AWQ checkpoints hold 4 bits"),
        ("int4", "bitsandbytes", "bitsandbytes has nf4, fp4 and llm_int8"),
        ("int4", "pickle", "format must be one of"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, scheme, format, match):
    model = small_model()
    if scheme:
        quantize(model, scheme, progress=False)
    with pytest.raises(ValueError, match=match):
        save_checkpoint(model, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())
