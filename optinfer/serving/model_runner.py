"""Runs a transformers model on a packed batch. It knows pages and tensors, but no requests."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.attention.needs import (
    ModelNeeds,
    UnsupportedModel,
    attention_configs,
    disagreement,
    examine,
    in_eval_mode,
)
from optinfer.kv_cache.attention import BACKENDS, Backend
from optinfer.kv_cache.pool import KVPool
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.schemes import Scheme, SchemeName, resolve_scheme
from optinfer.serving.compiled_decoder import CompiledDecoder
from optinfer.serving.cuda_graphs import GraphedDecode
from optinfer.serving.lean_decoder import LeanDecoder, is_lean
from optinfer.serving.paged_batch import Chunk, PagedBatch, attending
from optinfer.serving.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelRunner:
    """A decoder model, its pool of pages, and one forward pass per step.

    Args:
        model: a transformers decoder whose attention goes through the attention interface.
        num_blocks, block_size: the pool; block numbers come from the block manager.
        fuse: compute Llama-like families without their modules: on a CPU by `CompiledDecoder`, elsewhere by `LeanDecoder`,
            for which q/k/v and gate/up weights move next to each other (see `fuse`). False: the modules as they are.
        head: a quantization scheme such as "int8" for the layer that makes logits (a copy is quantized: the model's own, often
            shared with its embeddings, stays). For a small model it is a quarter of what a token reads. None: as it is.
        attention_backend: of `paged_attention`: "triton", "loops", "sdpa", "reference", or "auto".
        kv_dtype: of the pages, e.g. torch.int8; None: the model's.
        cuda_graphs: run decode steps from CUDA graphs, one per batch size (see `GraphedDecode`). None: on a GPU, for the
            families of `LeanDecoder`, unless in llm_int8 (how many features stay in 16 bits is known step by step only) or
            with attention "sdpa" or "reference" (they ask the GPU how long each text is).
        compile: compile the lean decoder by torch.compile. Worth trying on a GPU; on a CPU it needs a C++ compiler and
            a minute per shape.
        max_graph_size: largest batch that is captured.
        max_length: longest sequence.
        needs: what `examine` found of the model; None: it is examined.

    Raises ValueError for arguments that do not go together, UnsupportedModel for what the model needs and we do not do.

    A step is three parts so that the middle one can be captured in a CUDA graph: pack on the host, `forward` on the
    device, sample. Between steps the model is as its owner left it: `model.generate` keeps working, training too.

    Attributes:
        keep_hidden: keep the final hidden states of each step, for drafters that read them.
        hidden: per chunk of the last step its final hidden states [tokens, hidden_size].
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        num_blocks: int,
        block_size: int,
        fuse: bool = True,
        head: SchemeName | None = None,
        attention_backend: Backend = "auto",
        kv_dtype: torch.dtype | None = None,
        cuda_graphs: bool | None = None,
        compile: bool = False,
        max_graph_size: int = 64,
        max_length: int = 2**20,
        needs: ModelNeeds | None = None,
    ):
        if attention_backend not in BACKENDS:
            raise ValueError(f"attention_backend must be one of {', '.join(BACKENDS)}, got {attention_backend!r}")
        self.model: Any = model  # torch takes a module's attributes for tensors
        self.backend, self.max_length = attention_backend, max_length
        self._fuse, self._compile = fuse, compile
        self._head = None if head is None else resolve_scheme(head)
        self._num_blocks, self._block_size, self._kv_dtype = num_blocks, block_size, kv_dtype
        self._cuda_graphs, self._max_graph_size = cuda_graphs, max_graph_size
        self._keep_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.keep_hidden = False
        self.hidden: list[Tensor] = []
        self._set_up(needs or examine(model, max_length))

    def _set_up(self, needs: ModelNeeds) -> None:
        """Make pages and decoder for the model as it is now, and try them."""
        self.needs = needs
        self.windows = [layer.window for layer in needs.layers]
        self._configs = attention_configs(self.model)
        weight = self.model.get_input_embeddings().weight
        self._lean = self._fuse and is_lean(self.model)
        for name, wanted in (("compile", self._compile), ("head", self._head is not None)):
            if wanted and not self._lean:
                raise ValueError(f"{name} needs a Llama-like model and fuse=True")
        if self._cuda_graphs and weight.device.type != "cuda":
            raise ValueError(f"cuda_graphs=True needs a model on a GPU; this one is on {weight.device}")
        steady = self.backend in ("auto", "triton")  # the others ask the GPU how long each text is
        if self._cuda_graphs and not steady:
            raise ValueError(
                f"cuda_graphs=True needs attention_backend 'auto' or 'triton': {self.backend!r} waits for the GPU in each layer"
            )
        looks = has_outliers(self.model) or (self._head is not None and self._head.format.LOOKS_AT_INPUTS)
        capturable = weight.device.type == "cuda" and self._lean and steady and not looks
        with_graphs = capturable if self._cuda_graphs is None else self._cuda_graphs
        scratch = 1 if with_graphs else 0
        dtype = self._kv_dtype or weight.dtype
        self.pool = KVPool(*needs.kv_shape, self._num_blocks + scratch, self._block_size, dtype, weight.device)
        self._dtype = weight.dtype
        self.graphs: GraphedDecode | None = None
        self.decoder = self._choose_decoder(None)  # with the model's own head, so that it can be held against the model
        self._probe()
        if self._head is not None:
            self.decoder = self._choose_decoder(self._head)
        self._capture_and_watch(with_graphs)

    # ------------------------------------------------------------ the model is its owner's

    def is_current(self) -> bool:
        """Whether model and weights are what this runner was made for. Ask before a step."""
        return self._watch.same_weights() and self._watch.same_modules()

    def renew(self) -> None:
        """The model has changed: take it as it is now. The pages keep nothing that is worth anything.

        Raises UnsupportedModel or ValueError, as when the runner was made; then the old state stays, and is not current.
        """
        weight = self.model.get_input_embeddings().weight
        if self._watch.same_modules() and (weight.dtype, weight.device) == (self._dtype, self.pool.device):
            self.decoder = self._choose_decoder(self._head)
            self._capture_and_watch(self.graphs is not None)
        else:
            self._set_up(examine(self.model, self.max_length))

    def _capture_and_watch(self, with_graphs: bool) -> None:
        """Graphs of the decoder as it is now, and a watch over what it was made for."""
        if with_graphs:
            self.graphs = GraphedDecode(self.pool, self.forward, self.max_length, self._max_graph_size, self.backend)
        self._watch = Watch(self.model)

    def _probe(self) -> None:
        """A prompt in two chunks, beside another one, must get the logits that the model gives it in one piece.

        What a table of families cannot know shows here: state that is kept elsewhere than in keys and values, positions
        that are counted by somebody else, neighbours that are looked at.
        """
        size, blocks = self.pool.block_size, self._num_blocks
        tokens = self.needs.tokens[0].tolist()[: max(1, blocks // 2) * size]
        first = max(1, len(tokens) // 3)
        table = list(range(blocks))
        own, other = table[: -(-len(tokens) // size)], table[-(-len(tokens) // size) :][:1]
        parts = [(tokens[:first], 0), (tokens[first:], first)] if len(tokens) > 1 else [(tokens, 0)]
        logits = []
        for part, start in parts:
            chunks = [Chunk(part, start, own)]
            if other:
                chunks.insert(0, Chunk(tokens[-1:], 0, other))
            rows = self.run(chunks, [len(chunk.token_ids) for chunk in chunks])
            logits.append(rows[len(chunks) - 1 :])
        if difference := disagreement(torch.cat(logits), self.needs.logits[: len(tokens)], self._tolerated_dtype()):
            raise UnsupportedModel(
                f"{type(self.model).__name__} in two chunks over pages gives {difference}: it keeps something between tokens "
                "that is not in keys and values, or its positions or masks are not those of plain causal attention"
            )

    def _tolerated_dtype(self) -> torch.dtype:
        """How exact the logits can be: 8-bit pages are about as far off as bfloat16."""
        return self.model.dtype if self.pool.dtype == self.model.dtype else torch.bfloat16

    def _choose_decoder(self, scheme: Scheme | None) -> Any:
        """What computes a batch instead of the model's modules, with a head of this scheme; None: nothing."""
        if not self._lean:
            return None
        head = self.model.lm_head
        if scheme is not None:
            head = QuantizedLinear.from_linear(head, scheme)
        length = self.max_length if self.pool.device.type == "cuda" else 1024
        if self._compile:
            return torch.compile(LeanDecoder(self.model, head, length))
        compiled = CompiledDecoder.of(self.model, self.pool, head) if self.backend in ("auto", "loops") else None
        return compiled or LeanDecoder(self.model, head, length)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk], num_logits: list[int], copies: Sequence[tuple[int, int]] = ()) -> Tensor:
        """Compute the chunks; returns the logits [sum(num_logits), vocabulary] of each chunk's last tokens.

        Of a model that changed, the old weights may be used: ask `is_current` before.
        """
        self.pool.copy_blocks(copies)
        if self.graphs is not None and not self.keep_hidden and self.graphs.takes(chunks, num_logits):
            return self.graphs.run(chunks)
        batch = PagedBatch(chunks, num_logits, self.pool, self.backend, windows=self.windows)
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
        keep = {"logits_to_keep": batch.logit_rows} if self._keep_logits else {}
        with attending(batch, self._configs), in_eval_mode(self.model):
            out = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                output_hidden_states=self.keep_hidden,
                **keep,
            )
        logits = out.logits[0] if self._keep_logits else out.logits[0, batch.logit_rows]
        return logits, out.hidden_states[-1][0] if self.keep_hidden else None


def has_outliers(model: "PreTrainedModel") -> bool:
    """Whether a layer looks at its input for features to keep in 16 bits (llm_int8), as no CUDA graph can."""
    layers = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return any(layer.scheme.format.LOOKS_AT_INPUTS for layer in layers)
