"""A linear layer on a processor: ``x @ W.T + b`` with W in 16 bits or fewer, computed in fp32.

Processors without 16-bit arithmetic multiply bfloat16 in torch hundreds of times slower than float32. Their memory holds
16-bit weights as well as any other's, though, and reading those takes half as long. So the kernels read 16 bits and
multiply 32: for few tokens faster than float32 weights, for many as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from optinfer.cpu.library import kernels
from optinfer.cpu.weights import CpuWeight

_HALVES = (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: CpuWeight) -> Tensor:
    """``x @ W.T + b`` for x ``[..., columns]``; sums in float32, the result ``[..., rows]`` in x's dtype.

    With x in bfloat16 and many tokens, codes of 4 bits may be restored to bfloat16, as a layer in bfloat16 would hold them.

    Raises:
        RuntimeError: there are no kernels here; ask `kernels()` before.
        ValueError: x has another width than the weight.
    """
    compiled = kernels()
    if compiled is None:
        raise RuntimeError("no kernels: there is no C++ compiler here")
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {columns}")
    out = compiled.linear(weight.struct, x.reshape(-1, columns).float().contiguous(), x.dtype == torch.bfloat16)
    return out.view(*x.shape[:-1], rows).to(x.dtype)


class Linear(nn.Linear):
    """`torch.nn.Linear` with the same parameters, whose products of 16-bit tensors on a CPU go through the kernels.

    Everything else (float32, other devices, no compiler, torch.compile) goes torch's way. Gradients flow as in torch,
    computed in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self._cpu_weight(x)
        if weight is None:
            return super().forward(x)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return _LinearWithGradient.apply(x, self.weight, self.bias, weight)
        return linear(x, weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__.pop("_remembered", None)  # it would keep the old tensors
        return super()._apply(fn, recurse)

    def _cpu_weight(self, x: Tensor) -> CpuWeight | None:
        return remembered(self, self.weight, self.bias, make=CpuWeight.plain) if _taken(x, self.weight) else None


def _taken(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels multiply these: 16 bits, on a CPU, and not while torch compiles."""
    if x.dtype not in _HALVES or x.dtype != weight.dtype or x.device.type != "cpu":
        return False
    return not torch.compiler.is_compiling() and kernels() is not None


def is_plain(layer: object) -> TypeGuard[nn.Linear]:
    """Whether a layer is torch's `nn.Linear` or ours, and no subclass that may compute something else."""
    return type(layer) in (nn.Linear, Linear)


def product(kind: type, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ matrix.T + bias`` as a layer of this kind computes it: by the kernels if it is a `Linear`, else by torch."""
    weight = CpuWeight.plain(matrix, bias) if issubclass(kind, Linear) and _taken(x, matrix) else None
    return nn.functional.linear(x, matrix, bias) if weight is None else linear(x, weight)


class _LinearWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pointers: CpuWeight) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return linear(x, pointers)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        if ctx.needs_input_grad[0]:
            of_x = (flat @ weight.float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = (flat.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = flat.sum(0).to(weight.dtype)
        return of_x, of_weight, of_bias, None


def use_cpu_linear(model: nn.Module) -> nn.Module:
    """Turn every plain `nn.Linear` of `model` into a `Linear`, in place: parameters, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


class _Remembered:
    """A weight's pointers and what they were made from; a copy of the layer starts without."""

    def __init__(self) -> None:
        self.source: tuple[Any, ...] | None = None
        self.weight: CpuWeight | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Remembered, ()


def remembered(layer: nn.Module, *tensors: Tensor | None, make: Callable[..., CpuWeight | None]) -> CpuWeight | None:
    """``make(*tensors)``, made anew when a tensor has moved since the last call."""
    source = tuple(None if t is None else (t.data_ptr(), t.shape, t.dtype) for t in tensors)
    memory: _Remembered | None = layer.__dict__.get("_remembered")
    if memory is None:
        memory = layer.__dict__["_remembered"] = _Remembered()
    if memory.source != source:
        memory.source, memory.weight = source, make(*tensors)
    return memory.weight
