"""AWQ: scale the input channels that meet large activations up before rounding, and down again for free.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978.

Multiplying an input channel's weights by ``s`` and its activation by ``1/s`` changes nothing in exact arithmetic, but the
rounding error of that channel now reaches the output divided by ``s``. The factor ``1/s`` costs nothing because the
operation before absorbs it: a norm's gain, or the rows of the projection that produced the activation.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from optinfer.quantization.formats.tensor import QuantizedTensor
from optinfer.quantization.methods.calibrate import (
    Calibration,
    CalibrationLayer,
    add_gram,
    calibrate,
    quantize_layers,
)
from optinfer.quantization.methods.gptq import gptq_quantize
from optinfer.quantization.methods.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Scaling",
    "awq",
    "clip_weight",
    "fold",
    "gain_offset",
    "scaling_groups",
    "search_scale",
]

ALPHAS = tuple(i / 20 for i in range(20))  # the paper's grid: s = mean|x|^alpha
CLIPS = tuple(1 - i / 20 for i in range(10))  # 1.00, 0.95 … 0.55 of a group's largest weight
SEARCH_TOKENS = 2048  # the search looks at block outputs of this many tokens; AWQ needs little data (paper, figure 8)


Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class Scaling:
    """Linear layers that share an input, the operation before them that can absorb a scale, and the block to judge by.

    Names are relative to the decoder layer.

    Attributes:
        previous: a norm, or the linear layer whose output feeds `linears` element by element.
        linears: the layers whose input channels are scaled.
        block: the module whose output error chooses the scale.
        routers: modules whose `weight` takes the same input and is not quantized.
    """

    previous: str
    linears: tuple[str, ...]
    block: str
    routers: tuple[str, ...] = ()


def scaling_groups(layer: nn.Module) -> list[Scaling]:
    """Where a scale can be folded in a decoder layer named as in Llama, Qwen, Mistral, Gemma, and Mixtral.

    ``o_proj`` is left out with grouped-query attention: several of its input channels come from one row of ``v_proj``,
    which can absorb only one factor. So are the second matrices of experts, which follow on a gate.

    Raises:
        ValueError: the layer is built in another way.
    """
    modules = dict(layer.named_modules())
    names = ("pre_feedforward_layernorm", "post_attention_layernorm")
    before_mlp = next((name for name in names if name in modules), names[-1])
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gated = ("mlp.gate_proj", "mlp.up_proj")
    mixture = "mlp.experts" in modules
    needed = {"input_layernorm", before_mlp, *attention, "self_attn.o_proj"}
    if not mixture:
        needed |= {*gated, "mlp.down_proj"}
    if missing := sorted(needed - modules.keys()):
        raise ValueError(f"AWQ does not know how {type(layer).__name__} is wired: it has no {', '.join(missing)}")
    groups = [Scaling("input_layernorm", attention, "self_attn")]
    if modules["self_attn.v_proj"].weight.shape == modules["self_attn.o_proj"].weight.shape:
        groups.append(Scaling("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"))
    if mixture:
        experts = tuple(name for name in modules if name.startswith("mlp.experts.gate_up_proj."))
        routers = tuple(name for name in ("mlp.gate", "mlp.router") if name in modules)
        return [*groups, Scaling(before_mlp, experts, "mlp", routers)] if experts else groups
    return [*groups, Scaling(before_mlp, gated, "mlp"), Scaling("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")]


@torch.no_grad()
def gain_offset(norm: nn.Module) -> float:
    """1 for norms that multiply by ``1 + weight`` (Gemma), 0 for those that multiply by ``weight``: asked, not guessed."""
    kept: Tensor = norm.weight.data  # type: ignore[assignment]
    try:
        norm.weight.data = torch.zeros_like(kept)
        if getattr(norm, "bias", None) is not None:
            return 0.0
        return float(bool(norm(torch.ones_like(kept)[None]).any()))
    finally:
        norm.weight.data = kept


@torch.no_grad()
def fold(layer: nn.Module, scaling: Scaling, scale: Tensor) -> None:
    """Multiply the input channels of `scaling.linears` by `scale` ``[in]``, and divide what feeds them, in place.

    The layer computes the same function as before.
    """
    previous: Any = layer.get_submodule(scaling.previous)
    if isinstance(previous, nn.Linear):
        previous.weight.div_(scale[:, None].to(previous.weight.dtype))
    else:
        offset = gain_offset(previous)
        gain = (previous.weight.float() + offset) / scale
        previous.weight.copy_(gain - offset)
    if getattr(previous, "bias", None) is not None:
        previous.bias.div_(scale.to(previous.bias.dtype))
    for name in (*scaling.linears, *scaling.routers):
        weight = layer.get_submodule(name).weight
        weight.copy_(weight.float() * scale)


@torch.no_grad()
def foldable(layer: CalibrationLayer, scalings: list[tuple[Scaling, Tensor]]) -> list[tuple[Scaling, Tensor]]:
    """Those pairs (scaling, scale) whose folding leaves the layer's output as it is, to 1e-4; a warning names the others.

    Names do not tell how a layer is wired: there may be a norm between two projections, or a norm without a gain. So each
    folding is tried out, on a copy in float32.
    """
    usual = _folded_output(layer, [])
    assert usual is not None

    def same(pairs: list[tuple[Scaling, Tensor]]) -> bool:
        folded = _folded_output(layer, pairs)
        return folded is not None and bool((folded - usual).abs().max() <= 1e-4 * usual.abs().max())

    if same(scalings):
        return scalings
    kept = [pair for pair in scalings if same([pair])]
    left = [f"{s.previous} into {', '.join(s.linears)}" for s, scale in scalings if all(s is not k for k, _ in kept)]
    warnings.warn(
        f"{layer.name} computes something else when a scale moves from {'; from '.join(left)}: left unscaled",
        stacklevel=2,
    )
    return kept


def _folded_output(layer: CalibrationLayer, pairs: list[tuple[Scaling, Tensor]]) -> Tensor | None:
    """What the layer makes of its first batch, in float32, with scales folded; None if they cannot be."""
    twin = copy.deepcopy(layer.module).float()
    try:
        for scaling, scale in pairs:
            fold(twin, scaling, scale)
    except (AttributeError, RuntimeError):  # a norm without a gain, or of another width
        return None
    in_float: Any = tree_map(
        lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x,
        (layer.batches[0], layer.arguments),
    )
    out = twin(in_float[0], **in_float[1])
    return out[0] if isinstance(out, tuple) else out


def _scale(mean_abs: Tensor, alpha: float) -> Tensor:
    """``mean|x|^alpha``, clear of zero, centred so that the largest and the smallest are reciprocal (paper, eq. 5)."""
    scale = mean_abs.float().pow(alpha).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


@torch.no_grad()
def search_scale(
    layer: CalibrationLayer,
    scaling: Scaling,
    grid: Grid,
    run: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Find the exponent whose scale changes the block's output least after rounding.

    Args:
        layer: an observed layer.
        scaling: which inputs to scale.
        grid: what is rounded to.
        run: computes the block's output. None: the block is one linear layer, whose error follows from its Hessian.

    Returns:
        the scale, float32 ``[in]``, and the whole search as pairs (alpha, error relative to alpha = 0).
    """
    mean_abs = layer.mean_abs(scaling.linears)
    linears = [layer.linears[name] for name in scaling.linears]
    originals = [linear.weight.data for linear in linears]
    reference = run() if run is not None else None
    errors = []
    try:
        for alpha in ALPHAS:
            scale = _scale(mean_abs, alpha)
            error = 0.0
            for linear, original in zip(linears, originals):
                rounded = grid.round(original.float() * scale) / scale
                if reference is None:
                    hessian = layer.statistics[scaling.linears[0]].hessian
                    gram = add_gram(torch.zeros_like(hessian), rounded - original)
                    error += float((gram * hessian).sum())  # trace((W - Q) H (W - Q)^T)
                else:
                    linear.weight.data = rounded.to(original.dtype)
            if run is not None:
                error = float((run().float() - reference.float()).square().mean())
            errors.append(error)
    finally:
        for linear, original in zip(linears, originals):
            linear.weight.data = original
    best = min(range(len(ALPHAS)), key=errors.__getitem__)
    relative = [(alpha, error / max(errors[0], 1e-30)) for alpha, error in zip(ALPHAS, errors)]
    return _scale(mean_abs, ALPHAS[best]), relative


