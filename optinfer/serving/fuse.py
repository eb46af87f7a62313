"""Linear layers that read the same input as one wide product: one instead of three (q, k, v) or two (gate, up).

The model keeps its modules, its parameters, their names and their values. Only the weights' memory moves into one
tensor, of which each layer's `weight` becomes a view; training, saving and moving the model go on as before.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from optinfer import cpu


@torch.no_grad()
def merge(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the wide product; None for what is not a group of plain `nn.Linear` layers.

    Merging a group a second time returns the same memory.
    """
    plain = [layer for layer in layers if _is_plain(layer)]
    biases = [layer.bias for layer in plain if layer.bias is not None]
    if len(plain) < len(layers) or len(biases) not in (0, len(plain)):
        return None
    weight = _in_one_piece([layer.weight for layer in plain])
    bias = _in_one_piece(biases) if biases else None
    return weight, bias


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return cpu.is_plain(layer) and "forward" not in vars(layer) and not layer._forward_pre_hooks


def _in_one_piece(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters' values one after the other, which the parameters are views of from now on."""
    first = parameters[0]
    sizes = [parameter.shape[0] for parameter in parameters]
    whole = first.detach().as_strided((sum(sizes), *first.shape[1:]), first.stride()) if _adjacent(parameters) else None
    if whole is None:
        whole = first.detach() if len(parameters) == 1 else torch.cat([parameter.detach() for parameter in parameters])
        for parameter, view in zip(parameters, whole.split(sizes)):
            parameter.data = view
    return whole


def _adjacent(parameters: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before it ends, in the same memory."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    ends = [p.data_ptr() + p.nbytes for p in parameters[:-1]]
    contiguous = all(parameter.is_contiguous() for parameter in parameters)
    return contiguous and len(storages) == 1 and ends == [p.data_ptr() for p in parameters[1:]]
