"""Runs a transformers model on a packed batch. It knows pages and tensors, but no requests."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optinfer.serving.fuse import fuse_projections
from optinfer.serving.lean_decoder import LeanDecoder, can_pack
from optinfer.serving.paged_batch import IMPLEMENTATION, Chunk, KVPool, PagedBatch


class ModelRunner:
    """A decoder model, its pool of pages, and one forward pass per step.

    Args:
        model: a transformers decoder whose attention goes through the attention interface.
        num_blocks, block_size: the pool; block numbers come from the block manager.
        fuse: compute Llama-like families by `LeanDecoder`. In bf16 on a CPU it keeps a repacked copy of the weights;
            elsewhere q/k/v and gate/up projections are merged in place (see `fuse_projections`). False: the modules
            as they are.

    A step is three parts so that the middle one can be captured in a CUDA graph: pack on the host, `forward` on the
    device, sample. Between steps the model is as its owner left it: `model.generate` keeps working.

    Attributes:
        hidden: the last final hidden states [tokens, hidden_size] in packed order; kept only if `keep_hidden`.
    """

    def __init__(self, model: Any, num_blocks: int, block_size: int, fuse: bool = True):
        if not getattr(model, "_supports_attention_backend", False):
            raise ValueError(f"{type(model).__name__} does not route its attention through transformers' interface")
        self.model = model
        self.config = model.config.get_text_config()
        weight = model.get_input_embeddings().weight
        self.pool = KVPool(self.config, num_blocks, block_size, weight.dtype, weight.device)
        if fuse and not (weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and can_pack()):
            fuse_projections(model)
        self.decoder = LeanDecoder.of(model) if fuse else None

    @torch.inference_mode()
    def run(self, chunks: list[Chunk], num_logits: list[int], copies: Sequence[tuple[int, int]] = ()) -> Tensor:
        """Compute the chunks; returns the logits [sum(num_logits), vocabulary] of each chunk's last tokens."""
        self.pool.copy_blocks(list(copies))
        batch = PagedBatch(chunks, num_logits, self.pool)
        return self.forward(batch)

    def forward(self, batch: PagedBatch) -> Tensor:
        if self.decoder is not None:
            return self.decoder(batch)[0]
        with self._paged_attention():
            return self._call_model(batch)

    def _call_model(self, batch: PagedBatch) -> Tensor:
        out = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            logits_to_keep=batch.logit_rows,
            use_cache=False,
            paged=batch,
        )
        return out.logits[0]

    @contextmanager
    def _paged_attention(self) -> Any:
        usual = self.config._attn_implementation
        self.config._attn_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            self.config._attn_implementation = usual
