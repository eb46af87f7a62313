"""Calibration: what a layer's inputs look like, gathered layer by layer with bounded memory.

Calibrated methods need statistics of every linear layer's inputs. Holding them all at once takes more memory than the
model (a Hessian is ``[in, in]``), so the decoder is walked one layer at a time: run it over the calibration tokens,
hand its statistics to whoever quantizes it, run it again as quantized to get the next layer's inputs, forget it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optinfer.quantization.experts import QuantizedExperts, expert_stacks, put_experts, separate_experts, transposed
from optinfer.quantization.formats.grid import BITS
from optinfer.quantization.formats.tensor import QuantizedTensor
from optinfer.quantization.layers import replace_module, select_layers
from optinfer.quantization.linear import QuantizedLinear, bias_of
from optinfer.quantization.methods.grid import Grid
from optinfer.quantization.model import check_present, mark_quantized, refuse_quantized
from optinfer.quantization.schemes import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Calibration", "CalibrationError", "CalibrationLayer", "InputStatistics", "calibrate"]

GRAM_BLOCK = 256  # large enough for a matrix product to run at full speed


class CalibrationError(ValueError):
    """The calibration text cannot tell what a layer's inputs look like; the message names the layer."""


def add_gram(total: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
    """``total += factor * x^T x`` in place, for a symmetric `total` ``[in, in]`` and `x` ``[rows, in]``.

    The result is symmetric, so blocks below the diagonal are copied and not computed: two fifths of the arithmetic less.
    """
    for start in range(0, len(total), GRAM_BLOCK):
        stop = start + GRAM_BLOCK
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:], alpha=factor)
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


@dataclass
class InputStatistics:
    """What the inputs of one linear layer looked like.

    Attributes:
        hessian: ``2 / tokens * sum of x x^T``, float32 ``[in, in]``: the Hessian of the layer's mean squared error.
        mean_abs: mean magnitude of each input feature, float32 ``[in]``.
        max_abs: largest magnitude of each input feature, float32 ``[in]``.
        tokens: how many inputs were seen.
    """

    hessian: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device) -> InputStatistics:
        zeros = torch.zeros(features, device=device)
        return cls(torch.zeros(features, features, device=device), zeros.clone(), zeros)

    def add(self, x: Tensor) -> None:
        """Take in a batch of inputs ``[..., in]``; the means stay means, so that no sum overflows."""
        x = x.detach().flatten(0, -2).float()
        if not len(x):
            return
        kept = self.tokens / (self.tokens + len(x))
        self.tokens += len(x)
        add_gram(self.hessian.mul_(kept), x, 2 / self.tokens)
        magnitude = x.abs()
        self.mean_abs.mul_(kept).add_(magnitude.sum(0) / self.tokens)
        torch.maximum(self.max_abs, magnitude.amax(0), out=self.max_abs)

    def rescale(self, factor: Tensor) -> None:
        """Become the statistics of ``x * factor``, `factor` ``[in]`` positive."""
        self.hessian.mul_(factor).mul_(factor[:, None])
        self.mean_abs.mul_(factor)
        self.max_abs.mul_(factor)


