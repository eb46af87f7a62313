"""Lessons 1 and 2: fewer bits per weight.

The names follow `bitsandbytes.functional`; the bytes of NF4, FP4 and LLM.int8() are those of bitsandbytes
0.50. Nothing here imports transformers until a model needs it.
"""

from typing import Any

from optinfer.quantization.checkpoints.bitsandbytes import load_bitsandbytes
from optinfer.quantization.checkpoints.save import CheckpointError, save_bitsandbytes, save_checkpoint
from optinfer.quantization.footprint import memory_footprint
from optinfer.quantization.formats.codebook import dequantize_4bit, quantize_4bit
from optinfer.quantization.formats.grid import quantize_linear
from optinfer.quantization.formats.llm_int8 import int8_matmul, quantize_int8
from optinfer.quantization.formats.tensor import QuantizedTensor
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.methods.awq import awq
from optinfer.quantization.methods.calibrate import CalibrationError, InputStatistics, calibrate
from optinfer.quantization.methods.gptq import gptq, gptq_quantize
from optinfer.quantization.methods.qat import fake_quantize, qat
from optinfer.quantization.methods.smoothquant import smoothquant
from optinfer.quantization.model import quantize
from optinfer.quantization.number_formats import FORMATS, NumberFormat, codebook, nf4_from_quantiles
from optinfer.quantization.quality import Agreement, Perplexity, Reference, kl_divergence, perplexity
from optinfer.quantization.schemes import SCHEMES, Scheme

__all__ = [
    "FORMATS",
    "SCHEMES",
    "Agreement",
    "CalibrationError",
    "CheckpointError",
    "InputStatistics",
    "NumberFormat",
    "OptinferConfig",
    "Perplexity",
    "QuantizedLinear",
    "QuantizedTensor",
    "Reference",
    "Scheme",
    "awq",
    "calibrate",
    "codebook",
    "dequantize_4bit",
    "fake_quantize",
    "gptq",
    "gptq_quantize",
    "int8_matmul",
    "kl_divergence",
    "load_bitsandbytes",
    "memory_footprint",
    "nf4_from_quantiles",
    "perplexity",
    "qat",
    "quantize",
    "quantize_4bit",
    "quantize_int8",
    "quantize_linear",
    "save_bitsandbytes",
    "save_checkpoint",
    "smoothquant",
]


def __getattr__(name: str) -> Any:
    if name == "OptinferConfig":
        from optinfer.quantization.hf import OptinferConfig

        return OptinferConfig
    raise AttributeError(f"module 'optinfer.quantization' has no attribute {name!r}")
