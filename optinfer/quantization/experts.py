"""Experts of a mixture, whose matrices lie stacked in one parameter, quantized one by one.

transformers keeps all experts of a layer in `gate_up_proj` and `down_proj`, [experts, out, in] (GPT-OSS: [experts, in, out]).
The plain loop over experts takes one matrix at a time, ``self.gate_up_proj[i]``, so the stack may be any object that has
them: here one that restores the matrix it is asked for. Faster loops that read the whole stack are switched off; Llama 4
has no other than `torch.bmm`, so that is answered too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from optinfer.quantization.checks import CheckpointError
from optinfer.quantization.formats.tensor import QuantizedTensor
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
    def like(
        cls, stack: Tensor, scheme: Scheme, transposed: bool, device: torch.device | str | None = None
    ) -> QuantizedExperts:
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
    def fill(self, matrices: Iterable[QuantizedTensor]) -> QuantizedExperts:
        """Take in the experts' matrices ``[out, in]``, one by one."""
        for i, q in enumerate(matrices):
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


class SeparateExperts(Matrices):
    """A stack in which each matrix is a linear layer, named by its number: its inputs can be watched, and its weight changed."""

    def __init__(self, stack: Tensor, transposed: bool):
        super().__init__()
        self.shape = tuple(stack.shape)  # type: ignore[assignment]
        for i, matrix in enumerate(stack.detach()):
            weight = nn.Parameter(matrix.T.contiguous() if transposed else matrix)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = weight
            self.add_module(str(i), layer)

    def __getitem__(self, index: Any) -> Any:
        return _Factor(self.get_submodule(str(int(index))))


class _Factor:
    """What `SeparateExperts` hands out: whoever multiplies by it runs the layer."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__) and not kwargs:
            x, factor, *bias = args
            return factor.layer(x) if not bias or bias[0] is None else factor.layer(x) + bias[0]
        raise ValueError(f"experts are computed by torch's {func.__name__}, which cannot be followed to one of them")


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
    stack, lies = model.get_parameter(name), transposed(model, name)
    matrices = (scheme.quantize(matrix.T.contiguous() if lies else matrix) for matrix in stack.detach())
    put_experts(model, name, QuantizedExperts.like(stack, scheme, lies).fill(matrices))


def separate_experts(model: nn.Module) -> None:
    """Let each expert of a model be linear layers of its own, in place: `SeparateExperts` where the stacks are."""
    for name, stack in expert_stacks(model).items():
        put_experts(model, name, SeparateExperts(stack, transposed(model, name)))


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
    if not (stacks := dict(quantized_experts(model))):
        return
    name = next(iter(stacks))
    count = sum(math.prod(experts.shape) for experts in stacks.values())
    layers: Any = [m for m in model.modules() if hasattr(m, "in_features") and not isinstance(m, QuantizedExperts)]
    share = count / (count + sum(layer.in_features * layer.out_features for layer in layers))
    raise CheckpointError(
        f"{name} is a stack of quantized experts, which no reader of {format} files knows; such stacks hold {share:.0%} of "
        f"the weights of the model's layers: quantize with skip=[{name.rpartition('.')[0].rpartition('.')[2]!r}] and they stay "
        "as they are, or keep it in our own format (model.save_pretrained)"
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
