"""`attn_implementation="optinfer"`: our attention inside any transformers model.

transformers asks twice. Once per forward pass it calls `attention_mask`, whose answer every layer gets; then, in every
layer, `attention_forward`. The rule between the two: None means "the last query sees the last key", which our kernels
do by themselves; anything else is a ready 4-D mask, and torch's SDPA takes over.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from optinfer.attention import needs
from optinfer.attention.dispatch import flash_attention
from optinfer.attention.reference import attention_reference, causal_mask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "optinfer"


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention: query [B, H, N, D], key and value [B, Hkv, M, D], not repeated -> [B, N, H, D], None.

    Raises UnsupportedModel, a ValueError: the layer asks for something that is not done here (dropout, attention sinks, a
    bias, whatever a family has come up with).
    """
    if dropout:
        raise needs.UnsupportedModel(f"attn_implementation='{NAME}' is for inference: dropout must be 0, got {dropout}")
    asked = needs.read_needs(module, kwargs, causal=True)
    if asked["sinks"] is not None:
        raise needs.UnsupportedModel(f"attn_implementation='{NAME}' has no attention sinks (s_aux); use 'eager'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window, softcap = asked["window"] if causal else None, asked["softcap"]
    if attention_mask is None and value.shape[-1] == key.shape[-1]:
        out = flash_attention(query, key, value, causal, scaling, window=window, softcap=softcap)
    else:
        if attention_mask is None and causal:
            attention_mask = causal_mask(query.shape[2], key.shape[2], window, query.device)
        if softcap is not None:
            out = attention_reference(query, key, value, scale=scaling, softcap=softcap, mask=attention_mask)
        else:
            gqa = query.shape[1] != key.shape[1]
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=gqa
            )
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    config: "PreTrainedConfig | None" = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """None where "the last query sees the last key" says it all, else the full bool mask [B, 1, q, kv].

    The full mask is needed for padding, packed or custom patterns, chunked attention, and caches of fixed length: a
    static cache hands over all its slots, filled or not, so its last key is not the last query's.
    """
    from transformers.masking_utils import sdpa_mask

    ends_together = kv_offset + kv_length == int(q_offset) + q_length
    padded = attention_mask is not None and not bool(attention_mask[:, -kv_length:].all())
    chunked = local_size is not None and getattr(config, "attention_chunk_size", None) is not None
    if allow_is_causal_skip and ends_together and not padded and not chunked:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,  # its idea of "causal" starts at the top left
        local_size=local_size,
        config=config,
        **kwargs,
    )


def register() -> None:
    """Make the name known to transformers; safe to call twice."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    needs.register()
