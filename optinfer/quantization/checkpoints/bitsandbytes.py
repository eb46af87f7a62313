"""Folders in the format of bitsandbytes: write one that `BitsAndBytesConfig` loads, read one that it saved.

Neither direction needs bitsandbytes installed: the format is a handful of tensors per layer.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optinfer.quantization.checks import CheckpointError
from optinfer.quantization.formats.codebook import CodebookTensor
from optinfer.quantization.formats.llm_int8 import Int8Rows
from optinfer.quantization.formats.tensor import NestedScale, QuantizedTensor
from optinfer.quantization.layers import replace_module
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.number_formats import CODEBOOKS, DYNAMIC_INT8
from optinfer.quantization.schemes import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["convert", "load_bitsandbytes"]

STATE = "weight.quant_state.bitsandbytes__"


# ---------------------------------------------------------------------------------------------- writing
def convert(layers: dict[str, QuantizedLinear], plain: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors by full name, and the `quantization_config`. `plain`: linear layers that are not quantized."""
    schemes = {layer.scheme for layer in layers.values()}
    if len(schemes) != 1 or not issubclass(next(iter(schemes)).format, (CodebookTensor, Int8Rows)):
        found = ", ".join(sorted({scheme.name for scheme in schemes}))
        raise CheckpointError(f"bitsandbytes has nf4, fp4 and llm_int8, one in a folder; the model's layers: {found}")
    tensors = {f"{name}.{k}": v for name, layer in layers.items() for k, v in layer_tensors(layer.quantized).items()}
    return tensors, bitsandbytes_config(schemes.pop(), plain)


def layer_tensors(q: QuantizedTensor) -> dict[str, Tensor]:
    """A quantized weight as bitsandbytes stores it: tensors by name, the layer's prefix left out."""
    if isinstance(q, Int8Rows):
        return {"weight": q.packed, "SCB": q.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    description: dict[str, Any] = {
        "quant_type": q.scheme,
        "blocksize": q.group_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {"weight": q.packed, "weight.quant_map": torch.tensor(CODEBOOKS[q.scheme])}
    if isinstance(q.scale, NestedScale):
        tensors["weight.absmax"] = q.scale.codes
        tensors["weight.nested_absmax"] = q.scale.absmax
        tensors["weight.nested_quant_map"] = torch.tensor(DYNAMIC_INT8)
        description |= {
            "nested_blocksize": NestedScale.BLOCK,
            "nested_dtype": "float32",
            "nested_offset": q.scale.offset.item(),
        }
    else:
        tensors["weight.absmax"] = q.scale
    tensors[STATE + q.scheme] = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    return tensors


def bitsandbytes_config(scheme: Scheme, left_alone: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json."""
    four = issubclass(scheme.format, CodebookTensor)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_type": scheme.name if four else "fp4",
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": scheme.threshold,
        "llm_int8_skip_modules": left_alone,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


# ---------------------------------------------------------------------------------------------- reading
def load_bitsandbytes(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a folder saved by bitsandbytes through transformers (or by `save_bitsandbytes`) as a quantized model.

    Args:
        dtype: of what is not quantized; default: as saved.

    Returns:
        The model in eval mode, with a `QuantizedLinear` for each quantized layer: the same bits, our products.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: not in that format, damaged, or of a kind we do not have; the message names the tensor.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from optinfer.quantization.model import mark_quantized

    path = Path(path)
    config, threshold = _read_config(path)
    state = _read_tensors(path)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.bfloat16)
    scheme = _exchange_layers(model, state, threshold)
    if scheme is None:
        raise ValueError(f"{path} holds no layer quantized by bitsandbytes")
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    loaded = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [n for n, p in model.named_parameters() if p.is_meta]
    if missing or loaded.unexpected_keys:
        wrong = [f"missing: {n}" for n in missing] + [f"unexpected: {n}" for n in loaded.unexpected_keys]
        raise ValueError(f"{path} does not fit its config.json; {'; '.join(wrong[:5])}")
    mark_quantized(model, scheme)
    return model.eval()


def _read_config(path: Path) -> tuple[PreTrainedConfig, float]:
    """The model's configuration without the quantization, and the threshold of LLM.int8()."""
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no model folder: it has no config.json")
    config = AutoConfig.from_pretrained(path)
    options = getattr(config, "quantization_config", None) or {}
    options = options if isinstance(options, dict) else options.to_dict()
    if options.get("quant_method") != "bitsandbytes":
        raise ValueError(f"{path} is not in bitsandbytes format: quant_method={options.get('quant_method')!r}")
    del config.quantization_config
    return config, float(options.get("llm_int8_threshold", 6.0))


def _exchange_layers(model: nn.Module, state: dict[str, Tensor], threshold: float) -> Scheme | None:
    """Put a `QuantizedLinear` for each layer whose quantized weight is in `state`, and take that out; None: no layer's is."""
    scheme = None
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        q = _read_layer(state, name, linear)
        if q is None:
            continue
        layer = QuantizedLinear.from_quantized(q, threshold=threshold)
        if linear.bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(linear.bias, device="meta"), requires_grad=False)
        replace_module(model, linear, layer)
        scheme = layer.scheme
    return scheme


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} holds no .safetensors file")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or cut short: {error}") from error
    return state


