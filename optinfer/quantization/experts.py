"""Experts of a mixture, whose matrices lie stacked in one parameter, quantized one by one.

transformers keeps all experts of a layer in `gate_up_proj` and `down_proj`, [experts, out, in] (GPT-OSS: [experts, in, out]).
The plain loop over experts takes one matrix at a time, ``self.gate_up_proj[i]``, so the stack may be any object that has
them: here one that restores the matrix it is asked for. Faster loops that read the whole stack are switched off; Llama 4
has no other than `torch.bmm`, so that is answered too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from optinfer.quantization.checks import CheckpointError
from optinfer.quantization.linear import apply_keeping_dtypes, parameter_name, tensor_name
from optinfer.quantization.schemes import Scheme

__all__ = ["QuantizedExperts", "expert_stacks", "quantize_experts", "restore_experts"]


PLAIN = {
    "Llama4TextExperts": True,
    "JetMoeParallelExperts": False,
}  # without a choice of loops; whether they hold [in, out]


class Matrices(nn.Module):
    """Matrices of one shape [experts, rows, columns], handed out by index and to `torch.bmm`."""

    shape: tuple[int, int, int]

    def __getitem__(self, index: Any) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.bmm and len(args) == 2 and isinstance(args[1], cls) and not kwargs:
            return torch.stack([x @ args[1][i] for i, x in enumerate(args[0])])
        return NotImplemented  # torch then raises TypeError


class QuantizedExperts(Matrices):
    """A stack of quantized matrices; indexing restores one.

    The stored tensors are those of `QuantizedLinear` with a first dimension for the experts.

    Args:
        num_experts, out_features, in_features: of the stack; a matrix is quantized along `in_features`.
        transposed: whoever indexes wants [in, out].
    """

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        scheme: Scheme,
        transposed: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.out_features, self.in_features = num_experts, out_features, in_features
        self.scheme, self.transposed, self.dtype = scheme, transposed, dtype
        matrix = (in_features, out_features) if transposed else (out_features, in_features)
        self.shape = (num_experts, *matrix)
        for name, (shape, stored_dtype) in self.stored().items():
            empty = torch.empty(shape, dtype=stored_dtype, device=device)
            self.register_parameter(parameter_name(name), nn.Parameter(empty, requires_grad=False))

    @classmethod
    def like(cls, stack: Tensor, scheme: Scheme, transposed: bool, device: Any = None) -> QuantizedExperts:
        """An empty one for a stack of weights."""
        experts, rows, columns = stack.shape
        if transposed:
            rows, columns = columns, rows
        return cls(experts, rows, columns, scheme, transposed, stack.dtype, device or stack.device)

    def stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor."""
        one = self.scheme.stored((self.out_features, self.in_features), self.dtype)
        return {name: ((self.num_experts, *shape), dtype) for name, (shape, dtype) in one.items()}

    @torch.no_grad()
    def fill(self, stack: Tensor) -> QuantizedExperts:
        """Quantize a stack, one matrix at a time."""
        for i, matrix in enumerate(stack.detach()):
            q = self.scheme.quantize(matrix.T.contiguous() if self.transposed else matrix)
            for name, tensor in q.tensors().items():
                self._parameters[parameter_name(name)][i].copy_(tensor)  # type: ignore[index]
        return self

    def __getitem__(self, index: Any) -> Tensor:
        tensors = {tensor_name(n): p.data[index] for n, p in self._parameters.items() if p is not None}
        q = self.scheme.assemble(tensors, (self.out_features, self.in_features), self.dtype)
        return q.dequantize().T if self.transposed else q.dequantize()

    def dequantize(self) -> Tensor:
        """The whole stack, restored."""
        return torch.stack([self[i] for i in range(self.num_experts)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        apply_keeping_dtypes(self, super()._apply, fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features} -> {self.out_features}), {self.scheme.name}"


def expert_stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Stacks that can be quantized, by name: those of modules that transformers knows as experts."""
    return {
        f"{name}.{own}" if name else own: parameter
        for name, module in model.named_modules()
        if plain_loop(module) is not None
        for own, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3
    }


def transposed(model: nn.Module, name: str) -> bool:
    """Whether a stack holds its matrices as [in, out]."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return bool(getattr(owner, "is_transposed", PLAIN.get(type(owner).__name__, False)))


def quantize_experts(model: nn.Module, name: str, scheme: Scheme) -> None:
    """Exchange the stack `name` for a quantized one, in place."""
    stack = model.get_parameter(name)
    put_experts(model, name, QuantizedExperts.like(stack, scheme, transposed(model, name)).fill(stack))


def put_experts(model: nn.Module, name: str, experts: nn.Module) -> None:
    """Let the module that owns the stack `name` take its matrices from `experts`."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    del module._parameters[own]
    module._modules[own] = experts
    one_by_one(module)


def restore_experts(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put restored stacks in the place of all quantized ones."""
    for module in list(model.modules()):
        quantized = {own: child for own, child in module._modules.items() if isinstance(child, QuantizedExperts)}
        for own, experts in quantized.items():
            del module._modules[own]
            module.register_parameter(own, nn.Parameter(experts.dequantize().to(dtype or experts.dtype), False))
        if quantized:
            vars(module).pop("forward", None)


def quantized_experts(model: nn.Module) -> Iterator[tuple[str, QuantizedExperts]]:
    """All quantized stacks, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, QuantizedExperts))


def refuse_experts(model: nn.Module, format: str) -> None:
    """Raise CheckpointError if a model has quantized stacks: other formats hold experts in layouts of their own."""
    for name, _ in quantized_experts(model):
        raise CheckpointError(
            f"{name} is a stack of quantized experts, which is not written as {format} here: quantize with "
            f"skip=[{name.rpartition('.')[0].rpartition('.')[2]!r}], or keep it in our own format (model.save_pretrained)"
        )


def one_by_one(module: nn.Module) -> None:
    """Let a module of experts use its plain loop, whatever the configuration says."""
    loop = plain_loop(module)
    assert loop is not None
    vars(module)["forward"] = MethodType(loop, module)


def plain_loop(module: nn.Module) -> Callable | None:
    """The loop over experts that takes matrices one by one; None for modules that are no known kind of experts.

    Where there are several, transformers' `use_experts_implementation` has wrapped this one.
    """
    if type(module).__name__ in PLAIN:
        return type(module).forward
    return getattr(type(module).forward, "__wrapped__", None) if hasattr(module, "is_transposed") else None
