"""What a model asks of attention, found by watching it.

Tables of model families age. So a model is run once as it is and once with an attention function that writes down what
every layer asks for (shapes, window, soft cap, sinks, the rule of its mask) and answers with exactly that. If the results
agree, we know what the model needs; if not, or if it asks for something we do not do, it is refused by name.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

IMPLEMENTATION = "optinfer_examination"
PROBE_TOKENS = 24
_FARTHEST = 2**20  # tokens; what a mask does beyond is not looked at

# Arguments of an attention function that change nothing of the result in inference, or that we read.
_HARMLESS = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "num_items_in_batch",
        "past_key_values",
        "attention_mask",
        "layer_type",
    }
)
# How far logits may be apart, relative to their size, by dtype: rounding, through all layers.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6, torch.float16: 0.03, torch.bfloat16: 0.08}


class UnsupportedModel(ValueError):
    """A model needs something of attention or of the cache that is not done here; the message names it."""


@dataclass(frozen=True)
class LayerNeeds:
    """One layer's attention.

    Attributes:
        heads, kv_heads, head_dim: of queries, and of keys and values.
        window: tokens that a query sees, itself included; None: all before it.
        softcap: of the scores, or None.
        sinks: whether heads have a score that takes part in the softmax without a value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


@dataclass(frozen=True)
class ModelNeeds:
    """What `examine` found. `tokens` [1, n] and `logits` [n, vocabulary]: a random prompt, and what the model says to it."""

    layers: tuple[LayerNeeds, ...]
    tokens: Tensor
    logits: Tensor

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(layers, KV heads, head dimension).

        Raises UnsupportedModel: layers differ.
        """
        shapes = {(layer.kv_heads, layer.head_dim) for layer in self.layers}
        if len(shapes) > 1:
            raise UnsupportedModel(f"layers have keys of different shapes, {sorted(shapes)}; the pages have one shape")
        return (len(self.layers), *shapes.pop())


def examine(model: PreTrainedModel, max_length: int) -> ModelNeeds:
    """Run a short random prompt through the model twice, see above. The model is left as it was.

    Args:
        model: a causal language model of transformers.
        max_length: longest sequence it will see here.

    Raises:
        UnsupportedModel: it needs what we do not do.
    """
    _refuse_by_config(model, max_length)
    vocabulary = len(cast(Tensor, model.get_input_embeddings().weight))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary // 8, vocabulary, (1, PROBE_TOKENS), generator=generator, device="cpu").to(
        model.device
    )
    examination = _Examination(max_length)
    with in_eval_mode(model), torch.no_grad():
        logits = _logits(model, tokens)
        with examination.watching(model):
            ours = _logits(model, tokens)
    if not bool(logits.isfinite().all()):
        raise UnsupportedModel("the model's own logits are not finite numbers; its weights are broken")
    if not examination.layers:
        raise UnsupportedModel(f"{type(model).__name__} has no attention that goes through transformers' interface")
    if sorted(examination.layers) != list(range(len(examination.layers))):
        raise UnsupportedModel(
            f"attention layers are numbered {sorted(examination.layers)}: some keep another kind of state"
        )
    if difference := disagreement(ours, logits, model.dtype):
        raise UnsupportedModel(f"{type(model).__name__}: attention as its layers ask for it gives {difference}")
    layers = tuple(examination.layers[i] for i in sorted(examination.layers))
    _refuse_hidden_window(model, layers, max_length)
    return ModelNeeds(layers, tokens, logits)


def disagreement(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> str:
    """How logits [tokens, vocabulary] differ by more than rounding in `dtype`; empty if they do not.

    A quarter of the tokens may be farther apart: where experts or near ties are chosen, rounding decides.
    """
    apart = (ours.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1).clamp_min(1e-30)
    beyond = ~(apart <= _TOLERANCE.get(dtype, 0.1))  # NaN is beyond
    if beyond.float().mean() <= 0.25:
        return ""
    return f"other logits than its own (relative difference {float(apart.nan_to_num(torch.inf).median()):.2g})"


def _refuse_by_config(model: Any, max_length: int) -> None:
    """What would not show within a short prompt."""
    name, config = type(model).__name__, model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{name} does not route its attention through transformers' interface")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} has an encoder; only decoders are served")
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind is None or not ("dynamic" in kind or kind == "longrope"):
                continue
            parameters = getattr(config, "rope_parameters", None) or {}
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = original or getattr(module, "original_max_seq_len", None) or config.max_position_embeddings
            if max_length > limit:
                raise UnsupportedModel(
                    f"{name} has {kind} rotary positions: beyond {limit} tokens, the angles of all tokens depend on the "
                    f"length of the longest sequence beside them. Set max_model_len={limit}"
                )


def _refuse_hidden_window(model: Any, layers: tuple[LayerNeeds, ...], max_length: int) -> None:
    """A window that only the model's cache keeps: no layer asks for it, and no prompt in one piece shows it."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    says_full = set(getattr(config, "layer_types", None) or []) == {"full_attention"}
    if (
        isinstance(window, int)
        and window < max_length
        and not says_full
        and all(layer.window is None for layer in layers)
    ):
        raise UnsupportedModel(
            f"{type(model).__name__} has sliding_window={window} in its config, and none of its layers asks attention for it. "
            f"Set max_model_len={window}"
        )


