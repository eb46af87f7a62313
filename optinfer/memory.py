"""Where the memory of inference goes: weights, KV cache and activations, from a model's shape alone.

Everything is in bytes and follows from counting; nothing is fitted. One gigabyte (GB) is 10⁹ bytes, as on a GPU's box.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A Llama-style decoder: gated MLP, grouped-query attention, RMSNorm.

    Attributes:
        name: as people call it.
        layers: number of decoder layers.
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        heads: query heads.
        kv_heads: key and value heads; fewer than ``heads`` under grouped-query attention.
        head_dim: width of one head.
        vocabulary: number of tokens.
        tied: the output head shares the embedding's weights.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    @property
    def linear_parameters(self) -> int:
        """Weights of the decoder's linear layers, the ones that quantization touches."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

    @property
    def other_parameters(self) -> int:
        """Embedding, output head and norms; they stay in 16 bits."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden * (2 * self.layers + 1)

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def parameters_read_per_token(self) -> int:
        """What one decoding step multiplies: all but the embedding table, of which it only looks up a row."""
        return self.linear_parameters + self.vocabulary * self.hidden

    def kv_bytes_per_token(self, bits: float = 16) -> float:
        """Key and value of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bits / 8

    @classmethod
    def of(cls, config: Any, name: str | None = None) -> "ModelShape":
        """The shape of a transformers configuration.

        Raises:
            ValueError: it lacks a field that a Llama-style decoder has.
        """
        try:
            heads = config.num_attention_heads
            return cls(
                name=name or getattr(config, "_name_or_path", "") or config.model_type,
                layers=config.num_hidden_layers,
                hidden=config.hidden_size,
                intermediate=config.intermediate_size,
                heads=heads,
                kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
                vocabulary=config.vocab_size,
                tied=bool(config.tie_word_embeddings),
            )
        except AttributeError as error:
            raise ValueError(f"config is not that of a Llama-style decoder: {error}") from error


# From the models' published configurations.
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49_152, tied=True),
        ModelShape("Mistral-7B", 32, 4096, 14_336, 32, 8, 128, 32_000),
        ModelShape("Llama-3-8B", 32, 4096, 14_336, 32, 8, 128, 128_256),
        ModelShape("Llama-2-13B", 40, 5120, 13_824, 40, 40, 128, 32_000),
        ModelShape("Llama-2-70B", 80, 8192, 28_672, 64, 8, 128, 32_000),
        ModelShape("Llama-3-70B", 80, 8192, 28_672, 64, 8, 128, 128_256),
    )
}

# Memory as sold, in GB.
GPUS = {"T4": 16, "L4 or RTX 4090": 24, "A100 or H100": 80, "H200": 141}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a deployment needs at its fullest moment."""

    weights: float
    kv_cache: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache + self.activations

    def fits(self, gpu: str, count: int = 1) -> bool:
        """Whether it fits ``count`` GPUs of this kind; a key of `GPUS`."""
        return self.total <= GPUS[gpu] * 1e9 * count


def plan(
    shape: ModelShape,
    weight_bits: float = 16,
    kv_bits: float = 16,
    context: int = 4096,
    requests: int = 1,
    prefill_chunk: int = 2048,
) -> MemoryPlan:
    """The memory of serving ``requests`` of ``context`` tokens each.

    Args:
        shape: the model.
        weight_bits: bits per weight of the linear layers, scales included (4.5 for NF4 in blocks of 64).
        kv_bits: bits per number in the KV cache.
        context: tokens per request, prompt and answer together.
        requests: how many are served at the same time.
        prefill_chunk: most tokens in one forward pass; their activations are alive at once.

    Raises:
        ValueError: an argument is not positive.
    """
    for name, value in (
        ("weight_bits", weight_bits),
        ("kv_bits", kv_bits),
        ("context", context),
        ("requests", requests),
        ("prefill_chunk", prefill_chunk),
    ):
        if value <= 0:
            raise ValueError(f"{name} must be positive, not {value!r}")
    weights = shape.linear_parameters * weight_bits / 8 + shape.other_parameters * 2
    kv_cache = shape.kv_bytes_per_token(kv_bits) * context * requests
    tokens = min(prefill_chunk, context * requests)
    # The widest moment of a layer: residual stream, its norm, and gate, up and their product, in 16 bits;
    # and one row of logits per request, in 32.
    activations = tokens * (2 * shape.hidden + 3 * shape.intermediate) * 2 + requests * shape.vocabulary * 4
    return MemoryPlan(weights, kv_cache, activations)


def presets() -> list[dict[str, Any]]:
    """The known shapes with their derived counts, as the calculator's JavaScript reads them."""
    return [
        asdict(shape) | {"linear": shape.linear_parameters, "other": shape.other_parameters}
        for shape in MODELS.values()
    ]
