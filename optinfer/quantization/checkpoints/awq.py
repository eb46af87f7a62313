"""AWQ files (GEMM): int4.

``qweight [in, out/8]`` and ``qzeros [in/g, out/8]``, both packed along `out`, ``scales [in/g, out]`` float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.quantization.checkpoints.words import group_size, pack_int32
from optinfer.quantization.formats.grid import GridTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["convert"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns sits in nibble 0, 1 …: the order AWQ's kernel unpacks in


def convert(
    model: PreTrainedModel, layers: dict[str, GridTensor], plain: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors by full name, and the `quantization_config`. `plain`: linear layers that are not quantized."""
    tensors = {f"{name}.{k}": v for name, q in layers.items() for k, v in _layer(q).items()}
    return tensors, {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size(layers),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [name for name in plain if name != "lm_head"] or None,
    }


def _layer(q: GridTensor) -> dict[str, Tensor]:
    order = torch.tensor(ORDER, device=q.scale.device)

    def pack(columns: Tensor) -> Tensor:
        return pack_int32(columns.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    return {
        "qweight": pack(q.codes().T),
        "qzeros": pack(q.zero_points().T),
        "scales": q.scale.T.to(torch.float16).contiguous(),
    }
