"""Checkpoints that others load: compressed-tensors, GPTQ, AWQ and bitsandbytes, as transformers and vLLM read them.

Small floats (fp8, mxfp8, mxfp4, nvfp4) are compressed-tensors too, see `block_checkpoint`.

=====================  ==========================================================  ====================================
format                 tensors of a linear layer ``[out, in]``, groups of ``g``     packing
=====================  ==========================================================  ====================================
compressed-tensors     ``weight_packed [out, in*b/32]``, ``weight_scale``          along `in`; zero points along `out`
                       ``[out, in/g]``, ``weight_shape [2]``, affine:
                       ``weight_zero_point [out*b/32, in/g]``
gptq                   ``qweight [in*b/32, out]``, ``qzeros [in/g, out*b/32]``,    `qweight` along `in`, `qzeros` along
                       ``scales [in/g, out]`` float16, ``g_idx [in]``              `out`; version 1 stores ``zero - 1``
awq (GEMM)             ``qweight [in, out/8]``, ``qzeros [in/g, out/8]``,          along `out`, eight columns in the
                       ``scales [in/g, out]`` float16                              order 0 2 4 6 1 3 5 7
=====================  ==========================================================  ====================================

All packed tensors are int32, the first code in the lowest bits; codes are unsigned.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optinfer.folders import new_folder
from optinfer.quantization.checkpoints.bitsandbytes import write_bitsandbytes
from optinfer.quantization.checkpoints.small_floats import convert_blocks
from optinfer.quantization.checks import CheckpointError
from optinfer.quantization.experts import refuse_experts
from optinfer.quantization.formats.small_floats import BlockFloats
from optinfer.quantization.formats.tensor import QuantizedTensor
from optinfer.quantization.layers import unquantized_layers
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.methods.calibrate import decoder_layers

__all__ = ["FORMATS", "CheckpointError", "pack_int32", "save_checkpoint", "unpack_int32"]

FORMATS = ("compressed-tensors", "gptq", "awq", "bitsandbytes")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns sits in nibble 0, 1 …: the order AWQ's kernel unpacks in


# ------------------------------------------------------------------------------------------------------ int32 words
def pack_int32(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack unsigned codes along one dimension into int32 words: a stream of bits, the first code lowest.

    32 codes fill exactly `bits` words; 3-bit codes may straddle two. The last word is filled with zeros.

    Returns:
        int32, `dim` now ``ceil(n * bits / 32)`` long.
    """
    codes = codes.movedim(dim, -1).to(torch.int64)
    words = -(-codes.shape[-1] * bits // 32)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 32)).unflatten(-1, (-1, 32))
    packed = torch.zeros(*codes.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        packed[..., word] |= codes[..., i] << offset & 0xFFFFFFFF
        if offset + bits > 32:
            packed[..., word + 1] |= codes[..., i] >> (32 - offset)
    packed = packed.flatten(-2)[..., :words]
    return torch.where(packed < 1 << 31, packed, packed - (1 << 32)).to(torch.int32).movedim(-1, dim).contiguous()


def unpack_int32(packed: Tensor, bits: int, length: int, dim: int = -1) -> Tensor:
    """The inverse of `pack_int32`: unsigned codes, uint8, `dim` `length` long."""
    packed = packed.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    packed = torch.nn.functional.pad(packed, (0, 1))
    bit = torch.arange(length, device=packed.device) * bits
    word, offset = bit // 32, bit % 32
    pair = packed[..., word] | packed[..., word + 1] << 32
    return (pair >> offset & (1 << bits) - 1).to(torch.uint8).movedim(-1, dim).contiguous()


# --------------------------------------------------------------------------------------------- one layer, per format
def _compressed_tensors(q: QuantizedTensor) -> dict[str, Tensor]:
    assert isinstance(q.scale, Tensor)  # only codebooks nest their scales
    tensors = {
        "weight_packed": pack_int32(q.codes(), q.bits),
        "weight_scale": q.scale,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if not q.symmetric:
        tensors["weight_zero_point"] = pack_int32(q.zero_points(), q.bits, dim=0)
    return tensors


def _gptq(q: QuantizedTensor, version: int) -> dict[str, Tensor]:
    zeros = q.zero_points().T.to(torch.int64) - (1 if version == 1 else 0)
    return {
        "qweight": pack_int32(q.codes(), q.bits, dim=1).T.contiguous(),
        "qzeros": pack_int32(zeros, q.bits),
        "scales": q.scale.T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(q.shape[1], dtype=torch.int32, device=q.scale.device) // q.block_size,
    }


def _awq(q: QuantizedTensor) -> dict[str, Tensor]:
    order = torch.tensor(AWQ_ORDER, device=q.scale.device)

    def pack(columns: Tensor) -> Tensor:
        return pack_int32(columns.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    return {
        "qweight": pack(q.codes().T),
        "qzeros": pack(q.zero_points().T),
        "scales": q.scale.T.to(torch.float16).contiguous(),
    }


# ---------------------------------------------------------------------------------------------------- whole models
def save_checkpoint(
    model: Any,
    path: str | os.PathLike[str],
    format: str = "compressed-tensors",
    tokenizer: Any = None,
) -> Path:
    """Write a quantized model as a folder that transformers and vLLM load without this package.

    Args:
        model: a transformers model whose linears were quantized by `quantize`, `gptq`, `awq`, `qat` …
        path: the folder to make; it must not exist.
        format: ``"compressed-tensors"`` (int2 … int8; vLLM runs 4 and 8 bits; and
            fp8, mxfp8, mxfp4, nvfp4), ``"gptq"`` (int2 … int8), ``"awq"`` (int4),
            ``"bitsandbytes"`` (nf4, fp4, llm_int8). Quantize with ``symmetric=True`` for compressed-tensors: transformers
            (5.23, with compressed-tensors 0.20) cannot load affine files, not even those that library writes itself,
            because it expects zero points unpacked. vLLM and the library's own decompressor read them; writing one warns.
        tokenizer: saved along when given; the generation config always is.

    Returns:
        The folder. It appears whole or not at all: everything is written to a temporary neighbour and renamed.

    Raises:
        FileExistsError: `path` exists.
        CheckpointError: the model's scheme has no place in the format, or the disk is too small.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target} exists: choose another folder, or remove it first")
    layers = {name: m.quantized for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        raise CheckpointError("the model has no quantized layers: quantize it first (optinfer.quantize, gptq, awq …)")
    refuse_experts(model, format)
    _check_readers_layers(model, layers, format)
    if format == "bitsandbytes":
        with new_folder(target) as folder:
            write_bitsandbytes(model, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        return target
    blocks = {name: q for name, q in layers.items() if isinstance(q, BlockFloats)}
    if blocks:
        tensors, config = convert_blocks(layers, blocks, format, unquantized_layers(model))
        return _write(model, target, tensors | _other_tensors(model, layers, None), config, tokenizer, None)
    _check_uniform(layers, format)
    if format in ("gptq", "awq"):
        _check_inside(model, layers, format)
    if format == "compressed-tensors" and not next(iter(layers.values())).symmetric:
        warnings.warn(
            "transformers cannot load affine compressed-tensors checkpoints (it expects unpacked zero points, the format "
            "packs them): use vLLM, or quantize with symmetric=True, or write format='awq' or 'gptq'",
            stacklevel=2,
        )
    tensors, config = _convert(model, layers, format)
    dtype = torch.float16 if format in ("gptq", "awq") else None
    tensors |= _other_tensors(model, layers, dtype)
    return _write(model, target, tensors, config, tokenizer, dtype)


def _check_uniform(layers: dict[str, QuantizedTensor], format: str) -> None:
    """Raise CheckpointError where a layer cannot be expressed."""
    first_name, first = next(iter(layers.items()))
    for name, q in layers.items():
        what = f"{name} ({q.scheme}, group {q.block_size}, {'symmetric' if q.symmetric else 'affine'})"
        if not q.scheme.startswith("int"):
            raise CheckpointError(f"{what} is not a scheme of format {format!r}; try format='bitsandbytes'")
        if format == "awq" and q.bits != 4:
            raise CheckpointError(f"{what}: AWQ checkpoints hold 4 bits; try format='compressed-tensors'")
        if q.group_index is not None:
            raise CheckpointError(f"{what} keeps a group for each column, which {format!r} cannot say")
        if q.scale.shape[0] != q.shape[0] or q.shape[1] % q.block_size:
            raise CheckpointError(f"{what}: {q.shape[1]} inputs are not whole groups of {q.block_size} columns")
        per_row = q.block_size == q.shape[1] and first.block_size == first.shape[1]
        if (q.bits, q.symmetric) != (first.bits, first.symmetric) or (q.block_size != first.block_size and not per_row):
            raise CheckpointError(f"{what} differs from {first_name}: one checkpoint holds one scheme")
        rows_per_word = 32 // q.bits if 32 % q.bits == 0 else 32
        if format != "compressed-tensors" and (q.shape[0] % rows_per_word or q.shape[1] % rows_per_word):
            raise CheckpointError(f"{what}: its shape {tuple(q.shape)} does not fill whole 32-bit words")
        if format in ("gptq", "awq") and not torch.isfinite(q.scale.half()).all():
            raise CheckpointError(f"{what}: its scales exceed float16, which {format!r} stores")


def _convert(model: Any, layers: dict[str, QuantizedTensor], format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors by full name, and the `quantization_config`."""
    first = next(iter(layers.values()))
    per_row = all(q.block_size == q.shape[1] for q in layers.values())
    plain = unquantized_layers(model)
    group = -1 if per_row else first.block_size
    tensors: dict[str, Tensor] = {}
    if format == "compressed-tensors":
        for name, q in layers.items():
            tensors |= {f"{name}.{k}": v for k, v in _compressed_tensors(q).items()}
        weights = {
            "num_bits": first.bits,
            "type": "int",
            "symmetric": first.symmetric,
            "group_size": None if per_row else group,
            "strategy": "channel" if per_row else "group",
            "actorder": None,
            "dynamic": False,
            "observer": "minmax",
        }
        group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return tensors, {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": plain or ["lm_head"],
            "config_groups": {"group_0": group_0},
        }
    if format == "gptq":
        # Version 1 stores zero - 1, so a zero point of 0 would borrow from its neighbour in the word: version 2 then.
        version = 2 if any(not q.symmetric and bool((q.zero_points() == 0).any()) for q in layers.values()) else 1
        for name, q in layers.items():
            tensors |= {f"{name}.{k}": v for k, v in _gptq(q, version).items()}
        config = {
            "quant_method": "gptq",
            "bits": first.bits,
            "group_size": group,
            "desc_act": False,
            "sym": first.symmetric,
            "lm_head": False,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        }
        if left := _plain_inside(model, plain):  # readers expect codes for every other layer of the decoder
            config["dynamic"] = {rf"-:^{re.escape(name)}$": {} for name in left}
        return tensors, config
    for name, q in layers.items():
        tensors |= {f"{name}.{k}": v for k, v in _awq(q).items()}
    return tensors, {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [name for name in plain if name != "lm_head"] or None,
    }


def _check_readers_layers(model: Any, layers: dict[str, QuantizedTensor], format: str) -> None:
    """Raise CheckpointError where a reader, who builds the model from its configuration, finds no `nn.Linear` to fill."""
    with torch.device("meta"):
        built = type(model)(model.config)
    for name in layers:
        if not isinstance(kind := built.get_submodule(name), nn.Linear):
            raise CheckpointError(
                f"{name} is a {type(kind).__name__} in {type(model).__name__}, and readers of {format!r} files look for "
                "nn.Linear: save it in our own format, model.save_pretrained(path)"
            )


def _plain_inside(model: Any, plain: list[str]) -> list[str]:
    """Of the layers with ordinary weights those inside the decoder's layers."""
    prefixes = tuple(f"{prefix}." for prefix in decoder_layers(model))
    return [name for name in plain if name.startswith(prefixes)]


def _check_inside(model: Any, layers: dict[str, QuantizedTensor], format: str) -> None:
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


def _other_tensors(model: Any, layers: dict[str, QuantizedTensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
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
    model: Any, target: Path, tensors: dict[str, Tensor], config: dict, tokenizer: Any, dtype: torch.dtype | None
) -> Path:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with new_folder(target) as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.05 * size:
            raise CheckpointError(
                f"the checkpoint takes {size / 1e9:.2f} GB, {target.parent} has {free / 1e9:.2f} GB free"
            )
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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
