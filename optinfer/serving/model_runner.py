"""Runs a transformers model on a packed batch. It knows pages and tensors, but no requests."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optinfer.packed import can_pack
from optinfer.serving.cuda_graphs import GraphedDecode
from optinfer.serving.fuse import fuse_projections
from optinfer.serving.lean_decoder import LeanDecoder
from optinfer.serving.paged_batch import IMPLEMENTATION, Chunk, KVPool, PagedBatch


class ModelRunner:
    """A decoder model, its pool of pages, and one forward pass per step.

    Args:
        model: a transformers decoder whose attention goes through the attention interface.
        num_blocks, block_size: the pool; block numbers come from the block manager.
        fuse: compute Llama-like families by `LeanDecoder`. In bf16 on a CPU it keeps a repacked copy of the weights;
            elsewhere q/k/v and gate/up projections are merged in place (see `fuse_projections`). False: the modules
            as they are.
        cuda_graphs: run decode steps from CUDA graphs, one per bucket of batch size and context (see `GraphedDecode`).
            None: on a GPU, for the families of `LeanDecoder`.
        compile: compile the lean decoder by torch.compile. Worth trying on a GPU; on a CPU it needs a C++ compiler and
            a minute per shape.
        max_graph_size: largest batch that is captured.

    A step is three parts so that the middle one can be captured in a CUDA graph: pack on the host, `forward` on the
    device, sample. Between steps the model is as its owner left it: `model.generate` keeps working.

    Attributes:
        keep_hidden: keep the final hidden states of each step, for drafters that read them.
        hidden: per chunk of the last step its final hidden states [tokens, hidden_size].
    """

    def __init__(
        self,
        model: Any,
        num_blocks: int,
        block_size: int,
        fuse: bool = True,
        cuda_graphs: bool | None = None,
        compile: bool = False,
        max_graph_size: int = 64,
    ):
        if not getattr(model, "_supports_attention_backend", False):
            raise ValueError(f"{type(model).__name__} does not route its attention through transformers' interface")
        self.model = model
        self.config = model.config.get_text_config()
        weight = model.get_input_embeddings().weight
        if fuse and not can_pack(weight):
            fuse_projections(model)
        self.decoder: Any = LeanDecoder.of(model) if fuse else None
        if compile and self.decoder is None:
            raise ValueError("compile=True needs a Llama-like model and fuse=True")
        if cuda_graphs and weight.device.type != "cuda":
            raise ValueError(f"cuda_graphs=True needs a model on a GPU; this one is on {weight.device}")
        if cuda_graphs is None:
            cuda_graphs = weight.device.type == "cuda" and self.decoder is not None
        if compile:
            self.decoder = torch.compile(self.decoder)
        scratch = 1 if cuda_graphs else 0
        self.pool = KVPool(self.config, num_blocks + scratch, block_size, weight.dtype, weight.device)
        if compile:
            self.pool.kernels = None  # torch.compile writes its own
        self.graphs = GraphedDecode(self.pool, self.forward, max_graph_size) if cuda_graphs else None
        self.keep_hidden = False
        self.hidden: list[Tensor] = []

    @torch.inference_mode()
    def run(self, chunks: list[Chunk], num_logits: list[int], copies: Sequence[tuple[int, int]] = ()) -> Tensor:
        """Compute the chunks; returns the logits [sum(num_logits), vocabulary] of each chunk's last tokens."""
        self.pool.copy_blocks(list(copies))
        if self.graphs is not None and not self.keep_hidden and self.graphs.takes(chunks, num_logits):
            return self.graphs.run(chunks)
        batch = PagedBatch(chunks, num_logits, self.pool)
        logits, hidden = self._compute(batch)
        if self.keep_hidden:
            self.hidden = [hidden[first:end] for first, end in batch.spans]
        return logits

    def forward(self, batch: PagedBatch) -> Tensor:
        """The part of a step that a CUDA graph captures: packed tensors to logits."""
        return self._compute(batch)[0]

    def _compute(self, batch: PagedBatch) -> tuple[Tensor, Any]:
        if self.decoder is not None:
            return self.decoder(batch)
        with self._paged_attention():
            out = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                logits_to_keep=batch.logit_rows,
                use_cache=False,
                output_hidden_states=self.keep_hidden,
                paged=batch,
            )
        return out.logits[0], out.hidden_states[-1][0] if self.keep_hidden else None

    @contextmanager
    def _paged_attention(self) -> Any:
        usual = self.config._attn_implementation
        self.config._attn_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            self.config._attn_implementation = usual
