"""Chapter 1: fewer bits per weight.

The names follow `bitsandbytes.functional`; the bytes of NF4, FP4 and LLM.int8() are those of bitsandbytes 0.50.
Importing this package registers the quantizer ``"optinfer"`` with transformers.
"""

import importlib
from typing import Any

from optinfer.quantization.bitsandbytes_format import load_bitsandbytes, save_bitsandbytes
from optinfer.quantization.footprint import memory_footprint
from optinfer.quantization.formats import FORMATS, NumberFormat, codebook, nf4_from_quantiles
from optinfer.quantization.four_bit import dequantize_4bit, quantize_4bit
from optinfer.quantization.hf import OptinferConfig
from optinfer.quantization.int8 import int8_matmul, quantize_int8
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.model import quantize
from optinfer.quantization.quality import Agreement, Perplexity, kl_divergence, perplexity
from optinfer.quantization.rtn import quantize_linear
from optinfer.quantization.schemes import SCHEMES, Scheme
from optinfer.quantization.tensor import QuantizedTensor

# Resolved on first use: the second half of the chapter.
_LAZY = {
    "calibrate": "calibrate",
    "gptq_quantize": "gptq",
    "gptq": "gptq",
    "awq": "awq",
    "smoothquant": "smoothquant",
    "fake_quantize": "qat",
    "qat": "qat",
    "save_checkpoint": "checkpoint",
}

__all__ = [
    "FORMATS",
    "SCHEMES",
    "Agreement",
    "NumberFormat",
    "OptinferConfig",
    "Perplexity",
    "QuantizedLinear",
    "QuantizedTensor",
    "Scheme",
    "codebook",
    "dequantize_4bit",
    "int8_matmul",
    "kl_divergence",
    "load_bitsandbytes",
    "memory_footprint",
    "nf4_from_quantiles",
    "perplexity",
    "quantize",
    "quantize_4bit",
    "quantize_int8",
    "quantize_linear",
    "save_bitsandbytes",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = importlib.import_module(f"optinfer.quantization.{_LAZY[name]}")
        value = getattr(module, name)
        globals()[name] = value  # the function wins over the submodule of the same name
        return value
    raise AttributeError(f"module 'optinfer.quantization' has no attribute {name!r}")
