"""The ladder of chapter 1: the perplexity that each method keeps, measured one rung at a time.

python -m optinfer.quantization.ladder --out data/results --bits 3 4 2
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from optinfer.quantization.awq import awq
from optinfer.quantization.gptq import gptq
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.model import quantize, replace_module
from optinfer.quantization.quality import perplexity

__all__ = ["METHODS", "dequantize", "measure", "rung"]

SUITE = "calibrated_quantization"
METHODS = ("rtn", "gptq", "awq", "awq+gptq", "qat")
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
    if method == "qat":
        from optinfer.quantization.qat import qat

        return qat(model, tokenizer, **common, **options)
    raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")


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
    """One row: the default model quantized by one method; None leaves it alone."""
    from optinfer import data, load_model

    model, tokenizer = load_model()
    start = time.perf_counter()
    if method is not None:
        rung(model, tokenizer, method, bits)
    seconds = time.perf_counter() - start
    found = perplexity(dequantize(model), tokenizer, data.text("evaluation"), max_tokens=EVALUATION_TOKENS)
    return {
        "method": method or "none",
        "bits": bits,
        "group_size": 64,
        "perplexity": found.value,
        "stderr": found.stderr,
        "tokens": found.tokens,
        "seconds": seconds if method else 0.0,
    }


def main() -> int:
    from optinfer import results

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="results")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    rows = [measure(None)]
    for bits in args.bits:
        for method in args.methods:
            rows.append(measure(method, bits))
            print(rows[-1], flush=True)
            results.save(SUITE, rows, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