def _read_layer(state: dict[str, Tensor], name: str, linear: nn.Linear) -> QuantizedTensor | None:
    """Take a layer's tensors out of `state`; None if it is not quantized."""
    shape, dtype = tuple(linear.weight.shape), linear.weight.dtype

    def take(key: str, want: tuple[int, ...] | None, want_dtype: torch.dtype) -> Tensor:
        full = f"{name}.{key}"
        if full not in state:
            raise ValueError(f"{full} is missing")
        tensor = state.pop(full)
        if tensor.dtype != want_dtype or (want is not None and tuple(tensor.shape) != want):
            raise ValueError(f"{full} is {tensor.dtype} {tuple(tensor.shape)}, should be {want_dtype} {want or ''}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{full} has NaN or Inf values")
        return tensor

    if f"{name}.SCB" in state:
        kind = state.pop(f"{name}.weight_format", torch.tensor(0))
        if int(kind) != 0:
            raise ValueError(f"{name}.weight_format is {int(kind)}; only row-major (0) is supported")
        packed, absmax = take("weight", shape, torch.int8), take("SCB", shape[:1], torch.float32)
        return Int8Rows(packed, absmax, torch.Size(shape), dtype, "llm_int8", 8, shape[1])

    key = next((STATE + kind for kind in CODEBOOKS if f"{name}.{STATE}{kind}" in state), None)
    if key is None:
        return None
    try:
        description = json.loads(bytes(take(key, None, torch.uint8).tolist()))
        kind, block = description["quant_type"], int(description["blocksize"])
        stored_shape = tuple(description["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}.{key} cannot be read: {error!r}") from error
    if stored_shape != shape:
        raise ValueError(f"{name}.weight has shape {stored_shape} in its quant_state, {shape} in config.json")
    _expect_table(name, take("weight.quant_map", (16,), torch.float32), CODEBOOKS[kind], kind)
    blocks = -(-math.prod(shape) // block)
    packed = take("weight", ((math.prod(shape) + 1) // 2, 1), torch.uint8)
    scale: Tensor | NestedScale
    if "nested_offset" in description:
        _expect_table(
            name, take("weight.nested_quant_map", (256,), torch.float32), DYNAMIC_INT8, "the dynamic 8-bit map"
        )
        scale = NestedScale(
            take("weight.absmax", (blocks,), torch.uint8),
            take("weight.nested_absmax", (-(-blocks // NestedScale.BLOCK),), torch.float32),
            torch.tensor(description["nested_offset"], dtype=torch.float32),
        )
    else:
        scale = take("weight.absmax", (blocks,), torch.float32)
    return CodebookTensor(packed, scale, torch.Size(shape), dtype, kind, 4, block)


def _expect_table(name: str, table: Tensor, values: tuple[float, ...], what: str) -> None:
    if not torch.equal(table, torch.tensor(values)):
        raise ValueError(f"{name}: the table stored with the weight is not that of {what}")
