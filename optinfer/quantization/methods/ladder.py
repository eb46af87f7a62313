"""The methods of chapter 1 by their names: one call for each rung of the ladder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from optinfer.quantization.layers import restore
from optinfer.quantization.methods.awq import Rounding, awq
from optinfer.quantization.methods.gptq import gptq
from optinfer.quantization.methods.smoothquant import smoothquant
from optinfer.quantization.model import quantize
from optinfer.quantization.schemes import SchemeName

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CALIBRATION", "EIGHT_BITS", "METHODS", "dequantize", "rung"]

Method = Literal["rtn", "gptq", "awq", "awq+gptq", "qat"]
EightBits = Literal["w8a8", "smoothquant"]  # weights and activations in 8 bits: rounded as they are, and smoothed first
Rung = Method | EightBits
METHODS, EIGHT_BITS = get_args(Method), get_args(EightBits)
CALIBRATION: dict[str, Any] = {"num_sequences": 32, "length": 256}


def rung(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Rung,
    bits: int,
    group_size: int = 64,
    symmetric: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Quantize a model in place by the name of the method; the ladder's grids are affine."""
    common: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    if method == "rtn":
        return quantize(
            model, cast(SchemeName, f"int{bits}"), group_size=group_size, symmetric=symmetric, progress=False
        )
    if method == "gptq":
        return gptq(model, tokenizer, **common, **CALIBRATION, **options)
    if method in ("awq", "awq+gptq"):
        rounding: Rounding = "gptq" if method == "awq+gptq" else "nearest"
        return awq(model, tokenizer, rounding=rounding, **common, **CALIBRATION, **options)
    if method in EIGHT_BITS:
        if bits != 8:
            raise ValueError(f"bits must be 8 for method {method!r}, got {bits}")
        if method == "w8a8":
            return quantize(model, "llm_int8", threshold=0.0, progress=False)
        return smoothquant(model, tokenizer, **CALIBRATION, **options)
    if method == "qat":
        from optinfer.quantization.methods.qat import qat

        return qat(model, tokenizer, **common, **options)
    raise ValueError(f"method must be one of {', '.join((*METHODS, *EIGHT_BITS))}; got {method!r}")


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Put ordinary linear layers with the restored weights back, in place: the same values, faster over long inputs."""
    restore(model)
    if getattr(model, "is_quantized", False):  # transformers' marks, which forbid `model.float()`
        model.is_quantized = False  # type: ignore[assignment]
        del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    return model
