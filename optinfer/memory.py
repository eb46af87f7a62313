"""Where the memory of inference goes: weights, KV cache and activations, from a model's shape alone.

Everything is in bytes and follows from counting; nothing is fitted. One gigabyte (GB) is 10⁹ bytes, as on a GPU's box.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from optinfer.kv_cache.layers import LayerCache, cache_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """What of a decoder decides about memory.

    Attributes:
        name: as people call it.
        hidden: width of the residual stream.
        intermediate: width that one token passes through inside the widest MLP; of experts, those it is sent to.
        vocabulary: number of tokens.
        linear_parameters: weights of the decoder's linear layers, all experts included: what quantization touches.
        other_parameters: embedding, output head, norms, biases and the like; they stay in 16 bits.
        active_parameters: what one token multiplies: all but the embedding table, of which it only looks up a row, and the
            experts that it is not sent to.
        cache: (number of layers, what each of them keeps), see `optinfer.kv_cache.layers`.
    """

    name: str
    hidden: int
    intermediate: int
    vocabulary: int
    linear_parameters: int
    other_parameters: int
    active_parameters: int
    cache: tuple[tuple[int, LayerCache], ...]

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def kv_bytes(self, length: int, bits: float = 16) -> float:
        """The cache of one sequence of `length` tokens. Recurrent states stay in float32, convolutions' inputs in 16 bits."""
        return sum(
            count * (layer.tokens(length) * layer.numbers_per_token * bits / 8 + layer.state * 2 + layer.state_fp32 * 4)
            for count, layer in self.cache
        )

    def kv_bytes_per_token(self, bits: float = 16) -> float:
        """What each token adds in all layers while it lies within their windows."""
        return sum(count * layer.numbers_per_token for count, layer in self.cache) * bits / 8

    @classmethod
    def llama(
        cls,
        name: str,
        layers: int,
        hidden: int,
        intermediate: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        vocabulary: int,
        tied: bool = False,
    ) -> "ModelShape":
        """A Llama-style decoder, counted by hand: gated MLP, grouped-query attention, RMSNorm.

        Args:
            heads, kv_heads: query heads, and key and value heads; fewer of these under grouped-query attention.
            tied: the output head shares the embedding's weights.
        """
        linear = layers * (hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * intermediate)
        norms, embedding = hidden * (2 * layers + 1), vocabulary * hidden
        other = norms + embedding * (1 if tied else 2)
        cache = ((layers, LayerCache("full", kv_heads, head_dim, head_dim)),)
        return cls(name, hidden, intermediate, vocabulary, linear, other, linear + norms + embedding, cache)

    @classmethod
    def of(cls, config: "PreTrainedConfig", name: str | None = None) -> "ModelShape":
        """The shape of a transformers configuration: its model is built without memory (on the meta device) and counted.

        Raises:
            ValueError: it is not the configuration of a decoder, or its layers keep something that is not known here.
        """
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        cache = tuple((count, layer) for layer, count in Counter(cache_layers(config)).items())
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(text)
        except Exception as error:  # whatever a configuration that is none provokes
            raise ValueError(f"config is not that of a decoder: {error}") from error
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        linears = (m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head)
        matrices = {id(m.weight) for m in linears}
        share = _share_of_experts(text)
        linear = other = 0
        active = embedding.numel() if head is not None and head.weight is embedding else 0.0
        for path, parameter in model.named_parameters():
            expert = ".experts." in path
            if id(parameter) in matrices or (expert and parameter.dim() == 3):
                linear += parameter.numel()
            else:
                other += parameter.numel()
            if id(parameter) not in tables:
                active += parameter.numel() * (share if expert else 1)
        shape = (
            name or getattr(text, "_name_or_path", "") or text.model_type,
            text.hidden_size,
            _mlp_width(model, share),
        )
        return cls(*shape, text.vocab_size, linear, other, round(active), cache)


def _share_of_experts(config: Any) -> float:
    """Of a layer's experts, the share that one token is sent to; 1 for a model without experts."""
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen else 1.0


def _mlp_width(model: Any, share: float) -> int:
    """The most columns of the last matrices of MLPs ("down") that one token meets in a layer."""
    widths: Counter[str] = Counter()
    for path, parameter in model.named_parameters():
        parts = path.split(".")
        if "layers" in parts and parts[-1 - path.endswith(".weight")] in (
            "down_proj",
            "fc2",
            "c_proj",
            "dense_4h_to_h",
        ):
            layer = parts[parts.index("layers") + 1]
            columns = parameter.numel() // model.config.get_text_config().hidden_size
            widths[layer] += round(columns * share) if ".experts." in path else columns
    if not widths:
        raise ValueError(f"config: {type(model).__name__} has no MLP that is known here")
    return max(widths.values())