@contextlib.contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """In eval mode, whatever its owner left it in."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _logits(model: Any, tokens: Tensor) -> Tensor:
    try:
        return model(input_ids=tokens, use_cache=False).logits[0]
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever a foreign model raises when it misses something
        raise UnsupportedModel(f"{type(model).__name__} cannot compute a plain prompt of token ids: {error}") from error


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs in which the modules of a model look up their attention function."""
    found: list[Any] = [model.config.get_text_config()]
    found += [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    return list({id(config): config for config in found}.values())


@contextlib.contextmanager
def attention_implementation(configs: list[PreTrainedConfig], name: str) -> Iterator[None]:
    """Let a model's layers call another attention function."""
    usual = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, before in zip(configs, usual):
            config._attn_implementation = before


# ---------------------------------------------------------------------------------------------- watching


@dataclass
class _Examination:
    max_length: int
    layers: dict[int, LayerNeeds] = field(default_factory=dict)
    masks: list[tuple[Tensor, int | None]] = field(default_factory=list)  # masks we made, and the windows they mean

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        token = _current.set(self)
        try:
            with attention_implementation(attention_configs(model), IMPLEMENTATION):
                yield
        finally:
            _current.reset(token)

    def mask(self, q_length: int, kv_length: int, rule: Callable[..., Tensor], device: torch.device) -> Tensor:
        """A mask [1, 1, q, kv] that means what the model's rule means, remembered with its window."""
        window = window_of(rule, self.max_length)
        mask = _seen(q_length, kv_length, window, device)[None, None]
        if not torch.equal(mask.expand(1, 1, q_length, kv_length), _apply(rule, q_length, kv_length, device)):
            raise UnsupportedModel(
                "a mask of its own: what a token sees is more than itself, a window, or all before it"
            )
        self.masks.append((mask, window))
        return mask

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, needs: dict
    ) -> Tensor:
        """q, k, v [1, heads, n, dim] -> [1, n, heads, dim]."""
        index, name = getattr(module, "layer_idx", None), type(module).__name__
        if not isinstance(index, int):
            raise UnsupportedModel(f"{name} does not say which layer it is")
        if index in self.layers:
            raise UnsupportedModel(f"{name}: layer {index} attends more than once in a pass")
        if k.shape != v.shape or q.shape[-1] != k.shape[-1]:
            raise UnsupportedModel(
                f"{name} has keys of {k.shape[-1]} and values of {v.shape[-1]} numbers per head (multi-head latent attention and "
                "its like): the pages hold one size"
            )
        if q.shape[1] % k.shape[1]:
            raise UnsupportedModel(f"{name} has {q.shape[1]} query heads for {k.shape[1]} key heads")
        windows = [needs.pop("window")]
        if mask is not None:
            windows.append(self._window_of_mask(mask, q.shape[2], name))
        window = min((w for w in windows if w is not None), default=None)
        layer = LayerNeeds(q.shape[1], k.shape[1], q.shape[-1], window, needs["softcap"], needs["sinks"] is not None)
        self.layers[index] = layer
        return _attention(q, k, v, scale, layer, needs["sinks"])

    def _window_of_mask(self, mask: Tensor, length: int, name: str) -> int | None:
        for ours, window in self.masks:
            if mask is ours:
                return window
        if mask.dtype == torch.bool and mask.shape[-2:] == (length, length):  # a copy, say of another shape
            for ours, window in self.masks:
                if torch.equal(mask.expand_as(ours), ours):
                    return window
        raise UnsupportedModel(f"{name} adds a mask or a bias of its own to the scores")


