"""The same schemes through transformers: quantize on load, save, load again.

    AutoModelForCausalLM.from_pretrained(path, quantization_config=OptinferConfig("nf4", double_quant=True))

`import optinfer` makes the quantizer known (`optinfer.plugins`). A folder saved this way needs that import before it is loaded
again. Without it transformers only warns that it does not know the method, and would take codes for weights, so codes never
lie in files in the shape of the weights that they stand for (see `_seal`): the shapes do not fit, and transformers refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from optinfer.quantization.checks import FLOAT_DTYPES, check_weight
from optinfer.quantization.experts import (
    QuantizedExperts,
    put_experts,
    quantize_experts,
    transposed,
)
from optinfer.quantization.formats.tensor import GroupSize
from optinfer.quantization.layers import recorded, replace_module, restore, select_layers, unquantized_weights
from optinfer.quantization.linear import QuantizedLinear, matrix_of, parameter_name
from optinfer.quantization.schemes import Scheme, SchemeName, resolve_scheme

__all__ = ["OptinferConfig", "OptinferQuantizer"]

METHOD = "optinfer"


@register_quantization_config(METHOD)
class OptinferConfig(QuantizationConfigMixin):
    """How to quantize a model on load: what `quantize` takes, as a configuration that travels with a checkpoint.

    Args:
        scheme, double_quant, group_size, symmetric, threshold: see `optinfer.quantization.quantize`.
        modules_to_not_convert: names of further layers to leave alone, as `quantize` takes them in `skip`. In the
            configuration of a quantized model: the full names of all linear layers that hold ordinary weights.
        act_order: columns carry a group index (checkpoints from GPTQ in activation order).
        block_size: what older folders call `group_size`.

    Raises:
        ValueError: unknown scheme, or an option the scheme does not have.
    """

    def __init__(
        self,
        scheme: SchemeName = "nf4",
        double_quant: bool = False,
        group_size: GroupSize = None,
        symmetric: bool = True,
        threshold: float = 6.0,
        modules_to_not_convert: list[str] | None = None,
        act_order: bool = False,
        quant_method: str = METHOD,
        block_size: GroupSize = None,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        group_size = block_size if group_size is None else group_size
        resolved = resolve_scheme(scheme, group_size, double_quant, symmetric, threshold)
        self.quant_method = METHOD  # type: ignore[assignment]  # the enumeration is closed, plug-ins use strings
        self.scheme = resolved.name
        self.group_size = resolved.group_size
        self.double_quant = resolved.double_quant
        self.symmetric = resolved.symmetric
        self.threshold = resolved.threshold
        self.act_order = act_order
        self.modules_to_not_convert = modules_to_not_convert

    @classmethod
    def from_scheme(cls, scheme: Scheme, modules_to_not_convert: list[str] | None = None) -> OptinferConfig:
        options = scheme.to_dict()
        name = options.pop("name")
        return cls(name, modules_to_not_convert=modules_to_not_convert, **options)

    def resolve(self) -> Scheme:
        """The scheme this configuration describes."""
        return Scheme(self.scheme, self.group_size, self.double_quant, self.symmetric, self.threshold, self.act_order)


class _UnquantizedLinear(QuantizedLinear):
    """A quantized layer whose `weight` still waits for the checkpoint's floating-point tensor.

    The placeholder has the model's dtype because transformers 5.15 to 5.22 cast a tensor from the checkpoint to the
    dtype of the parameter it is for before they quantize it: a uint8 placeholder would destroy the weight.
    """

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, bias: bool, dtype: torch.dtype, transposed: bool
    ) -> None:
        super().__init__(in_features, out_features, scheme, bias, dtype)
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self.transposed = transposed  # the checkpoint holds [in, out], as GPT-2's


class _Quantize(ConversionOps):
    """Turns one floating-point weight of a checkpoint into a layer's stored tensors."""

    def __init__(self, hf_quantizer: OptinferQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]  # the base class spells no keywords, and they differ by version
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: PreTrainedModel | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        for full_name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            check_weight(weight, full_name)
            if model is not None and get_module_from_name(model, full_name)[0].transposed:
                weight = weight.T.contiguous()
            prefix = full_name.removesuffix("weight")
            for name, tensor in self.hf_quantizer.scheme.quantize(weight).tensors().items():
                key = prefix + parameter_name(name)
                converted[key] = nn.Parameter(tensor, requires_grad=False)
                if missing_keys is not None:
                    missing_keys.discard(key)
        return converted


