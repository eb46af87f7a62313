"""Caches that keep less than every token in 16 bits, and what that costs: transformers caches to put into any model.

`QuantizedKV` stores old tokens in 8 or 4 bits. Keys have a few channels that are large for every token, so a scale per
channel, shared by a group of tokens, loses less than a scale per token; values have no such channels (KIVI, arXiv:2402.02750).

`SinkCache` forgets: it keeps the first tokens, on which attention rests, and the last ones (StreamingLLM, arXiv:2309.17453).
Kept keys stay rotated to their own positions.

`judge_cache` compares a cache with the full one by the next tokens' distributions; `find_needle` by a fact far back in the
prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from optinfer.kv_cache.layers import cache_layers
from optinfer.kv_cache.memory import kv_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

GROUP = 32  # tokens that share a key scale, and channels that share a value scale


@dataclass
class _Codes:
    """Whole numbers of `bits` bits, and a step and a lowest value for each group along one dimension, in 16 bits."""

    packed: Tensor
    step: Tensor
    lowest: Tensor
    bits: int

    @classmethod
    def of(cls, x: Tensor, bits: int, dim: int) -> "_Codes":
        """x [..., tokens, channels]; groups of `GROUP` along `dim` (-2: per channel, -1: per token)."""
        groups = x.float().unflatten(dim, (-1, GROUP))
        axis = dim if dim == -1 else -2
        lowest, highest = (f.to(torch.bfloat16) for f in torch.aminmax(groups, dim=axis, keepdim=True))
        step = ((highest.float() - lowest.float()) / (2**bits - 1)).to(torch.bfloat16)
        codes = ((groups - lowest.float()) / step.float().clamp_min(1e-30)).round().clamp(0, 2**bits - 1)
        codes = codes.to(torch.uint8)
        if bits == 4:
            codes = codes[..., 0::2] << 4 | codes[..., 1::2]
        return cls(codes, step, lowest, bits)

    def values(self, dim: int, dtype: torch.dtype) -> Tensor:
        codes = self.packed
        if self.bits == 4:
            codes = torch.stack([codes >> 4, codes & 15], -1).flatten(-2)
        groups = codes.float() * self.step.float() + self.lowest.float()
        return groups.flatten(-2 if dim == -1 else -3, -1 if dim == -1 else -2).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.step.nbytes + self.lowest.nbytes


class QuantizedKVLayer(DynamicLayer):
    """Keys and values in `bits` bits. The newest tokens, fewer than a group, stay as they come; `keys` and `values` hold them."""

    is_croppable = False

    def __init__(self, bits: int, per_channel_keys: bool):
        super().__init__()
        self.bits, self.key_dim = bits, -2 if per_channel_keys else -1
        self.old: list[tuple[_Codes, _Codes]] = []
        self.old_length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        recent_keys, recent_values = super().update(key_states, value_states)
        dtype = recent_keys.dtype
        pieces = [(keys.values(self.key_dim, dtype), values.values(-1, dtype)) for keys, values in self.old]
        result = [torch.cat(part, -2) for part in zip(*pieces, (recent_keys, recent_values))]
        full = recent_keys.shape[-2] // GROUP * GROUP
        if full:
            keys, values = recent_keys[..., :full, :], recent_values[..., :full, :]
            self.old.append((_Codes.of(keys, self.bits, self.key_dim), _Codes.of(values, self.bits, -1)))
            self.old_length += full
            self.keys, self.values = recent_keys[..., full:, :], recent_values[..., full:, :]
        return result[0], result[1]

    def get_seq_length(self) -> int:
        return self.old_length + super().get_seq_length()

    @property
    def nbytes(self) -> int:
        recent = (self.keys.nbytes + self.values.nbytes) if self.is_initialized else 0
        return recent + sum(keys.nbytes + values.nbytes for keys, values in self.old)


class SinkLayer(DynamicLayer):
    """The first `sinks` tokens and the last `window`, the newest included."""

    is_croppable = False

    def __init__(self, sinks: int, window: int):
        super().__init__()
        self.sinks, self.window, self.seen = sinks, window, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[-2]
        if keys.shape[-2] > self.sinks + self.window - 1:  # room for the next token
            self.keys, self.values = (
                torch.cat([x[..., : self.sinks, :], x[..., x.shape[-2] - self.window + 1 :, :]], -2)
                for x in (keys, values)
            )
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self.keys.shape[-2] if self.is_initialized else 0
        return kept + query_length, self.seen - kept

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0


class SmallerCache(Cache):
    """One layer object per layer of the model; `nbytes` weighs them."""

    @property
    def nbytes(self) -> int:
        return sum([layer.nbytes for layer in self.layers])


def quantized_kv(config: "PreTrainedConfig", bits: int = 8, per_channel_keys: bool = True) -> SmallerCache:
    """A cache in 8 or 4 bits.

    Raises ValueError: other bits; a model whose layers do not all keep keys and values of all tokens, in heads of a multiple
    of 32 numbers.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")
    for layer in cache_layers(config):
        if layer.kind != "full" or layer.key_dim % GROUP or layer.value_dim % GROUP:
            raise ValueError(f"every layer must keep all tokens in heads of a multiple of {GROUP} numbers, not {layer}")
    return SmallerCache(layers=[QuantizedKVLayer(bits, per_channel_keys) for _ in range(_num_layers(config))])


