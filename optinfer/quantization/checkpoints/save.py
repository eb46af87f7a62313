"""Checkpoints that others load: compressed-tensors, GPTQ, AWQ and bitsandbytes, as transformers and vLLM read them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from optinfer.folders import new_folder
from optinfer.quantization.checkpoints import awq, bitsandbytes, compressed_tensors, gptq, mxfp4, small_floats
from optinfer.quantization.checks import CheckpointError
from optinfer.quantization.experts import quantized_experts, refuse_experts
from optinfer.quantization.formats.grid import GridTensor
from optinfer.quantization.formats.small_floats import BlockFloats
from optinfer.quantization.formats.tensor import QuantizedTensor
from optinfer.quantization.layers import unquantized_layers
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.methods.calibrate import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FORMATS", "CheckpointError", "save_bitsandbytes", "save_checkpoint"]

LAYOUTS_OF_DECODERS = {"gptq": gptq.convert, "awq": awq.convert}  # in float16, for layers inside the decoder's
LAYOUTS = {"compressed-tensors": compressed_tensors.convert, **LAYOUTS_OF_DECODERS}
Format = Literal["compressed-tensors", "gptq", "awq", "bitsandbytes", "mxfp4"]
FORMATS = get_args(Format)


def save_bitsandbytes(model: PreTrainedModel, path: str | os.PathLike[str]) -> Path:
    """Save a model quantized to nf4, fp4 or llm_int8 as a folder that transformers loads with bitsandbytes.

    See `save_checkpoint`; a folder of that name is replaced.
    """
    return save_checkpoint(model, path, "bitsandbytes", replace=True)


def save_checkpoint(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    format: Format = "compressed-tensors",
    tokenizer: PreTrainedTokenizerBase | None = None,
    replace: bool = False,
) -> Path:
    """Write a quantized model as a folder that transformers and vLLM load without this package.

    Args:
        model: a transformers model whose linears were quantized by `quantize`, `gptq`, `awq`, `qat` …
        path: the folder to make.
        format: ``"compressed-tensors"`` (int2 … int8; vLLM runs 4 and 8 bits; and fp8, mxfp8, mxfp4, nvfp4), ``"gptq"`` (int2
            … int8), ``"awq"`` (int4), ``"bitsandbytes"`` (nf4, fp4, llm_int8), ``"mxfp4"`` (GPT-OSS's experts, its attention
            skipped). Quantize with ``symmetric=True`` for compressed-tensors: transformers (5.23, with compressed-tensors
            0.20) cannot load affine files, not even those that library writes itself, because it expects zero points
            unpacked. vLLM and the library's own decompressor read them; writing one warns.
        tokenizer: saved along when given; the generation config always is.
        replace: whether a folder of that name gives way.

    Returns:
        The folder. It appears whole or not at all: everything is written to a temporary neighbour and renamed.

    Raises:
        FileExistsError: `path` exists and `replace` is False.
        CheckpointError: the model's scheme has no place in the format, or the disk is too small.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    target = Path(path)
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists: choose another folder, or remove it first")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    experts = dict(quantized_experts(model))
    if not layers and not experts:
        raise CheckpointError("the model has no quantized layers: quantize it first (optinfer.quantize, gptq, awq …)")
    if format != mxfp4.FORMAT:
        refuse_experts(model, format)
        _check_readers_layers(model, layers, format)
    plain = unquantized_layers(model)
    weights = {name: layer.quantized for name, layer in layers.items()}
    dtype = torch.float16 if format in LAYOUTS_OF_DECODERS else None
    if format == mxfp4.FORMAT:
        tensors, config = mxfp4.convert(model, list(layers), experts, plain)
    elif format == "bitsandbytes":
        tensors, config = bitsandbytes.convert(layers, plain)
    elif any(isinstance(q, BlockFloats) for q in weights.values()):
        tensors, config = small_floats.convert(weights, format, plain)
    else:
        grids = _uniform(weights, format)
        if dtype is not None:
            _check_inside(model, weights, format)
        tensors, config = LAYOUTS[format](model, grids, plain)
    tensors |= _other_tensors(model, [*layers, *experts], dtype)
    return _write(model, target, tensors, config, tokenizer, dtype, replace)


