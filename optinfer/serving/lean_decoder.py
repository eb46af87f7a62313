"""The forward pass of a Llama-like decoder without its modules: the same weights and formulas, far fewer calls.

Half of a transformers step on a CPU is not matrix work (a module call, a cast, a concatenation, a small product at a
time). Here a layer is two norms, one rotation, attention, and five products. In bf16 on a CPU the products use weights
that oneDNN has laid out for its kernels once, instead of at every call, and they apply SiLU, the gate and the residual
sum to their result before it leaves the registers. Norms, rotation and attention are one call each where there are
`cpu_kernels`.

Families whose layer is this formula: Llama, Mistral, Qwen2, Qwen3. For others `LeanDecoder.of` returns None, and the
engine calls the model as it is.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from optinfer.packed import PackedWeight, can_pack
from optinfer.serving.cpu_kernels import CpuKernels
from optinfer.serving.fuse import merged_weight
from optinfer.serving.paged_batch import PagedBatch

FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


class Product:
    """`x @ W.T + b` of one or more layers that read the same input, side by side: [tokens, sum of widths]."""

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self.merged = merged_weight(layers)

    def __call__(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return linear(x, *self.merged)
        parts = [layer(x) for layer in self.layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def silu(self, x: Tensor) -> Tensor:
        return silu(self(x))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


def product(*layers: Any) -> Product | PackedWeight:
    """Packed where that is possible: plain bf16 layers on a CPU whose oneDNN computes in bf16."""
    packed = all(type(layer) is nn.Linear and can_pack(layer.weight) for layer in layers)
    with_bias = [layer for layer in layers if getattr(layer, "bias", None) is not None]
    if not packed or (with_bias and len(with_bias) < len(layers)):
        return Product(list(layers))
    bias = torch.cat([layer.bias for layer in layers]) if with_bias else None
    return PackedWeight(torch.cat([layer.weight for layer in layers]), bias)


class _Layer:
    def __init__(self, layer: Any, index: int):
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.scale = index, attention.scaling
        self.window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        self.qkv = product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = product(attention.o_proj)
        self.gate, self.up, self.down = product(mlp.gate_proj), product(mlp.up_proj), product(mlp.down_proj)
        self.norm_attention = _norm(layer.input_layernorm)
        self.norm_mlp = _norm(layer.post_attention_layernorm)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.norm_heads = None if q_norm is None else (_norm(q_norm), _norm(k_norm))


class LeanDecoder:
    """Computes packed batches with a model's weights. Make it with `of`, which remembers one per model."""

    def __init__(self, model: Any):
        config, base = model.config, model.model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.embedding, self.rotary = base.embed_tokens, base.rotary_emb
        self.layers = [_Layer(layer, index) for index, layer in enumerate(base.layers)]
        self.norm, self.head = _norm(base.norm), product(model.lm_head)

    @staticmethod
    def of(model: Any) -> "LeanDecoder | None":
        """The model's lean decoder, new if its weights have changed since; None: it is not of a family we know."""
        if type(model).__name__ not in FAMILIES or model.config.hidden_act != "silu" or model.training:
            return None
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            return None  # somebody listens to the modules
        weights = tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
        known = _decoders.get(model)
        if known is None or known[0] != weights:
            known = _decoders[model] = (weights, LeanDecoder(model))
        return known[1]

    def __call__(self, batch: PagedBatch) -> tuple[Tensor, Tensor]:
        """The logits [rows, vocabulary] of the batch's `logit_rows`, and all final hidden states [tokens, hidden]."""
        x = self.embedding(batch.input_ids[0])
        kernels = batch.pool.kernels
        cos, sin = (angle[0].contiguous() for angle in self.rotary(x, batch.position_ids))
        if kernels is None:  # the minus of the formula, once for all layers
            half = self.head_dim // 2
            sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
        for layer in self.layers:
            attended = self._attention(layer, _normalize(x, layer.norm_attention, kernels), cos, sin, batch)
            x = layer.out.plus(attended, x)
            normed = _normalize(x, layer.norm_mlp, kernels)
            x = layer.down.plus(layer.up.times(normed, layer.gate.silu(normed)), x)
        x = _normalize(x, self.norm, kernels)
        return self.head(x[batch.logit_rows]), x

    def _attention(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, batch: PagedBatch) -> Tensor:
        kernels = batch.pool.kernels
        heads = layer.qkv(x).view(len(x), -1, self.head_dim)  # queries, then keys, then values
        rotated = self.heads + self.kv_heads
        qk, v = heads[:, :rotated], heads[:, rotated:]
        if layer.norm_heads is not None:
            q_norm, k_norm = layer.norm_heads
            parts = (qk[:, : self.heads], q_norm), (qk[:, self.heads :], k_norm)
            qk = torch.cat([_normalize(part, norm, kernels) for part, norm in parts], dim=1)
        if kernels is not None:
            kernels.rotate_(qk, cos, sin)
        else:
            qk = torch.addcmul(qk * cos[:, None], qk.roll(self.head_dim // 2, -1), sin[:, None])
        out = batch.attend(layer.index, qk[:, : self.heads], qk[:, self.heads :], v, layer.scale, layer.window, None)
        return out.flatten(1)


_decoders: weakref.WeakKeyDictionary[Any, tuple[tuple, LeanDecoder]] = weakref.WeakKeyDictionary()


def _norm(module: Any) -> tuple[Tensor, float]:
    """A norm's weight and epsilon."""
    return module.weight.detach(), module.variance_epsilon


def _normalize(x: Tensor, norm: tuple[Tensor, float], kernels: CpuKernels | None) -> Tensor:
    weight, eps = norm
    if kernels is None or weight.dtype != x.dtype:
        return rms_norm(x, weight.shape, weight, eps)
    return kernels.rms_norm(x, weight, eps)
