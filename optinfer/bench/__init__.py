"""Benchmarks: correctness before timing, peers side by side in one run, results with their provenance.

A suite is a module of this package with ``run(quick: bool = False) -> list[dict]``: one flat dict per measurement, with
the field ``peer`` naming whose code ran and ``seconds`` the median time.
"""

import importlib
from typing import Any

SUITES = (
    "quantization",
    "quantized_matmul",
    "attention",
    "kv_cache",
    "paged_attention",
    "speculative",
    "serving",
)


def run(suite: str, quick: bool = False) -> list[dict[str, Any]]:
    """Run one suite.

    Raises:
        ValueError: there is no such suite.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, or all; not {suite!r}")
    return importlib.import_module(f"optinfer.bench.{suite}").run(quick=quick)