@dataclass
class CalibrationLayer:
    """One decoder layer at work on the calibration tokens: a copy that may be changed freely.

    Attributes:
        name: of the layer in the model, such as ``"model.layers.3"``.
        module: the copy. What it holds when the next layer is asked for decides that layer's inputs.
        batches: the layer's inputs, ``[batch, length, hidden]`` each.
        arguments: the keyword arguments the model calls the layer with (masks, rotary embeddings).
        linears: the linear layers inside, by their names within the layer; each expert's, where those lie in stacks.
        statistics: of their inputs; layers that share an input share the object.
    """

    name: str
    module: nn.Module
    batches: list[Tensor]
    arguments: dict[str, Any]
    linears: dict[str, nn.Linear] = field(default_factory=dict)
    statistics: dict[str, InputStatistics] = field(default_factory=dict)

    def run(self, batch: Tensor) -> Tensor:
        """The layer's output for one batch of inputs."""
        out = self.module(batch, **self.arguments)
        return out[0] if isinstance(out, tuple) else out

    def observe(self) -> None:
        """Fill `statistics` by running all batches.

        Raises:
            CalibrationError: a linear layer met no token (an expert nobody was routed to), or inputs are not finite.
        """
        self.statistics = {}
        owners: dict[int, InputStatistics] = {}  # id of an input tensor -> who accounts for it in this batch
        held: list[Tensor] = []  # keeps those ids from being reused

        def hook(name: str) -> Callable:
            def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0]
                mine = self.statistics.get(name)
                if id(x) in owners and (mine is None or mine is owners[id(x)]):
                    self.statistics[name] = owners[id(x)]
                    return
                if mine is None:
                    mine = self.statistics[name] = InputStatistics.empty(x.shape[-1], x.device)
                mine.add(x)
                owners[id(x)] = mine
                held.append(x)

            return seen

        hooks = [linear.register_forward_pre_hook(hook(name)) for name, linear in self.linears.items()]
        try:
            for batch in self.batches:
                self.run(batch)
                owners.clear()
                held.clear()
        finally:
            for handle in hooks:
                handle.remove()
        for name in self.linears:
            if name not in self.statistics or not self.statistics[name].tokens:
                raise CalibrationError(
                    f"calibration never reached {self.name}.{name} (an expert that no token was routed to?): "
                    "use more, or more varied, text; nothing was quantized"
                )
            if not torch.isfinite(self.statistics[name].max_abs).all():
                raise CalibrationError(
                    f"the inputs of {self.name}.{name} have NaN or Inf values; nothing was quantized"
                )

    def statistics_of(self, names: Iterable[str]) -> list[InputStatistics]:
        """Those of some linear layers, shared ones once."""
        return list({id(self.statistics[name]): self.statistics[name] for name in names}.values())

    def mean_abs(self, names: Iterable[str]) -> Tensor:
        """Mean magnitude of each feature over all that goes into some linear layers, float32 ``[in]``."""
        found = self.statistics_of(names)
        tokens = sum(one.tokens for one in found)
        return torch.stack([one.mean_abs * (one.tokens / tokens) for one in found]).sum(0)

    @torch.no_grad()
    def put(self, name: str, q: QuantizedTensor) -> None:
        """Let the copy compute with the quantized weight from now on."""
        self.linears[name].weight.data = q.dequantize(self.linears[name].weight.dtype)


