"""Merge linear layers that read the same input: one wide matrix product instead of three (q, k, v) or two (gate, up).

The model keeps its modules, its parameter names and its results; only the weights move into one tensor, of which each
layer's `weight` becomes a view. The first layer of a group computes for all, the others hand out what is ready.
On a CPU this is worth about a tenth of a decode step: fewer and larger products.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _SharedProduct:
    """Input and outputs of one wide product, between the first layer's call and the last one's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, widths: list[int]):
        self.weight, self.bias, self.widths = weight, bias, widths
        self.input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor, part: int) -> Tensor:
        if x is not self.input:
            self.input = x
            self.outputs = nn.functional.linear(x, self.weight, self.bias).split(self.widths, dim=-1)
        out = self.outputs[part]
        if part == len(self.widths) - 1:
            self.input, self.outputs = None, ()
        return out


@torch.no_grad()
def fuse_projections(model: nn.Module) -> int:
    """Fuse every group of plain `nn.Linear` layers of `model` in place; returns how many groups were fused.

    Quantized layers, layers with hooks or adapters, and groups where only some layers have a bias are left alone.
    Calling it again changes nothing.
    """
    fused = 0
    for parent in model.modules():
        for names in GROUPS:
            layers: list[Any] = [getattr(parent, name, None) for name in names]
            if all(map(_is_plain, layers)) and len({layer.bias is None for layer in layers}) == 1:
                _fuse(layers)
                fused += 1
    return fused


def _is_plain(layer: Any) -> bool:
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not layer._forward_pre_hooks


def _fuse(layers: list[Any]) -> None:
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    shared = _SharedProduct(weight, bias, [layer.out_features for layer in layers])
    row = 0
    for part, layer in enumerate(layers):
        end = row + layer.out_features
        layer.weight.data = weight[row:end]
        if bias is not None:
            layer.bias.data = bias[row:end]
        layer.forward = functools.partial(shared, part=part)
        row = end


def merged_weight(layers: list[Any]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the wide product behind a fused group; None if these layers are not one group."""
    shared = [getattr(vars(layer).get("forward"), "func", None) for layer in layers]
    first = shared[0]
    if isinstance(first, _SharedProduct) and all(s is first for s in shared) and len(layers) == len(first.widths):
        return first.weight, first.bias
    return None
