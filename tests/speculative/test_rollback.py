"""Caches are cut back to what was accepted."""

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from optinfer.speculative.rollback import truncate


def test_caches_of_transformers_5_15_are_cut_too(monkeypatch):
    """There no layer says whether it can be cropped."""
    for layer_type in (CacheLayerMixin, DynamicLayer):
        monkeypatch.delattr(layer_type, "is_croppable", raising=False)
    cache = DynamicCache()
    keys = torch.randn(1, 2, 9, 4)
    for layer in range(2):
        cache.update(keys, keys, layer)
    truncate(cache, 5)
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5]
    assert torch.equal(cache.layers[1].keys, keys[:, :, :5])
