"""A linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optinfer.quantization.cpu import CpuLayout, aligned, layout_for
from optinfer.quantization.gpu import as_kernel_weight, kernel_matmul, kernel_pays
from optinfer.quantization.matmul import quantized_matmul
from optinfer.quantization.schemes import Scheme
from optinfer.quantization.tensor import QuantizedTensor
from optinfer_kernels.quantized_arguments import QuantizedWeight

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Module):
    """`torch.nn.Linear` with a quantized weight.

    The stored tensors are parameters without gradients: ``weight`` (the packed codes), ``weight_scale`` or
    ``weight_absmax`` and so on, so that ``state_dict``, safetensors and transformers handle them like any
    other.

    A few tokens on a GPU go through a fused kernel (`gpu.py`). On a CPU, the first bfloat16 product may re-order
    the codes for a fused operator (`cpu.py`), in the same bytes; everything that looks from outside, `state_dict`
    included, sees the canonical order.
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
        self._layout: CpuLayout | None = None
        self._layout_tried = False
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
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
        """Quantize a linear layer."""
        return cls.from_quantized(scheme.quantize(linear.weight), linear.bias, scheme.threshold)

    # ---- the stored tensors
    def _set(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(parameter_name(name), nn.Parameter(tensor, requires_grad=False))

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor, in canonical order (sharing memory where the order is canonical)."""
        tensors = {}
        for name, parameter in self._parameters.items():
            if parameter is not None and name.startswith("weight"):
                tensors[tensor_name(name)] = parameter.data
        if self._layout is not None:
            tensors["packed"] = self._layout.undo(tensors["packed"])
        return self.scheme.assemble(tensors, (self.out_features, self.in_features), self.dtype)

    def dequantize(self) -> nn.Linear:
        """An ordinary linear layer with the restored weight."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.quantized.dequantize(), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    # ---- the product
    def forward(self, x: Tensor) -> Tensor:
        if (kernel_weight := self._gpu_weight(x)) is not None:
            return kernel_matmul(x, kernel_weight, self.bias)
        layout = self._cpu_layout(x)
        if layout is None or (layout.in_order and x.numel() > layout.MANY_TOKENS * self.in_features):
            return quantized_matmul(x, self.quantized, self.bias, self.scheme.threshold)
        out = layout.matmul(aligned(x.reshape(-1, self.in_features)), self.weight.data)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _gpu_weight(self, x: Tensor) -> QuantizedWeight | None:
        """The fused kernel's view of the weight, if `x` is for it; made on first use."""
        if not x.is_cuda or not kernel_pays(x):
            return None
        if not self._kernel_tried:
            self._kernel_tried = True
            self._kernel_weight = as_kernel_weight(self.quantized)
        return self._kernel_weight

    def _cpu_layout(self, x: Tensor) -> CpuLayout | None:
        """The fused operator's layout, if `x` is for it; made on first use."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
            return None
        if self._layout is None and not self._layout_tried:
            self._layout_tried = True
            if found := layout_for(self.quantized):
                self._layout, self.weight.data = found
        return self._layout

    def canonical_(self) -> QuantizedLinear:
        """Put the codes back in canonical order, in place; does nothing where they are."""
        if self._layout is not None:
            self.weight.data = self._layout.undo(self.weight.data)
        self._layout, self._layout_tried = None, False
        self._kernel_weight, self._kernel_tried = None, False
        return self

    # ---- leaving and coming back
    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.canonical_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.canonical_()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move to another device; scales keep their dtype, whatever `model.half()` and the like ask for."""
        self.canonical_()
        before = {n: p.data for n, p in self._parameters.items() if p is not None and n.startswith("weight")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._parameters[name]
            if new.dtype != old.dtype:
                new.data = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        scheme = self.scheme
        block = f", block_size={scheme.block_size}" if scheme.block_size else ""
        double = ", double_quant" if scheme.double_quant else ""
        return f"{self.in_features} -> {self.out_features}, {scheme.name}{block}{double}, bias={self.bias is not None}"


def parameter_name(tensor: str) -> str:
    """``packed`` -> ``weight``, ``absmax`` -> ``weight_absmax``."""
    return "weight" if tensor == "packed" else f"weight_{tensor}"


def tensor_name(parameter: str) -> str:
    """The inverse of `parameter_name`."""
    return "packed" if parameter == "weight" else parameter.removeprefix("weight_")