_current: contextvars.ContextVar[_Examination] = contextvars.ContextVar("optinfer_examination")


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [queries, keys]; the last query is the last key."""
    key = torch.arange(keys, device=device)
    own = torch.arange(keys - queries, keys, device=device)[:, None]
    seen = key <= own
    return seen if window is None else seen & (key > own - window)


def _apply(rule: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> Tensor:
    zero = torch.zeros((), dtype=torch.long, device=device)
    q = torch.arange(keys - queries, keys, device=device)[:, None].expand(queries, keys)
    kv = torch.arange(keys, device=device)[None].expand(queries, keys)
    return torch.as_tensor(rule(zero, zero, q, kv), device=device).expand(queries, keys)[None, None]


def window_of(rule: Callable[..., Tensor], max_length: int) -> int | None:
    """The window that a mask rule of transformers means, for sequences up to `max_length`; None: everything before.

    Raises UnsupportedModel: it is not a window (chunks, blocks, a look ahead).
    """
    length = min(max_length, _FARTHEST)
    zero, key = torch.zeros((), dtype=torch.long), torch.arange(length)
    counts = {}
    for last in sorted({length - 1, length * 2 // 3, length // 2, length // 3, min(37, length - 1)}):
        try:
            seen = torch.as_tensor(rule(zero, zero, torch.full_like(key, last), key)).expand(length)
        except Exception as error:  # rules may look into tensors of the step they were made for
            raise UnsupportedModel(f"a mask whose rule cannot be read: {error}") from error
        counts[last] = int(seen.sum())
        if bool(seen[last + 1 :].any()):
            raise UnsupportedModel("attention that looks ahead: tokens see later ones")
        if not bool(seen[last + 1 - counts[last] : last + 1].all()):
            raise UnsupportedModel("a mask with holes: a token does not see a row of tokens before it")
    window = max(counts.values())
    if any(count != min(window, last + 1) for last, count in counts.items()):
        raise UnsupportedModel("chunked attention: how far back a token sees depends on where it stands")
    return window if window < length else None


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, layer: LayerNeeds, sinks: Tensor | None) -> Tensor:
    """The formula, in float32."""
    group = layer.heads // layer.kv_heads
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = q.float() @ k.transpose(2, 3) * scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    seen = _seen(q.shape[2], k.shape[2], layer.window, q.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.detach().float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).to(q.dtype).transpose(1, 2).contiguous()


def read_needs(module: nn.Module, kwargs: dict[str, Any], causal: bool | None) -> dict[str, Any]:
    """Window, soft cap and sinks from an attention function's arguments.

    Raises UnsupportedModel: there is an argument that we do not know.
    """
    if causal is False or (causal is None and not getattr(module, "is_causal", True)):
        raise UnsupportedModel(f"{type(module).__name__} looks ahead: its attention is not causal")
    kwargs = dict(kwargs)
    needs = {"window": kwargs.pop("sliding_window", None), "softcap": kwargs.pop("softcap", None)}
    needs["sinks"] = kwargs.pop("s_aux", None)
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} asks attention for {', '.join(unknown)}, which is not done here"
        )
    return needs


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    needs = read_needs(module, kwargs, is_causal)
    return _current.get().attend(module, query, key, value, attention_mask, scale, needs), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Callable[..., Tensor] | None = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    if mask_function is None:
        return None
    return _current.get().mask(q_length, kv_length, mask_function, device)


def register() -> None:
    """Make the name known to transformers; safe to call twice."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
