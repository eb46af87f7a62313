"""Lessons 1 and 2: fewer bits per weight.

The names follow `bitsandbytes.functional`; the bytes of NF4, FP4 and LLM.int8() are those of bitsandbytes
0.50. The quantizer ``"optinfer"`` is known to transformers once optinfer is imported.
"""

# A function may share its module's name (gptq, awq, calibrate, qat, smoothquant): imported here, the name is the function.
from optinfer.quantization.awq import awq
from optinfer.quantization.bitsandbytes_format import load_bitsandbytes, save_bitsandbytes
from optinfer.quantization.calibrate import CalibrationError, InputStatistics, calibrate
from optinfer.quantization.checkpoint import CheckpointError, save_checkpoint
from optinfer.quantization.footprint import memory_footprint
from optinfer.quantization.formats import FORMATS, NumberFormat, codebook, nf4_from_quantiles
from optinfer.quantization.four_bit import dequantize_4bit, quantize_4bit
from optinfer.quantization.gptq import gptq, gptq_quantize
from optinfer.quantization.hf import OptinferConfig
from optinfer.quantization.int8 import int8_matmul, quantize_int8
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.model import quantize
from optinfer.quantization.qat import fake_quantize, qat
from optinfer.quantization.quality import Agreement, Perplexity, kl_divergence, perplexity
from optinfer.quantization.rtn import quantize_linear
from optinfer.quantization.schemes import SCHEMES, Scheme
from optinfer.quantization.smoothquant import smoothquant
from optinfer.quantization.tensor import QuantizedTensor

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
