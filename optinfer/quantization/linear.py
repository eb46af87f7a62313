"""A linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optinfer.cpu import CpuWeight, remembered
from optinfer.quantization.formats.gpu import as_kernel_weight
from optinfer.quantization.formats.products import layer_matmul
from optinfer.quantization.formats.tensor import QuantizedTensor
from optinfer.quantization.schemes import Scheme
from optinfer_kernels.quantized_arguments import QuantizedWeight

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Module):
    """`torch.nn.Linear` with a quantized weight.

    The stored tensors are parameters without gradients: ``weight`` (the packed codes), ``weight_scale`` or ``weight_absmax``
    and so on, so that ``state_dict``, safetensors and transformers handle them like any other.

    A few tokens on a GPU go through a fused Triton kernel (`formats/gpu.py`), 16-bit tokens on a CPU through the C++ kernels
    (`optinfer.cpu`). Both read the stored tensors in place.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        self.dtype = dtype
        self._kernel_weight: QuantizedWeight | None = None
        self._kernel_tried = False
        for name, (shape, stored_dtype) in scheme.stored((out_features, in_features), dtype).items():
            self._set(name, torch.empty(shape, dtype=stored_dtype, device=device))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, bias: Tensor | None = None, threshold: float = 6.0) -> QuantizedLinear:
        """A layer around a weight ``[out, in]`` that is already quantized (by any algorithm)."""
        from dataclasses import replace

        scheme = replace(Scheme.of(q), threshold=threshold)
        layer = cls(q.shape[1], q.shape[0], scheme, dtype=q.dtype, device="meta")
        for name, tensor in q.tensors().items():
            layer._set(name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: Scheme) -> QuantizedLinear:
        """Quantize a linear layer (or GPT-2's `Conv1D`)."""
        return cls.from_quantized(scheme.quantize(matrix_of(linear)), bias_of(linear), scheme.threshold)

    # ---- the stored tensors
    def _set(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(parameter_name(name), nn.Parameter(tensor, requires_grad=False))

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor, sharing memory."""
        tensors = {}
        for name, parameter in self._parameters.items():
            if parameter is not None and name.startswith("weight"):
                tensors[tensor_name(name)] = parameter.data
        return self.scheme.assemble(tensors, (self.out_features, self.in_features), self.dtype)

    def stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor."""
        return self.scheme.stored((self.out_features, self.in_features), self.dtype)

    def dequantize(self) -> nn.Linear:
        """An ordinary linear layer with the restored weight."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.quantized.dequantize(), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    # ---- the product
    def forward(self, x: Tensor) -> Tensor:
        return layer_matmul(x, self)

    def cpu_weight(self) -> CpuWeight | None:
        """The layer as the C++ kernels read it, made anew when a tensor has moved. None: they cannot, or the layer is of a
        model in float32, which wants more than activations of 16 bits.
        """
        if self.dtype == torch.float32:
            return None
        tensors = [parameter for parameter in self._parameters.values() if parameter is not None]
        return remembered(self, *tensors, make=lambda *_: self.quantized.cpu_weight(self.bias))

    def gpu_weight(self) -> QuantizedWeight | None:
        """The layer as the fused Triton kernel reads it, made on first use; None for layouts that it does not read."""
        if not self._kernel_tried:
            self._kernel_weight = as_kernel_weight(self.quantized)
            self._kernel_tried = True  # last: another thread may look
        return self._kernel_weight

    # ---- leaving and coming back
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move to another device; scales keep their dtype, whatever `model.half()` and the like ask for."""
        apply_keeping_dtypes(self, super()._apply, fn, recurse)
        self._kernel_weight, self._kernel_tried = None, False
        self.__dict__.pop("_remembered", None)  # it would keep the old tensors
        return self

    def extra_repr(self) -> str:
        scheme = self.scheme
        block = f", group_size={scheme.group_size}" if scheme.group_size else ""
        double = ", double_quant" if scheme.double_quant else ""
        return f"{self.in_features} -> {self.out_features}, {scheme.name}{block}{double}, bias={self.bias is not None}"


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in]: GPT-2's `Conv1D` stores it the other way round."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight if isinstance(layer, nn.Linear) else weight.T


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a linear layer, or None."""
    return layer.bias  # type: ignore[return-value]


def apply_keeping_dtypes(module: nn.Module, apply: Callable, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    """`nn.Module._apply` after which stored tensors have the dtype they had."""
    before = {n: p.data for n, p in module._parameters.items() if p is not None and n.startswith("weight")}
    apply(fn, recurse)
    for name, old in before.items():
        new: Any = module._parameters[name]
        if new.dtype != old.dtype:
            new.data = old.to(new.device)


def parameter_name(tensor: str) -> str:
    """``packed`` -> ``weight``, ``absmax`` -> ``weight_absmax``."""
    return "weight" if tensor == "packed" else f"weight_{tensor}"


def tensor_name(parameter: str) -> str:
    """The inverse of `parameter_name`."""
    return "packed" if parameter == "weight" else parameter.removeprefix("weight_")
