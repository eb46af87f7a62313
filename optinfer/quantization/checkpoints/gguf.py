"""GGUF, llama.cpp's file: the default model's linear layers as they came."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optinfer import models
from optinfer.quantization.formats.q4_1 import Q41Tensor
from optinfer.quantization.layers import replace_module
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.model import mark_quantized
from optinfer.quantization.schemes import SCHEMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_as_shipped"]


def load_as_shipped(
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    gguf: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The default model with every linear layer in the 4 bits that it was published in.

    `optinfer.load_model` rounds what these codes stand for to bf16; here they stay codes, so the layers are exact, and a
    third of the size. The embedding, which is also the head, was published in 8 bits and is in `dtype` as there.

    Args:
        dtype, device: see `optinfer.load_model`.
        gguf: the file, where it is at hand; default: fetched.

    Returns:
        ``(model, tokenizer)``, the model in eval mode, its scheme ``q4_1``.

    Raises:
        OptinferError: the file cannot be had.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    model, tokenizer = models.load_model(dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as work:
        reader = GGUFReader(gguf or models.default_gguf(Path(work)))
        for tensor in reader.tensors:
            if tensor.tensor_type != GGMLQuantizationType.Q4_1:
                continue
            blocks = torch.from_numpy(tensor.data.copy())
            if tensor.name.split(".")[-2] in ("attn_q", "attn_k"):
                blocks = models.half_rotation_order(blocks, model.config.head_dim)
            old = model.get_submodule(models.transformers_name(tensor.name).removesuffix(".weight"))
            q = Q41Tensor.from_file(blocks, model.dtype).to(model.device)
            replace_module(model, old, QuantizedLinear.from_quantized(q))
    mark_quantized(model, SCHEMES["q4_1"])
    return model.eval(), tokenizer
