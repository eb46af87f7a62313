"""What each layer of a model keeps of the tokens before.

Two tensors per layer, keys and values of every token, is one kind among several:

    full      keys and values of all tokens
    sliding   of the last `window` tokens (Mistral, Gemma, GPT-OSS)
    chunked   of the current chunk of `window` tokens (Llama 4)
    latent    one vector that all heads expand, and one rotary key (multi-head latent attention: DeepSeek, Kimi)
    linear    a state whose size does not depend on the number of tokens (Qwen3-Next, Kimi Linear)
    shared    nothing: it reads the keys and values of an earlier layer (Gemma 3n)

Counted is what a layer holds while the newest token is computed. Pure Python: it reads configurations, no tensors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DtypeName = Literal["float32", "float16", "bfloat16", "int8"]
BYTES: dict[DtypeName, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4  # int8 keeps one fp32 scale per token and head, for keys and for values


@dataclass(frozen=True)
class LayerCache:
    """One layer's share of the cache.

    Attributes:
        kind: see the module.
        heads, key_dim, value_dim: per token, `heads` vectors of `key_dim` and as many of `value_dim` numbers. Of a latent
            layer the "key" is the latent and the "value" the rotary key, as transformers stores them.
        window: most tokens that are kept; None: all.
        state: numbers kept whatever the length, in the model's dtype (a convolution's last inputs).
        state_fp32: the same, always in float32 (the recurrent state).
    """

    kind: str
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None
    state: int = 0
    state_fp32: int = 0

    def tokens(self, length: int) -> int:
        """How many of a sequence's `length` tokens are kept."""
        return length if self.window is None else min(length, self.window)

    @property
    def numbers_per_token(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)

    def bytes_per_token(self, dtype: DtypeName = "bfloat16") -> int:
        """Bytes of each token that is kept; `dtype` is a key of `BYTES`."""
        scales = 2 * self.heads * SCALE_BYTES if dtype == "int8" else 0
        return self.numbers_per_token * BYTES[dtype] + scales

    def nbytes(self, length: int, dtype: DtypeName = "bfloat16") -> int:
        """Bytes for a sequence of `length` tokens. Only keys and values become int8; a state stays in 16 bits then."""
        state = self.state * max(BYTES[dtype], 2) + self.state_fp32 * 4
        return self.tokens(length) * self.bytes_per_token(dtype) + state


def cache_layers(config: "PreTrainedConfig") -> tuple[LayerCache, ...]:
    """What each layer keeps, first layer first.

    Args:
        config: a transformers configuration, or any object with its field names.

    Raises:
        ValueError: it does not describe an attention model, or has a kind of layer that is not known here.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not _has(config, "num_hidden_layers"):
        raise ValueError("config does not describe an attention model: it has no num_hidden_layers")
    # Where layers differ, transformers has a configuration for each of them.
    configs = list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    layers = []
    for index, layer in enumerate(configs):
        for field in _FOREIGN:
            if getattr(layer, field, None):
                raise ValueError(f"{_name(config)} has {field}: a kind of cache that is not counted here")
        kind = _layer_type(layer, index)
        if kind not in _READERS:
            raise ValueError(f"{_name(config)} has layers of kind {kind!r}; known are {', '.join(_READERS)}")
        layers.append(LayerCache("shared") if index >= len(configs) - shared else _READERS[kind](layer))
    return tuple(layers)


# Fields of caches that hold more, or something else, than the kinds above: indexers, compressed blocks, two attentions per
# layer, heads that differ between layers, states of other recurrences, attention beside a recurrence, a learned prompt, none.
_FOREIGN = (
    "index_head_dim", "index_topk", "compress_rates", "compress_ratios", "zero_expert_num", "global_head_dim",
    "num_global_key_value_heads", "mamba_d_state", "mamba_num_heads", "mamba_expand", "ssm_state_size", "state_size",
    "attn_layer_period", "layers_block_type", "hybrid_override_pattern", "hybrid_layer_pattern", "attention_types",
    "cross_attention_layers", "is_encoder_decoder", "swa_num_key_value_heads", "attention_value_scale",
    "prompt_length", "afn",
)  # fmt: skip


def _layer_type(config: Any, index: int) -> str:
    if getattr(config, "layer_types", None):
        return config.layer_types[index]
    if getattr(config, "sliding_window", None):
        return "sliding_attention"
    return "chunked_attention" if getattr(config, "attention_chunk_size", None) else "full_attention"


def _keys_and_values(config: Any, kind: str, window: int | None) -> LayerCache:
    if not _has(config, "num_attention_heads"):
        raise ValueError("config does not describe an attention model: it has no num_attention_heads")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or _kv_heads_of_falcon(config) or heads
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        if not _has(config, "hidden_size"):
            raise ValueError("config does not describe an attention model: neither head_dim nor hidden_size")
        head_dim = config.hidden_size // heads
    value_dim = getattr(config, "v_head_dim", None) or head_dim
    return LayerCache(kind, kv_heads, head_dim, value_dim, window)


def _kv_heads_of_falcon(config: Any) -> int | None:
    if getattr(config, "new_decoder_architecture", False):
        return config.num_kv_heads
    return 1 if getattr(config, "multi_query", False) else None


def _full(config: Any) -> LayerCache:
    if getattr(config, "kv_lora_rank", None):
        return LayerCache("latent", 1, config.kv_lora_rank, config.qk_rope_head_dim)
    return _keys_and_values(config, "full", None)


def _sliding(config: Any) -> LayerCache:
    return _keys_and_values(config, "sliding", config.sliding_window)


def _chunked(config: Any) -> LayerCache:
    return _keys_and_values(config, "chunked", config.attention_chunk_size)


def _linear(config: Any) -> LayerCache:
    """A state [key_dim, value_dim] per value head, and the last inputs of the convolution over queries, keys and values."""
    if _has(config, "linear_num_value_heads", "linear_num_key_heads", "linear_key_head_dim", "linear_value_head_dim"):
        key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    elif _has(config, "linear_num_heads", "linear_head_dim"):
        key_heads = value_heads = config.linear_num_heads
        key_dim = value_dim = config.linear_head_dim
    else:
        raise ValueError(f"{_name(config)} has layers of kind 'linear_attention' whose state is not known here")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return LayerCache(
        "linear", state=channels * config.linear_conv_kernel_dim, state_fp32=value_heads * key_dim * value_dim
    )


_READERS = {
    "full_attention": _full,
    "sliding_attention": _sliding,
    "chunked_attention": _chunked,
    "linear_attention": _linear,
}


def _has(config: Any, *fields: str) -> bool:
    return all(getattr(config, field, None) is not None for field in fields)


def _name(config: Any) -> str:
    return getattr(config, "model_type", None) or type(config).__name__