@register_quantizer(METHOD)
class OptinferQuantizer(HfQuantizer):
    """transformers' side of it: swaps the layers in before the weights come."""

    requires_calibration = False

    def __init__(self, quantization_config: OptinferConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.scheme = quantization_config.resolve()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            for module in model.modules():
                if isinstance(module, QuantizedLinear):
                    raise ValueError("the model is quantized already")
        config: Any = self.quantization_config
        named = config.modules_to_not_convert or ()
        if self.pre_quantized:  # what was done is known; rules and trials are for those who decide
            selection = select_layers(model, watch=False, experts=True)
            layers, stacks = selection.layers, selection.stacks
            for name in recorded([*layers, *stacks], named):
                layers.pop(name, None)
                stacks.pop(name, None)
            for name, stack in stacks.items():
                put_experts(model, name, QuantizedExperts.like(stack, self.scheme, transposed(model, name), "meta"))
        else:
            selection = select_layers(model, named)
            layers, stacks = selection.layers, selection.stacks
            self.stacks = list(stacks)
        if not layers and not stacks:
            raise ValueError(f"{type(model).__name__} has no linear layers to quantize")
        files = kwargs.get("checkpoint_files") or ()
        sealed = self.pre_quantized and _is_sealed(files)
        for layer in layers.values():
            rows, columns = matrix_of(layer).shape
            arguments = (columns, rows, self.scheme, layer.bias is not None, layer.weight.dtype)
            with torch.device("meta"):
                if self.pre_quantized:
                    new = QuantizedLinear(*arguments)
                else:
                    new = _UnquantizedLinear(*arguments, transposed=not isinstance(layer, nn.Linear))
            if sealed:
                _seal(new)
            replace_module(model, layer, new)
        if self.pre_quantized:
            _check_complete(model, files)
        return model

    def update_weight_conversions(self, weight_conversions: list[object], *_: object) -> list[object]:
        """Our folders hold the model's own names: families that rename or join tensors between file and model would take
        packed codes for weights. Only a prefix may differ (a model with or without its head).
        """
        if not self.pre_quantized:
            return weight_conversions
        return [one for one in weight_conversions if type(one).__name__ == "PrefixChange"]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return name == "weight" and isinstance(module, _UnquantizedLinear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return self.scheme.bits / 8
        return param.element_size()

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Check what came: transformers only warns about tensors that are missing or do not fit."""
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                _unseal(module)
            if isinstance(module, (QuantizedLinear, QuantizedExperts)):
                _check_loaded(name, module)
            if isinstance(module, _UnquantizedLinear):
                module.__class__ = QuantizedLinear  # type: ignore[assignment]
        if not self.pre_quantized:  # transformers joins the experts of a checkpoint; what it made is quantized here
            for name in self.stacks:
                check_weight(model.get_parameter(name), name, ndim=3)
                quantize_experts(model, name, self.scheme)
            config: Any = self.quantization_config
            config.modules_to_not_convert = unquantized_weights(model)
        save_under_own_names(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *_: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes."""
        state = model.state_dict()
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, QuantizedLinear) and _could_be_taken_for_weights(module):
                state[f"{name}.weight"] = state[f"{name}.weight"].unsqueeze(-1)
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        restore(model, dtype)
        return model


def _could_be_taken_for_weights(layer: QuantizedLinear) -> bool:
    return tuple(layer.weight.shape) == (layer.out_features, layer.in_features)


def _seal(layer: QuantizedLinear) -> None:
    """Give the codes of 8 bits the shape that they have in files: ``[out, in, 1]``."""
    if _could_be_taken_for_weights(layer):
        layer.weight = nn.Parameter(layer.weight.data.unsqueeze(-1), requires_grad=False)


def _unseal(layer: QuantizedLinear) -> None:
    if layer.weight.shape == (layer.out_features, layer.in_features, 1):
        layer.weight.data = layer.weight.data.squeeze(-1)


def _is_sealed(files: Iterable[str]) -> bool:
    """Whether codes lie in these files as `_seal` has them; folders written before it hold them as ``[out, in]``."""
    from safetensors import safe_open

    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # no dictionary
                if key.endswith(".weight"):
                    stored = opened.get_slice(key)
                    if stored.get_dtype() in ("I8", "U8", "F8_E4M3", "F8_E5M2") and stored.get_shape()[2:] == [1]:
                        return True
    return False


def save_under_own_names(model: PreTrainedModel) -> None:
    """Keep `save_pretrained` from turning the model's names and tensors back into those of its original files."""
    model._weight_conversions = []  # type: ignore[assignment]


def _check_complete(model: PreTrainedModel, files: Iterable[str]) -> None:
    """Raise ValueError if safetensors files lack a tensor of a quantized layer: transformers would make one up.

    Names in files begin differently from a model's (with a prefix or without, or renamed by its family), so they are
    compared, and counted, from the number of the layer on.
    """
    from safetensors import safe_open

    present: Counter[str] = Counter()
    for file in files:
        if not str(file).endswith(".safetensors"):
            return
        with safe_open(file, framework="pt") as opened:
            present.update(map(_tail, opened.keys()))
    if not present:
        return
    for name, module in model.named_modules(remove_duplicate=True):
        if isinstance(module, (QuantizedLinear, QuantizedExperts)):
            for parameter, value in module._parameters.items():
                key = f"{name}.{parameter}"
                present[_tail(key)] -= value is not None
                if value is not None and present[_tail(key)] < 0:
                    raise ValueError(f"{key} is missing from the checkpoint")


def _tail(key: str) -> str:
    """A tensor's name from the last number in it on, or its last two parts: ``layers.3.mlp.up_proj.weight`` -> ``3.mlp…``."""
    parts = key.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] :] if numbers else parts[-2:])


def _check_loaded(name: str, layer: QuantizedLinear | QuantizedExperts) -> None:
    """Raise ValueError if a layer's tensors are not what its scheme stores."""
    if layer.weight.dtype in FLOAT_DTYPES:
        raise ValueError(f"{name}.weight is missing from the checkpoint")
    for tensor, (shape, dtype) in layer.stored().items():
        key = f"{name}.{parameter_name(tensor)}"
        value = layer._parameters[parameter_name(tensor)]
        if value is None or value.is_meta or not getattr(value, "_is_hf_initialized", True):
            raise ValueError(f"{key} is missing from the checkpoint")
        if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
            raise ValueError(
                f"{key} is {value.dtype} {tuple(value.shape)} in the checkpoint; {layer.scheme.name} stores "
                f"{dtype} {tuple(shape)}"
            )
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise ValueError(f"{key} has NaN or Inf values: the checkpoint is damaged")
