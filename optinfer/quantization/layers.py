"""Which layers of a model are quantized, and why others are not.

A layer may be replaced only if nobody can tell: plain linear layers whose weight nobody but themselves reads. Tables of
model families age, so a short input is run through the model while its linear layers write down who asks for their weight,
and once more with stand-ins in their place: results that differ are refused before anything is changed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optinfer import cpu
from optinfer.quantization.experts import Matrices, expert_stacks, one_by_one, restore_experts
from optinfer.quantization.linear import QuantizedLinear, matrix_of

__all__ = ["Selection", "linear_layers", "restore", "select_layers", "unquantized_layers", "unquantized_weights"]


SMALL_SHARE = 0.02  # of a model's weights: so much may be left without being asked


@dataclass(frozen=True)
class Selection:
    """What is to be quantized.

    Attributes:
        layers: the linear layers, by name; a module that is used under several names, under the first.
        stacks: the experts' parameters, by name.
        left: names of linear layers (and of stacks of experts) that keep their weights, with the reason.
    """

    layers: dict[str, Any] = field(default_factory=dict)
    stacks: dict[str, nn.Parameter] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def linear_layers(model: nn.Module, skip: str | Iterable[str] = ()) -> dict[str, nn.Linear]:
    """The `nn.Linear` layers that `select_layers` finds, without trying the model out.

    Raises: ValueError as `select_layers`.
    """
    found = select_layers(model, skip, watch=False, experts=True).layers
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in `model` (a module may be used under several names)."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def restore(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put ordinary layers and stacks with the restored weights (in `dtype`, or their own) in place of all quantized ones."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedLinear):
            linear = module.dequantize()
            replace_module(model, module, linear if dtype is None else linear.to(dtype))
    restore_experts(model, dtype)


def select_layers(
    model: nn.Module, skip: str | Iterable[str] = (), watch: bool = True, experts: bool = False
) -> Selection:
    """Choose the layers to quantize.

    Left alone are: output and task heads, layers that share an embedding's weight, subclasses of `nn.Linear` (their
    code is not known), what the model keeps in float32, adapters, layers whose weight other code reads, and `skip`.

    Args:
        model: on any device, the meta device too.
        skip: layers to leave alone: full names, last components (``"k_proj"``), containers (``"model.layers.0"``,
            ``"mlp"``), or patterns (``"*.layers.[0-3].*"``).
        watch: run a short input through the model to see whose weights are read; without it only rules decide.
        experts: whether stacks of matrices that nobody can quantize may be left in silence.

    Raises:
        ValueError: a pattern of `skip` matches nothing, weights are stacks of matrices of an unknown kind, or the model
            computes something else once its layers are exchanged.
    """
    patterns = [skip] if isinstance(skip, str) else list(skip)
    modules = dict(model.named_modules())
    _check_patterns(patterns, [*modules, *(name for name, _ in model.named_parameters())])
    rules = _Rules(model)
    selection = Selection()
    for name, module in modules.items():
        if not name or not isinstance(module, (nn.Linear, *_transposed_kinds())):
            continue
        assert isinstance(module, nn.Module)
        if reason := _skipped(name, patterns) or rules.reason(name, module):
            selection.left[name] = reason
        else:
            selection.layers[name] = module
    for name, stack in expert_stacks(model).items():
        if reason := _skipped(name, patterns) or rules.kept_reason(name):
            selection.left[name] = reason
        else:
            selection.stacks[name] = stack
    if not experts:
        selection.left.update(_other_stacks(model, patterns))
    if watch:
        _try_out(model, selection)
    return selection


def unquantized_layers(model: nn.Module) -> list[str]:
    """Full names of all linear layers that hold ordinary weights."""
    kinds = (nn.Linear, *_transposed_kinds())
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def unquantized_weights(model: nn.Module) -> list[str]:
    """The same, and the names of stacks of experts that hold ordinary weights."""
    return [*unquantized_layers(model), *expert_stacks(model)]


def recorded(names: Iterable[str], left: Iterable[str]) -> set[str]:
    """Which of a model's layers a checkpoint says were left alone.

    The checkpoint may come from the same model with or without a head, whose names begin differently.
    """
    names, found = set(names), set()
    for one in left:
        if one in names:
            found.add(one)
        else:
            found |= {name for name in names if name.endswith(f".{one}") or one.endswith(f".{name}")}
    return found


def _transposed_kinds() -> tuple[type, ...]:
    module = sys.modules.get("transformers.pytorch_utils")  # who has a Conv1D has imported it
    return (module.Conv1D,) if module else ()


# ---------------------------------------------------------------------------------------------- rules


class _Rules:
    def __init__(self, model: nn.Module):
        self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        base = getattr(model, "base_model", None)
        self.inside = {id(m) for m in base.modules()} if isinstance(base, nn.Module) and base is not model else None
        if type(model).__module__.startswith("peft."):  # there the base model is all but the adapters
            self.inside = None
        kept = [getattr(model, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")]
        self.kept = {part for names in kept for part in names}
        self.adapters = {
            id(part)
            for module in model.modules()
            for name in getattr(module, "adapter_layer_names", ())
            if isinstance(child := getattr(module, name, None), nn.Module)
            for part in child.modules()
        }

    def reason(self, name: str, module: nn.Module) -> str:
        """Why a linear layer is left alone; empty if it is not."""
        if module is self.head or name.rsplit(".", 1)[-1] == "lm_head":
            return "the output head"
        if id(module.weight) in self.embeddings:
            return "it shares an embedding's weight"
        if not (cpu.is_plain(module) or type(module) in _transposed_kinds()):
            return f"a {type(module).__name__}, not a plain linear layer"
        if id(module) in self.adapters:
            return "an adapter"
        if self.inside is not None and id(module) not in self.inside:
            return "a task's head"
        return self.kept_reason(name)

    def kept_reason(self, name: str) -> str:
        return "the model keeps it in float32" if any(_matches(name, part) for part in self.kept) else ""


def _skipped(name: str, patterns: list[str]) -> str:
    return "skip" if any(_matches(name, pattern) for pattern in patterns) else ""


def _matches(name: str, pattern: str) -> bool:
    """Whether a dotted name, or one of its containers, is what the pattern names."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
    return bool(pattern) and f".{pattern}." in f".{name}."


