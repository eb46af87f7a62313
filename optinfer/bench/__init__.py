"""Benchmarks: correctness before timing, peers side by side in one run, results with their provenance.

A suite is a module of this package with ``run(quick: bool = False)``: one row per measurement, of the class that
`optinfer.bench.rows` has for it.
"""

import importlib

from optinfer.bench.rows import Row

SUITES = (
    "quantization",
    "quantized_matmul",
    "attention",
    "kv_cache",
    "paged_attention",
    "speculative",
    "serving",
)


LONG = ("calibrated_quantization",)  # hours: by name, but not with all others


def run(suite: str, quick: bool = False) -> list[Row]:
    """Run one suite.

    Raises:
        ValueError: there is no such suite.
    """
    if suite not in SUITES + LONG:
        raise ValueError(f"suite must be one of {', '.join(SUITES + LONG)}, or all; not {suite!r}")
    return importlib.import_module(f"optinfer.bench.{suite}").run(quick=quick)
