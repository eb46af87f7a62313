"""What happened while decoding: acceptance by position, tokens per pass, and where the time went."""

from dataclasses import dataclass, field
from typing import Any

from transformers.utils import ModelOutput


@dataclass
class Round:
    """One pass of the target: who drafted what, how much of it was accepted, and what was emitted."""

    drafter: str  # "" where nothing was drafted
    drafted: list[int]
    accepted: int
    emitted: list[int]


@dataclass
class Statistics:
    """Of one text. ``seconds`` holds ``prefill`` (the first pass), ``draft``, ``verify`` and ``overhead``."""

    rounds: list[Round] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"prefill": 0.0, "draft": 0.0, "verify": 0.0, "overhead": 0.0}
    )

    @property
    def passes(self) -> int:
        """Passes of the target, the prompt's included."""
        return len(self.rounds)

    @property
    def tokens(self) -> int:
        return sum(len(r.emitted) for r in self.rounds)

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(1, self.passes)

    def acceptance(self, drafter: str | None = None) -> list[float]:
        """For each position in the draft: the share accepted, of those where all before it were."""
        rounds = [r for r in self.rounds if r.drafted and drafter in (None, r.drafter)]
        longest = max((len(r.drafted) for r in rounds), default=0)
        shares = []
        for k in range(longest):
            reached = [r for r in rounds if r.accepted >= k and len(r.drafted) > k]
            shares.append(sum(r.accepted > k for r in reached) / len(reached) if reached else 0.0)
        return shares

    @property
    def alpha(self) -> float:
        """Accepted over judged tokens: the theory's one number for a draft."""
        accepted = sum(r.accepted for r in self.rounds)
        judged = sum(min(r.accepted + 1, len(r.drafted)) for r in self.rounds)
        return accepted / judged if judged else 0.0

    def __str__(self) -> str:
        times = ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items())
        speed = f"{self.tokens} tokens in {self.passes} passes ({self.tokens_per_pass:.2f} per pass)"
        return f"{speed}, alpha {self.alpha:.2f}; {times}"


@dataclass
class SpeculativeOutput(ModelOutput):
    """What `generate` returns with ``return_dict_in_generate=True``: ``sequences`` and ``statistics``."""

    sequences: Any = None
    statistics: Any = None
