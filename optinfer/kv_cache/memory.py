"""How large is the KV cache of one token, and how many requests fit?"""

from math import ceil
from typing import Any

from optinfer.kv_cache.block_manager import _positive

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4  # int8 keeps one fp32 scale per token and head, for keys and for values


def kv_shape(config: Any) -> tuple[int, int, int]:
    """(layers, KV heads, head dimension) of a transformers configuration.

    Query heads that share a KV head (grouped-query attention) add nothing to the cache.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    try:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return config.num_hidden_layers, kv_heads, head_dim
    except AttributeError as error:
        raise ValueError(f"config does not describe an attention model: {error}") from error


def kv_bytes_per_token(config: Any, dtype: Any = "bfloat16") -> int:
    """Bytes that one token occupies in all layers: 2 (key and value) x layers x KV heads x head_dim x bytes.

    Args:
        config: a transformers configuration, or any object with its field names.
        dtype: float32, float16, bfloat16 or int8 (then with its scales), as a string or a torch dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _BYTES:
        raise ValueError(f"dtype must be one of {', '.join(_BYTES)}, got {dtype!r}")
    layers, kv_heads, head_dim = kv_shape(config)
    per_head = head_dim * _BYTES[name] + (SCALE_BYTES if name == "int8" else 0)
    return 2 * layers * kv_heads * per_head


def num_blocks_for(memory_bytes: int, config: Any, dtype: Any = "bfloat16", block_size: int = 16) -> int:
    """Whole blocks that fit in `memory_bytes`."""
    if memory_bytes < 0:
        raise ValueError(f"memory_bytes must not be negative, got {memory_bytes}")
    return int(memory_bytes // (kv_bytes_per_token(config, dtype) * _positive("block_size", block_size)))


def num_sequences_that_fit(
    memory_bytes: int, config: Any, tokens: int, dtype: Any = "bfloat16", block_size: int = 16
) -> int:
    """Requests of `tokens` tokens each that fit in `memory_bytes` at the same time, sharing nothing."""
    blocks_each = ceil(_positive("tokens", tokens) / _positive("block_size", block_size))
    return num_blocks_for(memory_bytes, config, dtype, block_size) // blocks_each
