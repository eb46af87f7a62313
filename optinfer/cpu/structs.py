"""The structs of the C++ files, field by field. `library.py` compares their sizes when it loads the library."""

import ctypes
from ctypes import c_float, c_int64, c_uint8, c_void_p

import torch

# `Kind` of numbers.hpp
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
SIGNED8, UNSIGNED8, NIBBLES, CODEBOOK = 3, 4, 5, 6


class Numbers(ctypes.Structure):
    """A tensor of floating-point numbers."""

    _fields_ = (("data", c_void_p), ("kind", c_int64))

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Numbers":
        return cls(tensor.data_ptr(), KINDS[tensor.dtype])


class Weight(ctypes.Structure):
    """See products.hpp."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "rows", "columns", "row_bytes")),
        ("data", c_void_p),
        ("bias", Numbers),
        *((name, c_int64) for name in ("group", "groups")),
        ("scales", Numbers),
        *((name, c_void_p) for name in ("scale_codes", "dynamic", "nested", "offset", "zeros")),
        ("zero_bytes", c_int64),
        ("zero", c_float),
        ("minimums", Numbers),
        ("values", c_uint8 * 32),
        ("value_unit", c_float),
    )


class _Pointing(ctypes.Structure):
    """A struct that keeps the tensors it points to."""

    tensors: tuple[torch.Tensor | None, ...]


class Pages(_Pointing):
    """One layer's keys and values; see attention.hpp. Strides in numbers."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, c_int64) for name in ("kind", "block_size", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("block_stride", "token_stride", "head_stride")),
    )

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> "Pages":
        """keys, values [blocks, block_size, kv_heads, head_dim]; of int8 ones also their scales, one per head."""
        if keys.stride() != values.stride() or keys.stride(3) != 1:
            keys, values = keys.contiguous(), values.contiguous()
        if key_scales is not None and value_scales is not None:
            key_scales, value_scales = key_scales.contiguous(), value_scales.contiguous()
        block_stride, token_stride, head_stride, _ = keys.stride()
        pages = cls(
            keys.data_ptr(),
            values.data_ptr(),
            None if key_scales is None else key_scales.data_ptr(),
            None if value_scales is None else value_scales.data_ptr(),
            KINDS[keys.dtype],
            *keys.shape[1:],
            *(block_stride, token_stride, head_stride),
        )
        pages.tensors = keys, values, key_scales, value_scales
        return pages


class Sequences(_Pointing):
    _fields_ = (
        *((name, c_int64) for name in ("count", "table_width", "tree_width")),
        *((name, c_void_p) for name in ("first_query", "context", "tables", "tree")),
    )

    @classmethod
    def of(
        cls,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        block_tables: torch.Tensor,
        tree_mask: torch.Tensor | None = None,
    ) -> "Sequences":
        """int [batch + 1], [batch], [batch, max_blocks]; bool [queries, max_queries]."""
        tensors = tuple(t.long().contiguous() for t in (query_starts, context_lens, block_tables))
        sequences = cls(*block_tables.shape, 0, *(t.data_ptr() for t in tensors))
        if tree_mask is not None:
            tree_mask = tree_mask.contiguous()
            sequences.tree_width, sequences.tree = tree_mask.shape[1], tree_mask.data_ptr()
        sequences.tensors = *tensors, tree_mask
        return sequences


class Scoring(_Pointing):
    _fields_ = (("scale", c_float), ("softcap", c_float), ("window", c_int64), ("sinks", c_void_p))

    @classmethod
    def of(cls, scale: float, softcap: float = 0.0, window: int = 0, sinks: torch.Tensor | None = None) -> "Scoring":
        """0 for softcap and window: none. sinks: float32 [heads]."""
        if sinks is not None:
            sinks = sinks.float().contiguous()
        scoring = cls(scale, softcap, window, None if sinks is None else sinks.data_ptr())
        scoring.tensors = (sinks,)
        return scoring


class Layer(ctypes.Structure):
    """See decoder.hpp."""

    _fields_ = (
        *((name, Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Numbers) for name in ("norm_attention", "norm_mlp", "norm_q", "norm_k")),
        ("pages", Pages),
        ("window", c_int64),
    )


class Decoder(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim")),
        *((name, c_float) for name in ("eps", "scale")),
        ("layers", c_void_p),
        *((name, Numbers) for name in ("embedding", "norm")),
        ("head", Weight),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("ids", "slots", "cos", "sin")),
        ("sequences", Sequences),
        ("num_logits", c_int64),
        *((name, c_void_p) for name in ("logit_rows", "logits", "states")),
    )


ALL = (Weight, Pages, Sequences, Scoring, Layer, Decoder, Step)