def sink_cache(config: "PreTrainedConfig", sinks: int = 4, window: int = 128) -> SmallerCache:
    """A cache of `sinks` first and `window` last tokens. Feed a prompt in one piece, then token by token."""
    if sinks < 0 or window < 1:
        raise ValueError(f"sinks must not be negative and window at least 1, got {sinks!r} and {window!r}")
    return SmallerCache(layers=[SinkLayer(sinks, window) for _ in range(_num_layers(config))])


def _num_layers(config: Any) -> int:
    return kv_shape(config)[0]


# ---------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Judgement:
    """`kl`: mean KL divergence in nats of the tokens after the prompt, from the full cache's distributions; `top1`: how often
    the favourite is the same; `nbytes`: of the cache at the end, `share`: of the full cache's bytes."""

    kl: float
    top1: float
    nbytes: int
    share: float


@torch.no_grad()
def judge_cache(model: "PreTrainedModel", tokens: Tensor, make_cache: Callable[[], Cache], prompt: int) -> Judgement:
    """Read `tokens` [1, n] once with a full cache and once with another, the first `prompt` in one piece, the rest one by one.

    Raises ValueError: no token is left after the prompt.
    """
    if not 0 < prompt < tokens.shape[1] - 1:
        raise ValueError(f"prompt must leave two tokens of {tokens.shape[1]} to judge by, got {prompt}")
    full, other = DynamicCache(config=model.config), make_cache()
    p, q = (_read(model, tokens, cache, prompt).log_softmax(-1) for cache in (full, other))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item() / len(p)
    held: Any = full.layers
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
    nbytes = other.nbytes if isinstance(other, SmallerCache) else whole
    return Judgement(kl, (p.argmax(-1) == q.argmax(-1)).float().mean().item(), nbytes, nbytes / whole)


def _read(model: Any, tokens: Tensor, cache: Cache, prompt: int) -> Tensor:
    """float64 logits of the tokens behind the prompt, but for the first of them, whose cache was never used."""
    model(tokens[:, :prompt], past_key_values=cache, logits_to_keep=1)
    steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(prompt, tokens.shape[1])]
    return torch.stack(steps).double()


@torch.no_grad()
def find_needle(
    model: "PreTrainedModel", prompt: Tensor, answer: Tensor, make_cache: Callable[[], Cache]
) -> tuple[bool, float]:
    """Whether greedy decoding after `prompt` [1, n] says `answer` [m], and the answer's mean log-probability per token.

    The prompt's last token is fed on its own, so that what it sees is what the cache kept.
    """
    cache = make_cache()
    model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
    token, found, total = prompt[:, -1:], True, 0.0
    for wanted in answer.tolist():
        logits = model(token, past_key_values=cache).logits[0, -1].double().log_softmax(-1)
        found &= int(logits.argmax()) == wanted
        total += float(logits[wanted])
        token = torch.tensor([[wanted]], device=prompt.device)
    return found, total / len(answer)
