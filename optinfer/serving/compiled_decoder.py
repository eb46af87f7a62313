"""A Llama-like decoder's step as one call of the C++ kernels (`optinfer/cpu`): packed tokens in, logits out.

The kernels read the model's own parameters where they lie. Nothing is copied, so a weight that changes in place is seen
at once, and one that moved (`.to()`, `load_state_dict(assign=True)`) is noticed by its address.
"""

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optinfer import cpu
from optinfer.cpu import structs
from optinfer.kv_cache.pool import KVPool
from optinfer.serving.paged_batch import PagedBatch
from optinfer.serving.rotary import Angles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)


class CompiledDecoder:
    """Computes packed batches with a model's weights. `of` says whether it can."""

    def __init__(self, model: "PreTrainedModel", pool: KVPool, head: nn.Module):
        kernels = cpu.kernels()
        assert kernels is not None
        config = model.config
        base: Any = model.model  # torch takes a module's attributes for tensors
        self.kernels, self.model, self.pool = kernels, model, pool
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.hidden = pool.head_dim, config.hidden_size
        self.angles = Angles(base.rotary_emb, torch.float32, pool.device)
        self.vocabulary = base.embed_tokens.weight.shape[0]
        self._kept: list[Any] = []
        self._layers = (structs.Layer * len(base.layers))(
            *(self._layer(layer, i) for i, layer in enumerate(base.layers))
        )
        self.struct = structs.Decoder(
            num_layers=len(base.layers),
            hidden=self.hidden,
            intermediate=config.intermediate_size,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            eps=base.norm.variance_epsilon,
            scale=base.layers[0].self_attn.scaling,
            layers=ctypes.addressof(self._layers),
            embedding=self._numbers(base.embed_tokens.weight, (self.vocabulary, self.hidden)),
            norm=self._numbers(base.norm.weight, (self.hidden,)),
            head=self._weight(head, self.vocabulary, self.hidden),
        )

    @staticmethod
    def of(model: "PreTrainedModel", pool: KVPool, head: nn.Module) -> "CompiledDecoder | None":
        """For models that `is_lean` knows; `head`: the layer that makes logits. None: no kernels, another device, or a layer
        that they cannot read.
        """
        if pool.device.type != "cpu" or cpu.kernels() is None:
            return None
        try:
            return CompiledDecoder(model, pool, head)
        except _Unreadable:
            return None

    def __call__(self, batch: PagedBatch) -> tuple[Tensor, Tensor]:
        """float32: the logits [rows, vocabulary] of the batch's `logit_rows`, and all final states [tokens, hidden]."""
        if batch.highest_token >= self.vocabulary:
            raise ValueError(f"token id {batch.highest_token} is not in the vocabulary, 0 to {self.vocabulary - 1}")
        tokens = batch.num_tokens
        logits = torch.empty(len(batch.logit_rows), self.vocabulary)
        states = torch.empty(tokens, self.hidden)
        cos, sin = self.angles(batch.position_ids[0], batch.highest_position)
        if cos.shape != (tokens, self.head_dim):
            raise ValueError(f"rotary angles must be {[tokens, self.head_dim]}, got {list(cos.shape)}")
        ids = batch.input_ids[0]
        step = structs.Step(
            tokens=tokens,
            ids=ids.data_ptr(),
            slots=batch.slots.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            sequences=batch.sequences,
            num_logits=len(logits),
            logit_rows=batch.logit_rows.data_ptr(),
            logits=logits.data_ptr(),
            states=states.data_ptr(),
        )
        self.kernels.decode(self.struct, step)
        return logits, states

    # ---- pointers, after their shapes were checked

    def _layer(self, layer: Any, index: int) -> structs.Layer:
        attention, mlp = layer.self_attn, layer.mlp
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        intermediate = self.model.config.intermediate_size
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        heads = {}
        if getattr(attention, "q_norm", None) is not None:
            heads["norm_q"] = self._numbers(attention.q_norm.weight, (self.head_dim,))
            heads["norm_k"] = self._numbers(attention.k_norm.weight, (self.head_dim,))
        return structs.Layer(
            q=self._weight(attention.q_proj, q_width, self.hidden),
            k=self._weight(attention.k_proj, kv_width, self.hidden),
            v=self._weight(attention.v_proj, kv_width, self.hidden),
            o=self._weight(attention.o_proj, self.hidden, q_width),
            gate=self._weight(mlp.gate_proj, intermediate, self.hidden),
            up=self._weight(mlp.up_proj, intermediate, self.hidden),
            down=self._weight(mlp.down_proj, self.hidden, intermediate),
            norm_attention=self._numbers(layer.input_layernorm.weight, (self.hidden,)),
            norm_mlp=self._numbers(layer.post_attention_layernorm.weight, (self.hidden,)),
            pages=self.pool.cpu_pages(index),
            window=window or 0,
            **heads,
        )

    def _weight(self, layer: Any, rows: int, columns: int) -> structs.Weight:
        weight = cpu_weight(layer)
        if weight is None or weight.shape != (rows, columns):
            raise _Unreadable
        self._kept.append(weight)
        return weight.struct

    def _numbers(self, tensor: Tensor, shape: tuple[int, ...]) -> structs.Numbers:
        tensor = tensor.detach()
        if tensor.shape != shape or tensor.dtype not in _NUMBERS or not tensor.is_contiguous():
            raise _Unreadable
        self._kept.append(tensor)
        return structs.Numbers.of(tensor)


class _Unreadable(Exception):
    """A tensor of a kind or a shape that the kernels do not take."""


def cpu_weight(layer: nn.Module) -> cpu.CpuWeight | None:
    """A linear layer's weight as the kernels read it: plain layers, and quantized ones that say how."""
    if cpu.is_plain(layer):
        return cpu.CpuWeight.plain(layer.weight, layer.bias)
    return layer.cpu_weight() if hasattr(layer, "cpu_weight") else None
