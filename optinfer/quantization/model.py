"""Quantize a whole model in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from tqdm.auto import tqdm

from optinfer.quantization.checks import check_weight
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.schemes import Scheme, resolve_scheme

__all__ = ["linear_layers", "mark_quantized", "quantize", "refuse_quantized", "replace_module"]


def quantize(
    model: nn.Module,
    scheme: str = "nf4",
    *,
    block_size: int | str | None = None,
    double_quant: bool = False,
    symmetric: bool = True,
    threshold: float = 6.0,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Replace the weights of a model's linear layers by quantized ones, one layer at a time, in place.

    Embeddings, norms and the output head keep their dtype.

    Args:
        model: a transformers model or any module, weights in float32, bfloat16 or float16.
        scheme: ``int8 llm_int8 int4 int3 int2 nf4 fp4 fp8 mxfp8 mxfp4 nvfp4``.
        block_size: weights per scale; None: the scheme's default (64; int8 and fp8: a row). ``"channel"``: a row.
        double_quant: nf4 and fp4: store the scales in 8 bits too.
        symmetric: int2 … int8: False stores a zero point with each scale.
        threshold: llm_int8: features this large stay in 16 bits.
        skip: names of further layers to leave alone (``"q_proj"``, or a full path).
        progress: show a bar.

    Returns:
        The same model.

    Raises:
        ValueError: unknown scheme or option; no linear layers; quantized before; NaN, Inf or an empty weight.
        TypeError: `model` is no module; a weight of another dtype. In all cases nothing has changed.
    """
    resolved = resolve_scheme(scheme, block_size, double_quant, symmetric, threshold)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_quantized(model)
    skip = tuple(skip)
    layers = linear_layers(model, skip)
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise ValueError(f"{type(model).__name__} has no linear layers to quantize; it consists of {', '.join(kinds)}")
    for name, linear in layers.items():
        if linear.weight.is_meta:
            raise ValueError(f"{name}.weight has no data (meta device): load the model first")
        check_weight(linear.weight, f"{name}.weight")

    for name in tqdm(list(layers), desc=f"quantize to {scheme}", leave=False, disable=not progress):
        linear = layers.pop(name)
        replace_module(model, linear, QuantizedLinear.from_linear(linear, resolved))
    mark_quantized(model, resolved, skip)
    return model


def linear_layers(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers to quantize, by name: all but the output head and those that share an embedding's
    weight.

    Args:
        skip: last components or full names of layers to leave out.

    Raises:
        ValueError: a name in `skip` matches no module.
    """
    skip = set(skip)
    names = {name for name, _ in model.named_modules()}
    known = names | {name.rsplit(".", 1)[-1] for name in names}
    if unknown := sorted(skip - known):
        raise ValueError(f"skip names no module of the model: {', '.join(unknown)}")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def wanted(name: str, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or module is head or id(module.weight) in embeddings:
            return False
        last = name.rsplit(".", 1)[-1]
        return name not in skip and last not in skip and last != "lm_head"

    return {name: module for name, module in model.named_modules() if wanted(name, module)}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in `model` (a module may be used under several names)."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


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


def mark_quantized(model: Any, scheme: Scheme, skip: tuple[str, ...]) -> None:
    """Tell transformers, so that `save_pretrained` and `from_pretrained` make a round trip."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    model = cast(Any, model)
    from optinfer.quantization.hf import OptinferConfig, OptinferQuantizer

    config = OptinferConfig.from_scheme(scheme, list(skip) or None)
    model.hf_quantizer = OptinferQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = config.quant_method
