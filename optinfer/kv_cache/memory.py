"""How large is the KV cache, and how many requests fit?"""

from math import ceil
from typing import TYPE_CHECKING, Any

from optinfer.kv_cache.block_manager import _positive
from optinfer.kv_cache.layers import BYTES, DtypeName, cache_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    Dtype = torch.dtype | DtypeName


def kv_shape(config: "PreTrainedConfig") -> tuple[int, int, int]:
    """(layers, KV heads, head dimension) of a transformers configuration whose layers all keep keys and values alike.

    Query heads that share a KV head (grouped-query attention) add nothing to the cache.

    Raises ValueError: a layer keeps something else (a latent, a state, another layer's keys), or layers differ.
    """
    layers = cache_layers(config)
    for layer in layers:
        if layer.kind not in ("full", "sliding", "chunked"):
            raise ValueError(f"pages hold keys and values; this model has layers of kind {layer.kind!r}")
    shapes = {(layer.heads, layer.key_dim, layer.value_dim) for layer in layers}
    heads, key_dim, value_dim = shapes.pop()
    if shapes or key_dim != value_dim:
        raise ValueError("pages hold keys and values of one shape; in this model they differ")
    return len(layers), heads, key_dim


def kv_bytes(config: "PreTrainedConfig", tokens: int = 1, dtype: "Dtype" = "bfloat16") -> dict[str, int]:
    """Bytes that one sequence of `tokens` tokens keeps, by kind of layer (see `optinfer.kv_cache.layers`).

    Args:
        config: a transformers configuration, or any object with its field names.
        tokens: of the sequence, the newest one included.
        dtype: float32, float16, bfloat16 or int8 (then with its scales), as a string or a torch dtype. The recurrent state of
            a linear layer stays in float32.

    Raises:
        ValueError: an unknown dtype or kind of layer.

    >>> from types import SimpleNamespace
    >>> kv_bytes(SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=32), tokens=10)
    {'full': 2560}
    """
    name, tokens = _dtype(dtype), _positive("tokens", tokens)
    found: dict[str, int] = {}
    for layer in cache_layers(config):
        found[layer.kind] = found.get(layer.kind, 0) + layer.nbytes(tokens, name)
    return found


def kv_bytes_per_token(config: "PreTrainedConfig", dtype: "Dtype" = "bfloat16", length: int = 0) -> int:
    """Bytes that the next token of a sequence adds in all layers.

    For keys and values: 2 x layers x KV heads x head_dim x bytes. A layer whose window is full adds nothing, nor does a
    layer that keeps a state or reads another layer's keys; the fixed size of a state is in `kv_bytes`.

    Args:
        config, dtype: see `kv_bytes`.
        length: tokens of the sequence so far. 0 counts all layers that keep tokens at all, as pages without windows do.
    """
    name = _dtype(dtype)
    growing = (layer for layer in cache_layers(config) if layer.window is None or length < layer.window)
    return sum(layer.bytes_per_token(name) for layer in growing)


def num_blocks_for(
    memory_bytes: int, config: "PreTrainedConfig", dtype: "Dtype" = "bfloat16", block_size: int = 16
) -> int:
    """Whole blocks that fit in `memory_bytes`."""
    if memory_bytes < 0:
        raise ValueError(f"memory_bytes must not be negative, got {memory_bytes}")
    return int(memory_bytes // (kv_bytes_per_token(config, dtype) * _positive("block_size", block_size)))


def num_sequences_that_fit(
    memory_bytes: int, config: "PreTrainedConfig", tokens: int, dtype: "Dtype" = "bfloat16", block_size: int = 16
) -> int:
    """Requests of `tokens` tokens each that fit in `memory_bytes` at the same time, sharing nothing."""
    blocks_each = ceil(_positive("tokens", tokens) / _positive("block_size", block_size))
    return num_blocks_for(memory_bytes, config, dtype, block_size) // blocks_each


def _dtype(dtype: "Dtype") -> DtypeName:
    name: Any = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got {dtype!r}")
    return name