class Calibration:
    """An iterable over a decoder's layers, see `calibrate`. Each iteration starts anew."""

    def __init__(self, model: PreTrainedModel, sequences: Tensor, batch_size: int, progress: bool = True):
        self.model = model
        self.sequences = sequences
        # Equal batches: the masks that the model prepares for the first one then fit all.
        self.batch_size = max(n for n in range(1, batch_size + 1) if len(sequences) % n == 0)
        self.progress = progress
        self.layers = decoder_layers(model)
        self.widths = decoder_widths(model)

    @property
    def num_tokens(self) -> int:
        return self.sequences.numel()

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def widths_by_name(self) -> dict[str, int]:
        """How many inputs each matrix of the decoder has, by its full name."""
        return {f"{prefix}.{name}": width for prefix, inside in self.widths.items() for name, width in inside.items()}

    def check_groups(self, grid: Grid) -> None:
        """Raise ValueError unless every matrix of the decoder can be quantized so."""
        bits, group_size = grid.bits, grid.group_size
        if isinstance(bits, bool) or bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size must be a positive int, got {group_size!r}")
        widths = set(self.widths_by_name.values())
        for name, width in self.widths_by_name.items():
            if width % group_size:
                fitting = [g for g in (16, 32, 64, 96, 128, 192, 256) if all(w % g == 0 for w in widths)]
                raise ValueError(
                    f"group_size={group_size} does not divide the {width} inputs of {name}; "
                    f"for this model: {', '.join(map(str, fitting)) or 'none of the usual sizes'}"
                )

    @torch.no_grad()
    def __iter__(self) -> Iterator[CalibrationLayer]:
        from tqdm.auto import tqdm

        batches, arguments = self._first_inputs()
        walk = tqdm(self.layers.items(), desc="calibrating", unit="layer", disable=not self.progress)
        for (name, layer), extra in zip(walk, arguments):
            twin = copy.deepcopy(layer)
            separate_experts(twin)
            linears: Any = {inner: twin.get_submodule(inner) for inner in self.widths[name]}
            work = CalibrationLayer(name, twin, batches, extra, linears)
            work.observe()
            yield work
            work.statistics = {}  # freed before the layer runs again
            for i, batch in enumerate(batches):
                batches[i] = work.run(batch)

    def _first_inputs(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The first layer's inputs, and the keyword arguments of each layer.

        The model itself prepares both: its layers are exchanged for recorders for the time of one pass. All sequences
        have one length, so masks and positions are those of the first batch.
        """
        parent, _, _ = next(iter(self.layers)).rpartition(".")
        holder = self.model.get_submodule(parent)
        assert isinstance(holder, nn.ModuleList)
        batches: list[Tensor] = []
        arguments: list[dict[str, Any]] = []
        originals = list(holder)
        try:
            for i, layer in enumerate(originals):
                holder[i] = _Recorder(layer, batches if i == 0 else None, arguments)
            device = self.model.get_input_embeddings().weight.device
            for ids in self.sequences.split(self.batch_size):
                self.model.base_model(input_ids=ids.to(device), use_cache=False)
                del arguments[len(originals) :]
        finally:
            for i, layer in enumerate(originals):
                holder[i] = layer
        return batches, arguments


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it is called with and passes its input on."""

    def __init__(self, layer: nn.Module, batches: list[Tensor] | None, arguments: list[dict[str, Any]]):
        super().__init__()
        self.__dict__.update(layer=layer, batches=batches, arguments=arguments)  # not registered as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # a model may ask its layer for, say, its attention type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise CalibrationError(
                f"{type(self.layer).__name__} is called with positional arguments besides the hidden states: "
                "calibration does not know this architecture"
            )
        if self.batches is not None:
            self.batches.append(hidden)
        self.arguments.append(kwargs | {"use_cache": False} if "use_cache" in kwargs else kwargs)
        return hidden


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | Calibration,
    texts: str | list[str] | None = None,
    num_sequences: int = 64,
    length: int = 256,
    batch_size: int = 8,
    progress: bool = True,
) -> Calibration:
    """Prepare a walk over the decoder's layers with the statistics of their inputs.

    >>> for layer in calibrate(model, tokenizer, texts):
    ...     hessian = layer.statistics["mlp.down_proj"].hessian

    Whoever walks may change ``layer.module`` (a copy); the following layers are then calibrated on what the changed
    layer produces. Beside the model, memory holds the tokens' hidden states, one layer's copy and its statistics.

    Args:
        model: a causal language model of transformers (Llama, Qwen, Mistral, Gemma and their like). Not changed.
        tokenizer: its tokenizer; a ready `Calibration` is returned as it is.
        texts: calibration text; the course's when None.
        num_sequences, length: the text is cut into up to so many sequences of so many tokens.
        batch_size: at most so many sequences run through a layer at once.
        progress: show a bar.

    Raises:
        CalibrationError: fewer tokens than the widest layer has inputs, so that its Hessian cannot have full rank.
        ValueError: a size is not positive, or the model is no decoder with a list of layers.
    """
    if isinstance(tokenizer, Calibration):
        return tokenizer
    for name, value in (("num_sequences", num_sequences), ("length", length), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    if texts is None:
        from optinfer import data

        texts = data.text("calibration")
    refuse_quantized(model)
    length = min(length, getattr(model.config.get_text_config(), "max_position_embeddings", length))
    sequences = _sequences(tokenizer, texts, num_sequences, length)
    run = Calibration(model, sequences, batch_size, progress)
    if not run.widths_by_name:
        raise ValueError(f"the layers of {type(model).__name__} hold no linear layers that can be quantized")
    name, widest = max(run.widths_by_name.items(), key=lambda pair: pair[1])
    if sequences.numel() < widest:
        raise CalibrationError(
            f"too little calibration text: {sequences.numel():,} tokens in sequences of {length}, but {name} has "
            f"{widest:,} inputs and needs at least as many tokens (16,384 are usual)"
        )
    return run


def _sequences(tokenizer: PreTrainedTokenizerBase, texts: str | list[str], count: int, length: int) -> Tensor:
    """Token ids ``[sequences, length]``; each begins with the start token where the tokenizer would put one."""
    text = texts if isinstance(texts, str) else "\n\n".join(texts)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    usual = tokenizer("a")["input_ids"]
    start = [tokenizer.bos_token_id] if usual and usual[0] == tokenizer.bos_token_id is not None else []
    body = min(length - len(start), len(ids))
    if body < 1:
        raise CalibrationError(f"too little calibration text: {len(ids)} tokens")
    cut = [start + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
    return torch.tensor(cut[:count])


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder's layers by name: its one list of modules as long as the config says.

    A vision tower may have a list as long; the model says which part of it writes text.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    for name, module in sorted(found, key=lambda pair: id(pair[1]) not in inside):
        return {f"{name}.{i}": layer for i, layer in enumerate(module)}
    raise ValueError(f"{type(model).__name__} is not a decoder that keeps its {count} layers in one list")


def decoder_widths(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """For each of the decoder's layers the matrices to quantize, by their names within it, and how many inputs each has.

    Names are those of `separate_experts`. Raises ValueError: weights that are not in memory, or see `select_layers`.
    """
    selection = select_layers(model)
    widths: dict[str, dict[str, int]] = {prefix: {} for prefix in decoder_layers(model)}
    for prefix, inside in widths.items():
        for name, layer in selection.layers.items():
            if isinstance(layer, nn.Linear) and name.startswith(f"{prefix}."):
                check_present(name, layer)
                inside[name.removeprefix(f"{prefix}.")] = layer.in_features
        for name, stack in selection.stacks.items():
            if name.startswith(f"{prefix}."):
                check_present(name, model.get_submodule(name.rpartition(".")[0]), stack)
                width = stack.shape[1 if transposed(model, name) else 2]
                inside |= {f"{name.removeprefix(f'{prefix}.')}.{i}": width for i in range(len(stack))}
    return widths


def quantize_layers(
    model: PreTrainedModel,
    run: Calibration,
    rounded: Callable[[CalibrationLayer, str], QuantizedTensor],
    prepare: Callable[[CalibrationLayer], None] = lambda layer: None,
    threshold: float = 6.0,
) -> PreTrainedModel:
    """Quantize a decoder layer by layer, each calibrated on what those before it, already quantized, now produce.

    Args:
        rounded: gives a layer's matrix of that name in its quantized form.
        prepare: may change the layer's copy before: its matrices, norms and biases.
        threshold: of int8 activations' outliers.

    Returns:
        The same model; it is changed when the last layer is done.
    """
    quantized: dict[str, QuantizedTensor] = {}
    others: dict[str, Tensor] = {}
    for layer in run:
        before = {name: p.data.clone() for name, p in _unquantized_parameters(layer.module)}
        prepare(layer)
        for name in layer.linears:
            quantized[f"{layer.name}.{name}"] = q = rounded(layer, name)
            layer.put(name, q)
        for name, p in _unquantized_parameters(layer.module):
            if not torch.equal(before[name], p.data):
                others[f"{layer.name}.{name}"] = p.data.clone()
    for name, tensor in others.items():  # from here on nothing can fail
        model.get_parameter(name).data.copy_(tensor)
    return install(model, quantized, threshold)


def _unquantized_parameters(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Norm gains and biases: all parameters that are not a linear layer's weight."""
    weights = {id(module.weight) for module in layer.modules() if isinstance(module, nn.Linear)}
    return [(name, p) for name, p in layer.named_parameters() if id(p) not in weights]


def install(
    model: PreTrainedModel, quantized: Mapping[str, QuantizedTensor], threshold: float = 6.0
) -> PreTrainedModel:
    """Exchange linear layers and experts for quantized ones, in place; `threshold` is that of int8 activations' outliers."""
    stacks = expert_stacks(model)
    experts: dict[str, list[QuantizedTensor]] = {}
    for name, q in quantized.items():
        if (stack := name.rpartition(".")[0]) in stacks:
            experts.setdefault(stack, []).append(q)
        else:
            linear = model.get_submodule(name)
            replace_module(model, linear, QuantizedLinear.from_quantized(q, bias_of(linear), threshold))
    for name, matrices in experts.items():
        empty = QuantizedExperts.like(stacks[name], Scheme.of(matrices[0]), transposed(model, name))
        put_experts(model, name, empty.fill(matrices))
    scheme = replace(Scheme.of(next(iter(quantized.values()))), threshold=threshold)
    mark_quantized(model, scheme)
    return model
