"""What the rows of each suite hold: names say what was measured, all other fields are measures, what came out.

A name that does not apply to a row is None, and so is what was not measured. Files leave out both. A suite makes a row
when it knows what it will measure, and fills in what comes out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


def name() -> Any:
    """A field that tells rows apart."""
    return field(default=None, metadata={"name": True})


@dataclass(kw_only=True)
class Row:
    """One measurement. `peer`: whose code ran; `seconds`: the median; `skipped`: why it could not run."""

    peer: str | None = name()
    seconds: float | None = None
    skipped: str | None = None

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """A row from a flat dict, as files hold them.

        Raises:
            ValueError: a field that rows of this suite do not have.
        """
        given = {key.replace(" ", "_"): value for key, value in values.items()}  # old files: "system prompt"
        known = [f.name for f in fields(cls)]
        if unknown := given.keys() - known:
            raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(known)}")
        return cls(**given)

    @property
    def names(self) -> dict[str, Any]:
        """The names that apply."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("name")}
        return {key: value for key, value in own.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """What applies and was measured, names first; `seconds` always."""
        measured = {key: value for key, value in asdict(self).items() if value is not None}
        return self.names | {"seconds": None} | measured


@dataclass(kw_only=True)
class Sampled(Row):
    """`samples`: seconds of each run; `peak_bytes`: the most memory."""

    samples: list[float] | None = None
    peak_bytes: int | None = None


@dataclass(kw_only=True)
class AttentionRow(Sampled):
    """One problem; `what` is "memory" where only that was measured. Rates are of the machine's matrix product."""

    what: str | None = name()
    batch: int | None = name()
    heads: int | None = name()
    kv_heads: int | None = name()
    q_len: int | None = name()
    kv_len: int | None = name()
    head_dim: int | None = name()
    causal: bool | None = name()
    dtype: str | None = name()
    error: float | None = None
    error_ratio: float | None = None
    tflops: float | None = None
    of_matmul: float | None = None


@dataclass(kw_only=True)
class CalibratedQuantizationRow(Sampled):
    """One rung of lesson 2's ladder. `windows`: the loss of each window of text; `load`: of the machine at the start."""

    method: str | None = name()
    bits: int | None = name()
    group_size: int | None = name()
    version: str | None = None
    date: str | None = None
    load: float | None = None
    cpu_seconds: float | None = None
    peak_bytes_after_load: int | None = None
    perplexity: float | None = None
    stderr: float | None = None
    tokens: int | None = None
    windows: list[float] | None = None


@dataclass(kw_only=True)
class KVCacheRow(Row):
    """`kind` is operation, waste (shares of the pool) or sharing (`saved`: share of the blocks)."""

    kind: str | None = name()
    operation: str | None = name()
    num_blocks: int | None = name()
    samples: int | None = name()  # answers to one prompt
    system_prompt: int | None = name()  # tokens
    used: float | None = None
    reserved: float | None = None
    internal: float | None = None
    external: float | None = None
    wasted: float | None = None
    batch: float | None = None
    preemptions: int | None = None
    saved: float | None = None


@dataclass(kw_only=True)
class PagedAttentionRow(Row):
    """One query per sequence over `context` tokens."""

    batch: int | None = name()
    context: int | None = name()
    dtype: str | None = name()
    kv_bytes: int | None = None
    bytes_per_second: float | None = None
    over_contiguous: float | None = None


@dataclass(kw_only=True)
class QuantizationRow(Sampled):
    """`what` was done with a model of one `variant`."""

    variant: str | None = name()
    what: str | None = name()
    fastest: float | None = None
    peak_bytes_after_load: int | None = None


@dataclass(kw_only=True)
class QuantizedMatmulRow(Sampled):
    """One product, or a step of a whole `model` of random weights, or the copy that is the ceiling."""

    model: str | None = name()
    out_features: int | None = name()
    in_features: int | None = name()
    tokens: int | None = name()
    dtype: str | None = name()
    error: float | None = None
    read_bytes: int | None = None
    weight_bytes: int | None = None
    allocated_bytes: int | None = None
    bytes_per_second: float | None = None
    of_copy: float | None = None
    of_bandwidth: float | None = None
    over_bf16: float | None = None


@dataclass(kw_only=True)
class ServingRow(Sampled):
    """A trace served: `suite` is throughput, latency or ladder. Times to the first token and per token, in seconds."""

    suite: str | None = name()
    model: str | None = name()
    rung: str | None = name()
    requests: int | None = name()
    output_tokens: int | None = None
    spread: float | None = None
    tokens_per_second: float | None = None
    against_generate_batch: float | None = None
    ttft_p50: float | None = None
    ttft_p90: float | None = None
    ttft_p99: float | None = None
    tpot_p50: float | None = None
    tpot_p90: float | None = None
    tpot_p99: float | None = None
    steps: int | None = None
    computed_tokens: int | None = None
    accepted_tokens: int | None = None
    cached_tokens: int | None = None
    peak_used_blocks: int | None = None
    num_blocks: int | None = None
    preemptions: int | None = None


@dataclass(kw_only=True)
class SpeculativeRow(Sampled):
    """`what` is generate (a `mode` on prompts of a kind), verify (one pass over `tokens`) or trade-off (a known draft)."""

    what: str | None = name()
    model: str | None = name()
    prompts_of: str | None = name()
    prompts: int | None = name()
    mode: str | None = name()
    dtype: str | None = name()
    tokens: int | None = name()
    accuracy: float | None = name()
    gamma: int | None = name()
    seconds_per_token: float | None = None
    speedup: float | None = None
    slowest: float | None = None
    fastest: float | None = None
    equal: float | None = None
    tokens_per_pass: float | None = None
    alpha: float | None = None
    acceptance: list[float] | None = None


@dataclass(kw_only=True)
class TileRow(Row):
    """One tile of one kernel, its numbers in the kernel's order; `in_use`: launched today for `arch` or for so many tokens."""

    kernel: str | None = name()
    arch: int | None = name()
    head_dim: int | None = name()
    tokens: int | None = name()
    tile: tuple[int, ...] | None = name()
    in_use: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tile, list):  # as files hold it
            self.tile = tuple(self.tile)


ROWS: dict[str, type[Row]] = {
    "attention": AttentionRow,
    "calibrated_quantization": CalibratedQuantizationRow,
    "kv_cache": KVCacheRow,
    "paged_attention": PagedAttentionRow,
    "quantization": QuantizationRow,
    "quantized_matmul": QuantizedMatmulRow,
    "serving": ServingRow,
    "speculative": SpeculativeRow,
    "tiles": TileRow,
}


def read(suite: str, rows: list[dict[str, Any]]) -> list[Row]:
    """The rows of a suite, from a file's flat dicts.

    Raises:
        ValueError: there is no such suite; a field that its rows do not have.
    """
    if suite not in ROWS:
        raise ValueError(f"suite must be one of {', '.join(ROWS)}; not {suite!r}")
    return [ROWS[suite].read(row) for row in rows]