def _uniform(layers: dict[str, QuantizedTensor], format: str) -> dict[str, GridTensor]:
    """The layers, all of one scheme; CheckpointError where one cannot be expressed."""
    first_name, first = next(iter(layers.items()))
    grids: dict[str, GridTensor] = {}
    for name, q in layers.items():
        what = f"{name} ({q.scheme}, group {q.group_size}, {'symmetric' if q.symmetric else 'affine'})"
        if not isinstance(q, GridTensor):
            raise CheckpointError(f"{what} is not a scheme of format {format!r}; try format='bitsandbytes'")
        if format == "awq" and q.bits != 4:
            raise CheckpointError(f"{what}: AWQ checkpoints hold 4 bits; try format='compressed-tensors'")
        if q.group_index is not None:
            raise CheckpointError(f"{what} keeps a group for each column, which {format!r} cannot say")
        if q.scale.shape[0] != q.shape[0] or q.shape[1] % q.group_size:
            raise CheckpointError(f"{what}: {q.shape[1]} inputs are not whole groups of {q.group_size} columns")
        per_row = q.group_size == q.shape[1] and first.group_size == first.shape[1]
        if (q.bits, q.symmetric) != (first.bits, first.symmetric) or (q.group_size != first.group_size and not per_row):
            raise CheckpointError(f"{what} differs from {first_name}: one checkpoint holds one scheme")
        rows_per_word = 32 // q.bits if 32 % q.bits == 0 else 32
        if format != "compressed-tensors" and (q.shape[0] % rows_per_word or q.shape[1] % rows_per_word):
            raise CheckpointError(f"{what}: its shape {tuple(q.shape)} does not fill whole 32-bit words")
        if format in LAYOUTS_OF_DECODERS and not torch.isfinite(q.scale.half()).all():
            raise CheckpointError(f"{what}: its scales exceed float16, which {format!r} stores")
        grids[name] = q
    return grids


def _check_readers_layers(model: PreTrainedModel, layers: Iterable[str], format: str) -> None:
    """Raise CheckpointError where a reader, who builds the model from its configuration, finds no `nn.Linear` to fill."""
    with torch.device("meta"):
        built = type(model)(model.config)
    for name in layers:
        if not isinstance(kind := built.get_submodule(name), nn.Linear):
            raise CheckpointError(
                f"{name} is a {type(kind).__name__} in {type(model).__name__}, and readers of {format!r} files look for "
                "nn.Linear: save it in our own format, model.save_pretrained(path)"
            )


def _check_inside(model: PreTrainedModel, layers: Iterable[str], format: str) -> None:
    """Raise CheckpointError for quantized layers where readers of GPTQ and AWQ files do not look."""
    try:
        prefixes = tuple(f"{prefix}." for prefix in decoder_layers(model))
    except ValueError as error:
        raise CheckpointError(f"format {format!r} is for decoders: {error}") from error
    if outside := [name for name in layers if not name.startswith(prefixes)]:
        raise CheckpointError(
            f"{outside[0]} is quantized and lies outside the decoder's layers, where readers of {format!r} files expect "
            f"ordinary weights: quantize with skip=[…], or use format='compressed-tensors'"
        )


def _other_tensors(model: PreTrainedModel, layers: Iterable[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Embeddings, norms, biases and heads; a tensor that several names share is stored once, under the first."""
    prefixes = tuple(f"{name}.weight" for name in layers)
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        if name.startswith(prefixes):
            continue
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen:
            continue
        seen.add(key)
        stored = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if stored is not tensor and bool((stored.isinf() & tensor.isfinite()).any()):
            raise CheckpointError(
                f"{name} reaches {tensor.abs().max():.3g}, beyond {str(dtype).removeprefix('torch.')}, which this format "
                "stores; use format='compressed-tensors'"
            )
        tensors[name] = stored
    return tensors


def _write(
    model: PreTrainedModel,
    target: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    replace: bool,
) -> Path:
    from huggingface_hub import save_torch_state_dict

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with new_folder(target, replace) as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.05 * size:
            raise CheckpointError(
                f"the checkpoint takes {size / 1e9:.2f} GB, {target.parent} has {free / 1e9:.2f} GB free"
            )
        save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
        settings = json.loads(model.config.to_json_string(use_diff=False))
        settings["quantization_config"] = config
        settings["architectures"] = [type(model).__name__]
        if dtype is not None:
            settings["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return target
