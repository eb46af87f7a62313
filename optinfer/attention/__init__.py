"""Lesson 3: attention without the N x N matrix.

    flash_attention           one function, six backends
    attention_reference       the formula
    online_softmax_attention  the flash algorithm in plain torch, tile by tile
    merge_attention           attention over all keys from attention over parts
    hbm_bytes                 the memory traffic of each, predicted; HbmCounter counts it

`attn_implementation="optinfer"` is known to transformers as soon as optinfer is imported (`optinfer.plugins`).
"""

from optinfer.attention.dispatch import BACKENDS, UnsupportedBackend, flash_attention, select_backend
from optinfer.attention.online import TileStep, online_softmax_attention
from optinfer.attention.reference import attention_reference, causal_mask, merge_attention
from optinfer.attention.traffic import (
    HbmCounter,
    arithmetic_intensity,
    attention_flops,
    hbm_bytes,
    score_matrix_bytes,
)

__all__ = [
    "BACKENDS",
    "HbmCounter",
    "TileStep",
    "UnsupportedBackend",
    "arithmetic_intensity",
    "attention_flops",
    "attention_reference",
    "causal_mask",
    "flash_attention",
    "hbm_bytes",
    "merge_attention",
    "online_softmax_attention",
    "score_matrix_bytes",
    "select_backend",
]
