"""Cut a key-value cache back to its first tokens: what was drafted and rejected must leave no trace."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


def cached_tokens(cache: Cache) -> int:
    """How many tokens the cache holds."""
    return int(cache.get_seq_length())


def truncate(cache: Cache, num_tokens: int) -> None:
    """Keep the first ``num_tokens`` tokens of whatever cache this is: dynamic, static, or paged.

    Raises:
        ValueError: the cache holds fewer tokens, or a layer of it cannot forget (a recurrent state, a sliding window).
    """
    extra = cached_tokens(cache) - num_tokens
    if extra < 0:
        raise ValueError(f"cannot cut a cache of {cached_tokens(cache)} tokens to {num_tokens}")
    if extra == 0:
        return
    if hasattr(cache, "truncate"):
        cache.truncate(num_tokens)
        return
    check_can_truncate(cache)
    if all(map(_can_crop, cache.layers)):
        cache.crop(-extra)  # negative: how many to remove
    else:
        for layer in cache.layers:
            layer.cumulative_length.sub_(extra)  # a static layer overwrites the rest; the causal mask hides it


def check_can_truncate(cache: Cache, whose: str = "this model") -> None:
    """Raise ValueError unless every layer of the cache can forget its last tokens."""
    if hasattr(cache, "truncate"):
        return
    for layer in getattr(cache, "layers", []):
        static = isinstance(getattr(layer, "cumulative_length", None), torch.Tensor) and not layer.is_sliding
        sliding = getattr(layer, "is_sliding", False)
        if sliding or not (_can_crop(layer) or static):
            raise ValueError(
                f"a {type(layer).__name__} cannot forget rejected tokens, so {whose} cannot take part in speculative "
                f"decoding with this cache; use a DynamicCache without a sliding window, a StaticCache, or optinfer.PagedCache"
            )


def _can_crop(layer: Any) -> bool:
    """Whether ``crop`` cuts this layer; transformers 5.15 has no word for it, there the dynamic layers can."""
    return getattr(layer, "is_croppable", isinstance(layer, DynamicLayer))
