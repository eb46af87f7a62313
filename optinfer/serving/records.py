"""What the engine writes down: a record per step, and totals."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(slots=True)
class ChunkRecord:
    """What one sequence computed in a step: `num_tokens` of its tokens from `start` on, then drafts."""

    request_id: str
    index: int
    kind: Literal["prefill", "decode"]
    start: int
    num_tokens: int
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0  # new tokens that came of it


@dataclass(slots=True)
class StepRecord:
    """One line of the engine's log. Times in seconds of the engine's clock; sequences are (request_id, index)."""

    step: int
    start: float
    seconds: float
    chunks: list[ChunkRecord]
    preempted: list[tuple[str, int]]
    finished: list[tuple[str, int]]
    waiting: int
    running: int
    used_blocks: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class EngineStats:
    """Totals since the engine was made."""

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    peak_used_blocks: int = 0
