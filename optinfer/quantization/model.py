"""Quantize a whole model in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from tqdm.auto import tqdm

from optinfer.quantization.checks import check_weight
from optinfer.quantization.experts import quantize_experts
from optinfer.quantization.formats.tensor import GroupSize
from optinfer.quantization.layers import Selection, replace_module, select_layers, unquantized_weights
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.schemes import Scheme, SchemeName, resolve_scheme

__all__ = ["mark_quantized", "quantize", "refuse_quantized"]

Model = TypeVar("Model", bound=nn.Module)


def quantize(
    model: Model,
    scheme: SchemeName = "nf4",
    *,
    group_size: GroupSize = None,
    double_quant: bool = False,
    symmetric: bool = True,
    threshold: float = 6.0,
    skip: str | Iterable[str] = (),
    progress: bool = True,
) -> Model:
    """Replace the weights of a model's linear layers and experts by quantized ones, one layer at a time, in place.

    Embeddings, norms, heads, and layers that cannot be replaced unnoticed keep their dtype (see `select_layers`);
    which, and why, is in the printed summary and in ``Selection.left``.

    Args:
        model: a transformers model or any module, weights in float32, bfloat16 or float16.
        scheme: ``int8 llm_int8 int4 int3 int2 nf4 fp4 fp8 mxfp8 mxfp4 nvfp4 q4_1``.
        group_size: weights per scale; None: the scheme's default (64; int8 and fp8: a row). ``"channel"``: a row.
        double_quant: nf4 and fp4: store the scales in 8 bits too.
        symmetric: int2 … int8: False stores a zero point with each scale.
        threshold: llm_int8: features this large stay in 16 bits.
        skip: further layers to leave alone: names, last components (``"q_proj"``), containers (``"model.layers.0"``) or
            patterns (``"*.layers.[0-3].*"``).
        progress: show a bar, and print which share of the weights was quantized.

    Returns:
        The same model.

    Raises:
        ValueError: unknown scheme or option; no linear layers; quantized before; NaN, Inf or an empty weight; a pattern of
            `skip` that matches nothing; weights that are not in this process's memory; stacks of matrices of an unknown kind; a
            model that computes something else once its layers are exchanged.
        TypeError: `model` is no module; a weight of another dtype. In all cases nothing has changed.
    """
    resolved = resolve_scheme(scheme, group_size, double_quant, symmetric, threshold)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_quantized(model)
    selection = select_layers(model, skip)
    layers, stacks = selection.layers, selection.stacks
    if not layers and not stacks:
        raise ValueError(f"{type(model).__name__} has no linear layers to quantize; {_why_none(model, selection)}")
    _check_weights(model, selection)
    what = _what(model, selection)
    for name in tqdm([*layers, *stacks], desc=f"quantize to {scheme}", leave=False, disable=not progress):
        if name in stacks:
            del stacks[name]
            quantize_experts(model, name, resolved)
        else:
            layer = layers.pop(name)
            replace_module(model, layer, QuantizedLinear.from_linear(layer, resolved))
    mark_quantized(model, resolved)
    if progress:
        print(f"{scheme}: {what}{_left(selection)}")
    return model


def _check_weights(model: nn.Module, selection: Selection) -> None:
    for name, layer in selection.layers.items():
        check_present(name, layer)
        check_weight(layer.weight, f"{name}.weight")
    for name, stack in selection.stacks.items():
        check_present(name, model.get_submodule(name.rpartition(".")[0]), stack)
        check_weight(stack, name, ndim=3)


def _what(model: nn.Module, selection: Selection) -> str:
    """What is quantized, in a few words."""
    total = sum(parameter.numel() for parameter in model.parameters())
    weights = [*(layer.weight for layer in selection.layers.values()), *selection.stacks.values()]
    share = sum(weight.numel() for weight in weights) / total
    return f"{len(selection.layers)} linear layers{_experts(selection.stacks)}, {share:.0%} of the weights"


def check_present(name: str, layer: nn.Module, weight: Tensor | None = None) -> None:
    """Raise ValueError if a layer's weight (its `weight`, by default) is not in memory."""
    if not (layer.weight if weight is None else weight).is_meta:
        return
    if hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"{name} is offloaded by accelerate (device_map): its weight is not in memory. Load the model without offloading, "
            "or quantize it while it is loaded: from_pretrained(…, quantization_config=OptinferConfig(…))"
        )
    raise ValueError(f"{name}.weight has no data (meta device): load the model first")


def _why_none(model: nn.Module, selection: Selection) -> str:
    if selection.left:
        return "left alone: " + ", ".join(f"{name} ({why})" for name, why in list(selection.left.items())[:5])
    return f"it consists of {', '.join(sorted({type(m).__name__ for m in model.modules() if not list(m.children())}))}"


def _experts(stacks: dict[str, nn.Parameter]) -> str:
    return f" and {sum(len(stack) for stack in stacks.values())} matrices of experts" if stacks else ""


def _left(selection: Selection) -> str:
    """What was left, in a few words: one example of each reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in selection.left.items():
        reasons.setdefault(why, []).append(name)
    parts = [f"{len(names)}: {why} ({names[0]}{', …' if len(names) > 1 else ''})" for why, names in reasons.items()]
    return "; left alone " + "; ".join(parts) if parts else ""


def refuse_quantized(model: nn.Module) -> None:
    """Raise ValueError if the model, or any layer of it, is quantized already."""
    config = getattr(model, "config", None)
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    if method is not None:
        raise ValueError(f"the model is quantized already (quant_method={str(method)!r}): start from the original")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            raise ValueError(f"the model is quantized already: {name} is {module.scheme.name}; start from the original")
        if type(module).__module__.startswith("bitsandbytes."):
            raise ValueError(f"the model is quantized already: {name} is {type(module).__qualname__} of bitsandbytes")


def mark_quantized(model: nn.Module, scheme: Scheme) -> None:
    """Tell transformers, so that `save_pretrained` and `from_pretrained` make a round trip.

    What was left is read off the model itself, so that the configuration says what was done.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    from optinfer.quantization.hf import OptinferConfig, OptinferQuantizer, save_under_own_names

    config = OptinferConfig.from_scheme(scheme, unquantized_weights(model))
    marked: Any = model  # torch takes a module's attributes for tensors
    marked.hf_quantizer = OptinferQuantizer(config, pre_quantized=True)
    marked.config.quantization_config = config
    marked.is_quantized = True
    save_under_own_names(model)
    marked.quantization_method = config.quant_method