def _keys_and_values(kind: str, heads: int, head_dim: int, window: int | None = None) -> LayerCache:
    return LayerCache(kind, heads, head_dim, head_dim, window)


# From the models' published configurations. What is not a Llama was counted by `ModelShape.of`; a test counts again.
# fmt: off
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape.llama("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49_152, tied=True),
        ModelShape.llama("Mistral-7B", 32, 4096, 14_336, 32, 8, 128, 32_000),
        ModelShape.llama("Llama-3-8B", 32, 4096, 14_336, 32, 8, 128, 128_256),
        ModelShape.llama("Llama-2-13B", 40, 5120, 13_824, 40, 40, 128, 32_000),
        ModelShape.llama("Llama-2-70B", 80, 8192, 28_672, 64, 8, 128, 32_000),
        ModelShape.llama("Llama-3-70B", 80, 8192, 28_672, 64, 8, 128, 128_256),
        ModelShape("Gemma-3-27B", 5376, 21_504, 262_208, 25_598_361_600, 1_410_984_704, 27_009_346_304,
                   ((52, _keys_and_values("sliding", 16, 128, 1024)), (10, _keys_and_values("full", 16, 128)))),
        ModelShape("GPT-OSS-20B", 2880, 11_520, 201_088, 19_747_307_520, 1_167_449_664, 3_608_307_264,
                   ((12, _keys_and_values("sliding", 8, 64, 128)), (12, _keys_and_values("full", 8, 64)))),
        ModelShape("GPT-OSS-120B", 2880, 11_520, 201_088, 115_617_300_480, 1_211_856_192, 5_132_849_472,
                   ((18, _keys_and_values("sliding", 8, 64, 128)), (18, _keys_and_values("full", 8, 64)))),
        ModelShape("Llama-4-Scout", 5120, 16_384, 202_048, 105_700_392_960, 2_069_468_160, 16_138_408_960,
                   ((36, _keys_and_values("chunked", 8, 128, 8192)), (12, _keys_and_values("full", 8, 128)))),
        ModelShape("Kimi-Linear-48B", 2304, 9216, 163_840, 48_351_166_464, 771_508_608, 3_106_965_888,
                   ((20, LayerCache("linear", state=49_152, state_fp32=524_288)), (7, LayerCache("latent", 1, 512, 64)))),
        ModelShape("Qwen3-Next-80B", 2048, 5632, 151_936, 79_000_338_432, 674_052_864, 3_563_764_480,
                   ((36, LayerCache("linear", state=32_768, state_fp32=524_288)), (12, _keys_and_values("full", 2, 256)))),
        ModelShape("DeepSeek-V3", 7168, 18_432, 129_280, 669_065_609_216, 1_960_795_136, 36_625_603_584,
                   ((61, LayerCache("latent", 1, 512, 64)),)),
    )
}
# fmt: on

# Memory as sold, in GB.
Gpu = Literal["T4", "L4 or RTX 4090", "A100 or H100", "H200"]
GPUS: dict[Gpu, int] = {"T4": 16, "L4 or RTX 4090": 24, "A100 or H100": 80, "H200": 141}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a deployment needs at its fullest moment."""

    weights: float
    kv_cache: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache + self.activations

    def fits(self, gpu: Gpu, count: int = 1) -> bool:
        """Whether it fits ``count`` GPUs of this kind. Raises ValueError for one that is not in `GPUS`."""
        if gpu not in GPUS:
            raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
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
    kv_cache = shape.kv_bytes(context, kv_bits) * requests
    tokens = min(prefill_chunk, context * requests)
    # The widest moment of a layer: residual stream, its norm, and gate, up and their product, in 16 bits;
    # and one row of logits per request, in 32.
    activations = tokens * (2 * shape.hidden + 3 * shape.intermediate) * 2 + requests * shape.vocabulary * 4
    return MemoryPlan(weights, kv_cache, activations)


def presets() -> list[dict[str, Any]]:
    """The known shapes as the calculator's JavaScript reads them; each group of layers' numbers are those of all its layers."""
    return [
        {
            "name": shape.name,
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "vocabulary": shape.vocabulary,
            "linear": shape.linear_parameters,
            "other": shape.other_parameters,
            "active": shape.active_parameters,
            "cache": [
                {
                    "kind": layer.kind,
                    "layers": count,
                    "per_token": count * layer.numbers_per_token,
                    "window": layer.window,
                    "state_bytes": count * (layer.state * 2 + layer.state_fp32 * 4),
                }
                for count, layer in shape.cache
            ],
        }
        for shape in MODELS.values()
    ]
