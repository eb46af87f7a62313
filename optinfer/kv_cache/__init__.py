"""Lesson 4: the KV cache in pages. The block manager is pure Python; torch loads only with the tensors."""

import importlib
from typing import Any

# Public name -> the submodule that defines it; resolved on first use, so that the manager needs no torch.
_PUBLIC = {
    **dict.fromkeys(
        [
            "Allocation",
            "BlockCopy",
            "BlockManager",
            "DuplicateSequence",
            "IntegrityError",
            "OutOfBlocks",
            "UnknownSequence",
        ],
        "block_manager",
    ),
    **dict.fromkeys(["Event", "State", "replay"], "events"),
    **dict.fromkeys(
        [
            "ContiguousAllocator",
            "PagedAllocator",
            "Request",
            "Usage",
            "parallel_sampling_saving",
            "shared_prefix_saving",
            "sharegpt_like",
            "simulate",
        ],
        "contiguous",
    ),
    **dict.fromkeys(["kv_bytes", "kv_bytes_per_token", "num_blocks_for", "num_sequences_that_fit"], "memory"),
    **dict.fromkeys(["LayerCache", "cache_layers"], "layers"),
    **dict.fromkeys(["LayerGroup", "LayerGroupManager", "layer_groups"], "groups"),
    **dict.fromkeys(["absorbed_latent_attention", "expanded_latent_attention"], "latent"),
    **dict.fromkeys(["find_needle", "judge_cache", "quantized_kv", "sink_cache"], "smaller"),
    **dict.fromkeys(["PagedCache"], "paged_cache"),
    **dict.fromkeys(["paged_attention", "paged_attention_reference"], "attention"),
    **dict.fromkeys(["KVPool"], "pool"),
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
