"""LLM inference optimization, chapter by chapter: quantization, attention, the KV cache, speculation, serving.

Importing this package is cheap: it loads neither torch nor transformers until a public name is used.
"""

import importlib
import os
import sys
from typing import Any

from optinfer import plugins

if "torch" not in sys.modules:
    # Between two operations torch's threads would spin for milliseconds, on cores that the C++ kernels' threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

# Public name -> the module that defines it; resolved on first use (PEP 562).
_PUBLIC = {
    "setup": "optinfer.course",
    "load_model": "optinfer.models",
    "this_machine": "optinfer.hardware",
    "quantize": "optinfer.quantization",
    "OptinferConfig": "optinfer.quantization",
    "PagedCache": "optinfer.kv_cache",
    "BlockManager": "optinfer.kv_cache",
    "flash_attention": "optinfer.attention",
    "speculative_decoding": "optinfer.speculative",
    "Engine": "optinfer.serving",
    "SamplingParams": "optinfer.serving",
    "save_checkpoint": "optinfer.quantization",
    "check": "optinfer.course",
    "hint": "optinfer.course",
    "solution": "optinfer.course",
    "progress": "optinfer.course",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'optinfer' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")


plugins.register_when_imported()


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