def _check_patterns(patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"skip holds names of layers as strings, got {pattern!r}")
    if unknown := [pattern for pattern in patterns if not any(_matches(name, pattern) for name in names)]:
        raise ValueError(f"skip names no module of the model: {', '.join(unknown)}")


def _other_stacks(model: nn.Module, patterns: list[str]) -> dict[str, str]:
    """Stacks of matrices in one parameter that are no known kind of experts: left where the caller says so, or where they are
    small, such as a table of positions.

    Raises ValueError: he does not, and they are a share of the weights that he should know of.
    """
    known = expert_stacks(model)
    stacks = {name: parameter for name, parameter in _stacks(model).items() if name not in known}
    unnamed = [name for name in stacks if not _skipped(name, patterns)]
    if (share := stacked_share(model, unnamed)) > SMALL_SHARE:
        raise ValueError(
            f"{type(model).__name__} holds {share:.0%} of its weights in stacks of matrices ({unnamed[0]} and "
            f"{len(unnamed) - 1} more), not in linear layers; they are not quantized here. To quantize the rest and leave "
            f"them as they are, pass skip=[{unnamed[0].rsplit('.', 1)[-1]!r}, …] or the name of what holds them"
        )
    return {name: "a stack of matrices" if name in unnamed else "skip" for name in stacks}