@torch.no_grad()
def clip_weight(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Shrink each group's range to what leaves the smallest output error after rounding; returns the clipped weight.

    A group's error is judged by its own block of the Hessian, so neither tokens nor outputs are needed.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``.
    """
    group_size = grid.group_size
    assert isinstance(group_size, int)
    groups = weight.float().unflatten(1, (-1, group_size))  # [out, groups, group]
    count = groups.shape[1]
    at = torch.arange(count, device=weight.device)
    blocks = hessian.reshape(count, group_size, count, group_size)[at, :, at]  # [groups, group, group]
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = torch.full(groups.shape[:2], float("inf"), device=weight.device)
    kept = groups
    for ratio in CLIPS:
        clipped = groups.clamp(low * ratio, high * ratio)
        rounded = grid.round(clipped.flatten(1)).view_as(groups)
        difference = (rounded - groups).transpose(0, 1)  # [groups, out, group]
        error = ((difference @ blocks) * difference).sum(-1).T
        better = error < best
        best = torch.where(better, error, best)
        kept = torch.where(better[..., None], clipped, kept)
    return kept.flatten(1).to(weight.dtype)


@torch.no_grad()
def _block_runners(layer: CalibrationLayer, blocks: list[str], tokens: int) -> dict[str, Callable[[], Tensor]]:
    """For each block of the layer a function that runs it on what it gets to see, for the first `tokens` tokens or so."""
    seen: dict[str, list[tuple[tuple, dict]]] = {block: [] for block in blocks}

    def keep(block: str) -> Callable:
        return lambda module, args, kwargs: seen[block].append((args, kwargs))

    modules = {block: layer.module.get_submodule(block) for block in blocks}
    hooks = [module.register_forward_pre_hook(keep(block), with_kwargs=True) for block, module in modules.items()]
    try:
        done = 0
        for batch in layer.batches:
            if done and done + batch.shape[0] * batch.shape[1] > tokens:
                break
            done += batch.shape[0] * batch.shape[1]
            layer.run(batch)
    finally:
        for hook in hooks:
            hook.remove()

    def runner(block: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            outputs = [modules[block](*args, **kwargs) for args, kwargs in seen[block]]
            return torch.cat([out[0] if isinstance(out, tuple) else out for out in outputs])

        return run

    return {block: runner(block) for block in blocks}


def scale_layer(
    layer: CalibrationLayer,
    grid: Grid,
    tokens: int = SEARCH_TOKENS,
    trace: dict[str, list[tuple[float, float]]] | None = None,
) -> None:
    """Search and fold all scales of one observed layer; its statistics become those of the scaled inputs."""
    found: list[tuple[Scaling, Tensor]] = []
    scalings = scaling_groups(layer.module)
    runners = _block_runners(layer, [s.block for s in scalings if s.block not in layer.linears], tokens)
    for scaling in scalings:
        scale, search = search_scale(layer, scaling, grid, runners.get(scaling.block))
        found.append((scaling, scale))
        if trace is not None:
            trace[f"{layer.name}.{'+'.join(scaling.linears)}"] = search
    for scaling, scale in foldable(layer, found):
        fold(layer.module, scaling, scale)
        for statistics in layer.statistics_of(scaling.linears):
            statistics.rescale(1 / scale)


def awq(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | Calibration,
    texts: str | list[str] | None = None,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    rounding: Rounding = "nearest",
    clip: bool = True,
    search_tokens: int = SEARCH_TOKENS,
    trace: dict[str, list[tuple[float, float]]] | None = None,
    **calibration: Any,
) -> PreTrainedModel:
    """Quantize every linear layer of a decoder with AWQ, in place; embeddings and the output head stay.

    The model is changed only when the last layer is done; an error or an interruption leaves it as it was.

    Args:
        model, tokenizer, texts: see `calibrate`; a ready `Calibration` may stand in for the tokenizer.
        bits, group_size, symmetric: of the rounding; AWQ checkpoints are affine.
        rounding: ``"nearest"`` as in the paper, or ``"gptq"``: AWQ's scales, then GPTQ's compensation.
        clip: also search each group's range (not for q and k, whose errors meet in a product).
        search_tokens: tokens that judge a scale by its block's output.
        trace: receives every search: name -> pairs (alpha, error relative to alpha = 0).
        **calibration: passed on to `calibrate`.

    Returns:
        The same model: its linears now `QuantizedLinear`, its norms scaled.

    Raises:
        ValueError: the decoder's layers are wired in a way AWQ has no rule for, or see `calibrate`.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be 'nearest' or 'gptq', got {rounding!r}")
    grid = Grid(bits, group_size, symmetric)
    run = calibrate(model, tokenizer, texts, **calibration)
    run.check_groups(grid)
    for module in run.layers.values():
        scaling_groups(module)

    def rounded(layer: CalibrationLayer, name: str) -> QuantizedTensor:
        weight, hessian = layer.linears[name].weight.data, layer.statistics[name].hessian
        if rounding == "gptq":
            return gptq_quantize(weight, hessian, bits, group_size, symmetric=symmetric, act_order=True)
        if clip and not name.endswith(("q_proj", "k_proj")):
            weight = clip_weight(weight, hessian, grid)
        return grid.quantize(weight)

    return quantize_layers(model, run, rounded, lambda layer: scale_layer(layer, grid, search_tokens, trace))
