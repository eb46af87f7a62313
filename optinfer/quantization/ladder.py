"""The ladder of chapter 1: the perplexity that each method keeps, measured one rung at a time.

python -m optinfer.quantization.ladder --out data/results --bits 3 4 2
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import time
from typing import Any

from optinfer import hardware
from optinfer.quantization.awq import awq
from optinfer.quantization.gptq import gptq
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.model import quantize, replace_module
from optinfer.quantization.quality import perplexity
from optinfer.quantization.smoothquant import smoothquant

__all__ = ["METHODS", "dequantize", "measure", "rung"]

SUITE = "calibrated_quantization"
METHODS = ("rtn", "gptq", "awq", "awq+gptq", "qat")
EIGHT_BITS = ("w8a8", "smoothquant")  # weights and activations in 8 bits: rounded as they are, and smoothed first
EVALUATION_TOKENS = 8192
CALIBRATION: dict[str, Any] = {"num_sequences": 32, "length": 256}


def rung(
    model: Any, tokenizer: Any, method: str, bits: int, group_size: int = 64, symmetric: bool = False, **options: Any
) -> Any:
    """Quantize a model in place by the name of the method; the ladder's grids are affine."""
    common: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    if method == "rtn":
        return quantize(model, f"int{bits}", block_size=group_size, symmetric=symmetric, progress=False)
    if method == "gptq":
        return gptq(model, tokenizer, **common, **CALIBRATION, **options)
    if method in ("awq", "awq+gptq"):
        rounding = "gptq" if method == "awq+gptq" else "nearest"
        return awq(model, tokenizer, rounding=rounding, **common, **CALIBRATION, **options)
    if method in EIGHT_BITS:
        if bits != 8:
            raise ValueError(f"bits must be 8 for method {method!r}, got {bits}")
        if method == "w8a8":
            return quantize(model, "llm_int8", threshold=0.0, progress=False)
        return smoothquant(model, tokenizer, **CALIBRATION, **options)
    if method == "qat":
        from optinfer.quantization.qat import qat

        return qat(model, tokenizer, **common, **options)
    raise ValueError(f"method must be one of {', '.join((*METHODS, *EIGHT_BITS))}; got {method!r}")


def dequantize(model: Any) -> Any:
    """Put ordinary linear layers with the restored weights back, in place: the same values, faster over long inputs."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedLinear):
            replace_module(model, module, module.dequantize())
    if getattr(model, "is_quantized", False):  # transformers' marks, which forbid `model.float()`
        model.is_quantized = False
        del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    return model


def measure(method: str | None, bits: int = 16) -> dict[str, Any]:
    """One row: the default model quantized by one method; None leaves it alone. 8-bit activations stay quantized."""
    from optinfer import data, load_model

    model, tokenizer = load_model()
    before = hardware.peak_memory_bytes()
    start = time.perf_counter()
    if method is not None:
        rung(model, tokenizer, method, bits)
    seconds = time.perf_counter() - start
    peak = hardware.peak_memory_bytes()
    judged = model if method in EIGHT_BITS else dequantize(model)
    found = perplexity(judged, tokenizer, data.text("evaluation"), max_tokens=EVALUATION_TOKENS)
    return {
        "method": method or "none",
        "bits": bits,
        "group_size": None if method in EIGHT_BITS else 64,
        "perplexity": found.value,
        "stderr": found.stderr,
        "tokens": found.tokens,
        "seconds": seconds if method else 0.0,
        "peak_bytes": peak,
        "peak_bytes_after_load": before,
    }


def main() -> int:
    from optinfer import results

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="results")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=[*EIGHT_BITS, *METHODS], choices=[*EIGHT_BITS, *METHODS])
    args = parser.parse_args()
    cases: list[tuple[str | None, int]] = [(None, 16)]
    cases += [(method, 8) for method in args.methods if method in EIGHT_BITS]
    cases += [(method, bits) for bits in args.bits for method in args.methods if method in METHODS]
    context = multiprocessing.get_context("spawn")
    rows = []
    for case in cases:  # each in a process of its own: the peak of memory is then the method's
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
            rows.append(process.submit(measure, *case).result())
        print(rows[-1], flush=True)
        results.save(SUITE, rows, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
