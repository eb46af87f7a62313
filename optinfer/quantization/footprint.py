"""How much memory a model takes under a scheme, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from optinfer.quantization.experts import QuantizedExperts, transposed
from optinfer.quantization.formats.tensor import GroupSize
from optinfer.quantization.layers import select_layers
from optinfer.quantization.linear import QuantizedLinear, matrix_of
from optinfer.quantization.schemes import Scheme, SchemeName, resolve_scheme

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["allocated_bytes", "empty_model", "memory_footprint"]


def memory_footprint(
    config_or_model: PreTrainedConfig | nn.Module,
    scheme: SchemeName | Scheme | None = None,
    *,
    dtype: torch.dtype | None = None,
    group_size: GroupSize = None,
    double_quant: bool = False,
    symmetric: bool = True,
    skip: str | Iterable[str] = (),
) -> int:
    """Bytes of a model's parameters once `quantize(model, scheme, …)` has run. Nothing is loaded or allocated.

    Args:
        config_or_model: a transformers configuration (built on the meta device), or a model, which stays as it is.
        scheme: as for `quantize`; None: not quantized.
        dtype: of what is not quantized; default: the model's own, for a configuration bfloat16.
        group_size, double_quant, symmetric, skip: as for `quantize`.

    Returns:
        Bytes of all parameters, tied ones once. Buffers (rotary tables, some kilobytes) are not weights.

    Raises:
        ValueError: as `quantize`: unknown scheme or option, stacks of matrices of an unknown kind, quantized already.
    """
    if scheme is not None and not isinstance(scheme, Scheme):
        scheme = resolve_scheme(scheme, group_size, double_quant, symmetric)
    model = config_or_model
    if not isinstance(model, nn.Module):
        model = empty_model(model, dtype or torch.bfloat16)
    if scheme is not None and any(isinstance(m, (QuantizedLinear, QuantizedExperts)) for m in model.modules()):
        raise ValueError("the model is quantized already: pass scheme=None, or the original model")

    def bytes_of(parameter: torch.Tensor) -> int:
        item = dtype.itemsize if dtype and parameter.is_floating_point() else parameter.element_size()
        return parameter.numel() * item

    total = sum(bytes_of(p) for p in model.parameters())
    if scheme is not None:
        selection = select_layers(model, skip)
        for name, stack in selection.stacks.items():
            experts, rows, columns = stack.shape
            shape = (columns, rows) if transposed(model, name) else (rows, columns)
            total += experts * scheme.nbytes(shape, dtype or stack.dtype) - bytes_of(stack)
        for layer in selection.layers.values():
            rows, columns = matrix_of(layer).shape
            total += scheme.nbytes((rows, columns), dtype or layer.weight.dtype) - bytes_of(layer.weight)
    return total


def allocated_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters really occupy, counted by their storages."""
    storages = {}
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def empty_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The causal language model of a configuration, without memory for its weights (meta device)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
