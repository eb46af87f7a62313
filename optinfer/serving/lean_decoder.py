"""The forward pass of a Llama-like decoder without its modules: the same weights and formulas, far fewer calls.

Half of a transformers step for a few tokens is not matrix work (a module call, a cast, a concatenation, a small product
at a time). Here a layer is two norms, one rotation, attention, and four products. On a CPU with a C++ compiler the
whole step is one call instead (`CompiledDecoder`).

Families whose layer is this formula: Llama, Mistral, Qwen2, Qwen3. For others `LeanDecoder.of` returns None, and the
engine calls the model as it is.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from optinfer.serving.fuse import merge
from optinfer.serving.paged_batch import PagedBatch
from optinfer.serving.rotary import Angles, depends_on_position_alone
from optinfer.serving.watch import num_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


def is_lean(model: "PreTrainedModel") -> bool:
    """Whether the model is of a family whose formula we know, and computes nothing besides it."""
    if type(model).__name__ not in FAMILIES or model.config.hidden_act != "silu" or model.training:
        return False
    if not depends_on_position_alone(model.model.rotary_emb):
        return False
    return not any(num_hooks(m._forward_hooks) or num_hooks(m._forward_pre_hooks) for m in model.modules())


class Product:
    """`x @ W.T + b` of one or more layers that read the same input, side by side: [tokens, sum of widths]."""

    def __init__(self, *layers: nn.Module):
        self.layers = layers
        self.merged = merge(layers)

    def __call__(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return linear(x, *self.merged)
        parts = [layer(x) for layer in self.layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _Layer:
    def __init__(self, layer: Any, index: int):
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.scale = index, attention.scaling
        self.window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.down = Product(attention.o_proj), Product(mlp.down_proj)
        self.gate_up = Product(mlp.gate_proj, mlp.up_proj)
        self.norm_attention = _norm(layer.input_layernorm)
        self.norm_mlp = _norm(layer.post_attention_layernorm)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.norm_heads = None if q_norm is None else (_norm(q_norm), _norm(k_norm))


class LeanDecoder:
    """Computes packed batches with a model's weights; see `is_lean`. `head`: the layer that makes logits; `max_length`: of a
    sequence, where CUDA graphs are captured."""

    def __init__(self, model: "PreTrainedModel", head: nn.Module, max_length: int = 1024):
        config = model.config
        base: Any = model.model  # torch takes a module's attributes for tensors
        self.model = model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.embedding = base.embed_tokens
        self.angles = Angles(base.rotary_emb, self.embedding.weight.dtype, self.embedding.weight.device, max_length)
        self.layers = [_Layer(layer, index) for index, layer in enumerate(base.layers)]
        self.norm, self.head = _norm(base.norm), Product(head)

    def __call__(self, batch: PagedBatch) -> tuple[Tensor, Tensor]:
        """The logits [rows, vocabulary] of the batch's `logit_rows`, and all final hidden states [tokens, hidden]."""
        x = self.embedding(batch.input_ids[0])
        cos, sin = self.angles(batch.position_ids[0], batch.highest_position)
        half = self.head_dim // 2
        sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)  # the minus of the formula, once for all layers
        for layer in self.layers:
            x = x + layer.out(self._attention(layer, _normalize(x, layer.norm_attention), cos, sin, batch))
            gate, up = layer.gate_up(_normalize(x, layer.norm_mlp)).chunk(2, dim=-1)
            x = x + layer.down(silu(gate) * up)
        x = _normalize(x, self.norm)
        return self.head(x[batch.logit_rows]), x

    def _attention(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, batch: PagedBatch) -> Tensor:
        heads = layer.qkv(x).view(len(x), -1, self.head_dim)  # queries, then keys, then values
        rotated = self.heads + self.kv_heads
        qk, v = heads[:, :rotated], heads[:, rotated:]
        if layer.norm_heads is not None:
            parts = zip((qk[:, : self.heads], qk[:, self.heads :]), layer.norm_heads)
            qk = torch.cat([_normalize(part, norm) for part, norm in parts], dim=1)
        qk = torch.addcmul(qk * cos[:, None], qk.roll(self.head_dim // 2, -1), sin[:, None])
        out = batch.attend(layer.index, qk[:, : self.heads], qk[:, self.heads :], v, layer.scale, layer.window)
        return out.flatten(1)


def _norm(module: Any) -> tuple[Tensor, float]:
    """A norm's weight and epsilon."""
    return module.weight.detach(), module.variance_epsilon


def _normalize(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    weight, eps = norm
    return rms_norm(x, weight.shape, weight, eps)
