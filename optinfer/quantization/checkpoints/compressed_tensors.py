"""compressed-tensors, pack-quantized: int2 … int8, as vLLM and transformers read them.

``weight_packed [out, in*b/32]`` along `in`, ``weight_scale [out, in/g]``, ``weight_shape [2]``, and of affine grids
``weight_zero_point [out*b/32, in/g]``, packed along `out`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.quantization.checkpoints.words import group_size, pack_int32
from optinfer.quantization.formats.grid import GridTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["convert"]


def convert(
    model: PreTrainedModel, layers: dict[str, GridTensor], plain: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors by full name, and the `quantization_config`. `plain`: linear layers that are not quantized."""
    first = next(iter(layers.values()))
    group = group_size(layers)
    if not first.symmetric:
        warnings.warn(
            "transformers cannot load affine compressed-tensors checkpoints (it expects unpacked zero points, the format "
            "packs them): use vLLM, or quantize with symmetric=True, or write format='awq' or 'gptq'",
            stacklevel=3,
        )
    tensors = {f"{name}.{k}": v for name, q in layers.items() for k, v in _layer(q).items()}
    weights = {
        "num_bits": first.bits,
        "type": "int",
        "symmetric": first.symmetric,
        "group_size": None if group == -1 else group,
        "strategy": "channel" if group == -1 else "group",
        "actorder": None,
        "dynamic": False,
        "observer": "minmax",
    }
    return tensors, configuration("pack-quantized", weights, plain)


def configuration(format: str, weights: dict[str, Any], plain: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers, but for `plain`, are quantized alike."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": plain or ["lm_head"],
        "config_groups": {"group_0": group | {"format": format}},
    }


def _layer(q: GridTensor) -> dict[str, Tensor]:
    assert isinstance(q.scale, Tensor)  # only codebooks nest their scales
    tensors = {
        "weight_packed": pack_int32(q.codes(), q.bits),
        "weight_scale": q.scale,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if not q.symmetric:
        tensors["weight_zero_point"] = pack_int32(q.zero_points(), q.bits, dim=0)
    return tensors
