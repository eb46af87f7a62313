"""Q4_1: the codes of llama.cpp's own package, and the default model in the 4 bits that it was published in."""

import tempfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optinfer
from optinfer import models
from optinfer.quantization import SCHEMES, QuantizedLinear, memory_footprint, quantize
from optinfer.quantization.checkpoints.gguf import load_as_shipped
from optinfer.quantization.formats.q4_1 import Q41Tensor

Q4_1 = gguf.GGMLQuantizationType.Q4_1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([1.0, 1e-6, 900.0, 0.0]))
def test_codes_and_values_are_those_of_llama_cpp(rows: int, groups: int, seed: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, 32 * groups, generator=g) + torch.randn(rows, 1, generator=g)) * size
    blocks = gguf.quantize(weight.numpy(), Q4_1)
    theirs = Q41Tensor.from_file(torch.from_numpy(blocks), torch.float32)
    ours = SCHEMES["q4_1"].quantize(weight)
    for name, tensor in ours.tensors().items():
        assert torch.equal(tensor, theirs.tensors()[name]), name
    assert torch.equal(theirs.dequantize(), torch.from_numpy(gguf.dequantize(blocks, Q4_1)))


def test_a_width_that_does_not_divide() -> None:
    weight = torch.randn(5, 77)
    q: Any = SCHEMES["q4_1"].quantize(weight)
    step = q.scale.float().repeat_interleave(32, 1)[:, :77]
    assert q.dequantize().shape == (5, 77)
    # Half a step, and what fp16 rounds off the scale (15 times) and the minimum.
    rounding = (15 * step + q.minimum.float().abs().repeat_interleave(32, 1)[:, :77]) * 2**-11
    assert bool(((q.dequantize() - weight).abs() <= step / 2 * 1.001 + rounding).all())


def test_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="65504"):
        SCHEMES["q4_1"].quantize(torch.full((2, 32), 1e5))
    with pytest.raises(ValueError, match="group_size of q4_1 must be 32; got 64"):
        quantize(torch.nn.Linear(4, 4), "q4_1", group_size=64)
    with pytest.raises(ValueError, match="blocks must be uint8"):
        Q41Tensor.from_file(torch.zeros(3, 21, dtype=torch.uint8))


@pytest.fixture(scope="module")
def shipped() -> tuple[Path, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = models.default_gguf(Path(folder))
        yield path, load_as_shipped(device="cpu", gguf=path)[0]


def test_the_default_model_as_it_was_published(shipped: tuple[Path, Any]) -> None:
    """Every layer restores exactly what the file stands for; rounded to bf16 it is the ordinary model's."""
    path, model = shipped
    plain, _ = optinfer.load_model(dtype=torch.bfloat16, device="cpu")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) == 210
    for name, layer in layers.items():
        assert torch.equal(layer.quantized.dequantize(torch.bfloat16), plain.get_submodule(name).weight), name
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.3.ffn_down.weight")
    exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    assert torch.equal(layers["model.layers.3.mlp.down_proj"].quantized.dequantize(torch.float32), exact)
    assert not torch.equal(exact, exact.bfloat16().float())  # what rounding would have cost
    assert memory_footprint(model) < 0.5 * memory_footprint(plain)


def test_it_is_served_and_saved(shipped: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, model = shipped
    ids = torch.randint(0, 49152, (1, 20))
    params = optinfer.SamplingParams(max_tokens=6, ignore_eos=True)
    expected = optinfer.Engine(model).generate([ids[0].tolist()], params)[0].token_ids
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.lm_head.__class__ = type(model.lm_head)  # `load_model` chose the head's products by this processor
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert optinfer.Engine(again).generate([ids[0].tolist()], params)[0].token_ids == expected
