"""MXFP4 as in GPT-OSS's own files: its experts in four bits, everything else as ordinary weights.

``gate_up_proj_blocks`` uint8 ``[experts, out, in/32, 16]``, ``gate_up_proj_scales`` uint8 (E8M0) ``[experts, out, in/32]``;
`down_proj` likewise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from optinfer.quantization.checks import CheckpointError
from optinfer.quantization.experts import QuantizedExperts
from optinfer.quantization.formats.small_floats import file_order
from optinfer.quantization.schemes import SCHEMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FORMAT", "convert"]

FORMAT: Final = "mxfp4"


def convert(
    model: PreTrainedModel, linears: list[str], experts: dict[str, QuantizedExperts], plain: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors by full name, and the `quantization_config`.

    Raises CheckpointError: quantized layers other than GPT-OSS's experts, another scheme, or columns that do not fill blocks.
    """
    if linears:
        raise CheckpointError(
            f"{linears[0]} is quantized, and readers of mxfp4 files expect codes for experts alone: quantize with "
            f"skip=[{linears[0].split('.')[-2]!r}, …]"
        )
    tensors = {}
    for name, one in experts.items():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if owner != "GptOssExperts" or one.scheme != SCHEMES[FORMAT] or one.in_features % 32:
            raise CheckpointError(
                f"{name} ({one.scheme.name}, {one.in_features} inputs, of {owner}): mxfp4 files hold GPT-OSS's experts, "
                "quantized to mxfp4, in whole blocks of 32 inputs"
            )
        codes, scales = (one.get_parameter(key).data for key in ("weight", "weight_scale"))
        tensors[f"{name}_blocks"] = file_order(codes).unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = scales
    return tensors, {"quant_method": FORMAT, "modules_to_not_convert": plain}
