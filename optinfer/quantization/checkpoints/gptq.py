"""GPTQ files: int2 … int8.

``qweight [in*b/32, out]`` packed along `in`, ``qzeros [in/g, out*b/32]`` along `out`, ``scales [in/g, out]`` float16,
``g_idx [in]``. Version 1 stores ``zero - 1``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.quantization.checkpoints.words import group_size, pack_int32
from optinfer.quantization.formats.grid import GridTensor
from optinfer.quantization.methods.calibrate import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["convert"]


def convert(
    model: PreTrainedModel, layers: dict[str, GridTensor], plain: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors by full name, and the `quantization_config`. `plain`: linear layers that are not quantized."""
    first = next(iter(layers.values()))
    # Version 1 stores zero - 1, so a zero point of 0 would borrow from its neighbour in the word: version 2 then.
    version = 2 if any(not q.symmetric and bool((q.zero_points() == 0).any()) for q in layers.values()) else 1
    tensors = {f"{name}.{k}": v for name, q in layers.items() for k, v in _layer(q, version).items()}
    config = {
        "quant_method": "gptq",
        "bits": first.bits,
        "group_size": group_size(layers),
        "desc_act": False,
        "sym": first.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    if left := _plain_inside(model, plain):  # readers expect codes for every other layer of the decoder
        config["dynamic"] = {rf"-:^{re.escape(name)}$": {} for name in left}
    return tensors, config


def _layer(q: GridTensor, version: int) -> dict[str, Tensor]:
    zeros = q.zero_points().T.to(torch.int64) - (1 if version == 1 else 0)
    return {
        "qweight": pack_int32(q.codes(), q.bits, dim=1).T.contiguous(),
        "qzeros": pack_int32(zeros, q.bits),
        "scales": q.scale.T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(q.shape[1], dtype=torch.int32, device=q.scale.device) // q.group_size,
    }


def _plain_inside(model: PreTrainedModel, plain: list[str]) -> list[str]:
    """Of the layers with ordinary weights those inside the decoder's layers."""
    prefixes = tuple(f"{prefix}." for prefix in decoder_layers(model))
    return [name for name in plain if name.startswith(prefixes)]