def stacked_share(model: nn.Module, names: Iterable[str]) -> float:
    """Which part of a model's weights these parameters are."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return sum(model.get_parameter(name).numel() for name in names) / max(1, total)


def _stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{own}" if name else own: parameter
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for own, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.shape[0] > 1 and min(parameter.shape[1:]) > 1
    }


# ---------------------------------------------------------------------------------------------- watching


def _try_out(model: nn.Module, selection: Selection) -> None:
    """Run a short input through the model twice: once to see whose weights are read, and leave those layers alone; then
    with stand-ins that look like quantized layers and compute exactly, so that any difference is somebody's mistake.

    T5 asks for the dtype of a layer's weight, MultiheadAttention passes it to a function of its own: a quantized layer
    answers with packed codes. Nothing is learned where the model takes no token ids, or does not run on them.

    Raises ValueError: the model computes something else with the stand-ins, so it would with quantized layers.
    """
    inputs = _short_input(model)
    # accelerate's hooks run a layer's own forward elsewhere: it would be seen as a reader of its own weight
    layers = {name: layer for name, layer in selection.layers.items() if "forward" not in vars(layer)}
    if inputs is None or not (layers or selection.stacks):
        return
    asked: set[int] = set()
    with _still(model), _one_by_one(model, selection.stacks):
        try:
            with _watched(layers.values(), asked):
                expected = _tensors(model(**inputs))
        except Exception:
            expected = []
        # Who reads one such layer's weight reads that of the others, too: of experts that no token of the input reached.
        read = {_role(model, name) for name, layer in layers.items() if id(layer) in asked}
        for name in [name for name in layers if _role(model, name) in read]:
            del layers[name], selection.layers[name]
            selection.left[name] = "other code reads its weight"
        chosen = list(layers.values())
        if not expected or expected[0].is_meta:
            return
        try:
            with _stand_ins(chosen), _stand_in_stacks(model, selection.stacks):
                found = _tensors(model(**inputs))
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} does not run once its linear layers are exchanged ({type(error).__name__}: "
                f"{str(error)[:200]}): other code depends on them. Name the layers to leave alone in skip"
            ) from error
    difference = max((_distance(a, b) for a, b in zip(found, expected)), default=0.0)
    if difference > PROBE_TOLERANCE:
        raise ValueError(
            f"{type(model).__name__} computes something else once its linear layers are exchanged for others of equal results "
            f"(relative error {difference:.2g}): other code depends on them. Name the layers to leave alone in skip"
        )


def _role(model: nn.Module, name: str) -> tuple[type, str]:
    """Whose layer it is, and what its owner calls it."""
    parent, _, own = name.rpartition(".")
    return type(model.get_submodule(parent)), own


PROBE_TOLERANCE = 1e-2  # the products are the same ones; a layer that falls out changes everything


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative error; infinite where shapes differ or new NaN values appear."""
    if found.shape != expected.shape:
        return float("inf")
    finite = torch.isfinite(expected)
    a, b = found[finite].float(), expected[finite].float()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).nan_to_num(float("inf")).item()


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors that a model returns, outermost only."""
    values = [output] if isinstance(output, Tensor) else output.values() if hasattr(output, "values") else output
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


@contextlib.contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Without gradients, dropout or a trace: modes and the random generator are afterwards as before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module in training:
            module.training = True


def _short_input(model: nn.Module) -> dict[str, Tensor] | None:
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "input_ids" or config is None:
        return None
    try:
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.arange(8, device=table.device).remainder(table.shape[0])[None]
    except Exception:  # a model without an input embedding
        return None
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


@contextlib.contextmanager
def _watched(layers: Iterable[Any], asked: set[int]) -> Iterator[None]:
    """Let linear layers compute as always, and write down who else asks for their weight."""

    def weight(self: Any) -> Tensor:
        asked.add(id(self))
        return self._parameters["weight"]

    def forward(self: Any, x: Tensor) -> Tensor:
        matrix = self._parameters["weight"]
        matrix = matrix if isinstance(self, nn.Linear) else matrix.T
        return cpu.product(type(self), x, matrix, self._parameters.get("bias"))

    kinds: dict[type, type] = {}
    changed = []
    try:
        for layer in layers:
            usual = type(layer)
            if usual not in kinds:
                kinds[usual] = type(
                    f"Watched{usual.__name__}", (usual,), {"weight": property(weight), "forward": forward}
                )
            changed.append((layer, usual))
            layer.__class__ = kinds[usual]
        yield
    finally:
        for layer, usual in changed:
            layer.__class__ = usual


@contextlib.contextmanager
def _stand_ins(layers: Iterable[Any]) -> Iterator[None]:
    """Let layers look as quantized ones do (packed codes for a weight, no `nn.Linear`) and compute as always."""

    def forward(self: Any, x: Tensor) -> Tensor:
        kind, matrix, bias = self._true
        return cpu.product(kind, x, matrix, bias)

    kinds: dict[type, type] = {}
    changed = []
    try:
        for layer in layers:
            usual, weight = type(layer), layer._parameters["weight"]
            codes = torch.zeros((), dtype=torch.uint8, device=weight.device).expand(weight.shape)
            if usual not in kinds:
                kinds[usual] = type("StandIn", (nn.Module,), {"forward": forward})
            changed.append((layer, usual, weight))
            layer.__dict__["_true"] = (usual, matrix_of(layer), layer.bias)
            layer._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
            layer.__class__ = kinds[usual]
        yield
    finally:
        for layer, usual, weight in changed:
            layer.__class__ = usual
            layer._parameters["weight"] = weight
            layer.__dict__.pop("_true", None)


@contextlib.contextmanager
def _one_by_one(model: nn.Module, stacks: Iterable[str]) -> Iterator[None]:
    """Let the owners of stacks use their plain loop, as they will: other loops round otherwise."""
    owners = [model.get_submodule(name) for name in dict.fromkeys(name.rpartition(".")[0] for name in stacks)]
    owners = [owner for owner in owners if "forward" not in vars(owner)]
    try:
        for owner in owners:
            one_by_one(owner)
        yield
    finally:
        for owner in owners:
            vars(owner).pop("forward", None)


class _TrueMatrices(Matrices):
    """A stack as a quantized one looks, with the true matrices."""

    def __init__(self, stack: Tensor):
        super().__init__()
        self.shape = tuple(stack.shape)  # type: ignore[assignment]
        vars(self)["stack"] = stack

    def __getitem__(self, index: Any) -> Tensor:
        return vars(self)["stack"][index]


@contextlib.contextmanager
def _stand_in_stacks(model: nn.Module, stacks: dict[str, nn.Parameter]) -> Iterator[None]:
    """The same for stacks of experts."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in stacks]
    orders = [(module, list(module._parameters)) for module in {id(m): m for m, _, _ in places}.values()]
    try:
        for module, own, name in places:
            del module._parameters[own]
            module._modules[own] = _TrueMatrices(stacks[name])
        yield
    finally:
        for module, own, name in places:
            module._modules.pop(own, None)
            module._parameters[own] = stacks[name]
        for module, order in orders:  # the order of parameters is part of a model
            for own in order:
                module._parameters[own] = module._parameters.pop(own)
