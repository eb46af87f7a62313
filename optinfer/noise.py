"""How far a measured time can be believed: repeats, whether they agree, and what to say of a busy machine.

What disturbs a measurement makes it longer, never shorter. So the fastest repeat is the figure, and it is believed where
the next ones come near it: then nothing stood in their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

AGREE = 0.05  # repeats that differ by less say the same
CEILING = 0.05  # by so much a ceiling that was itself measured may be beaten
PATIENCE = 3  # repeats may become so many times as many, waiting for a quiet moment
BUSY = "This machine is busy: run again."


@dataclass(frozen=True)
class Timing:
    """Repeats of one measurement, in seconds.

    Attributes:
        samples: one per repeat.
        least: no faster than this is possible, by ceilings measured before; 0: not known.
    """

    samples: tuple[float, ...]
    least: float = 0.0

    @property
    def seconds(self) -> float:
        """The fastest."""
        return min(self.samples)

    @property
    def spread(self) -> float:
        """How far the three fastest differ, as a share of the fastest."""
        fastest = sorted(self.samples)[:3]
        return fastest[-1] / fastest[0] - 1 if fastest[0] > 0 else 0.0

    @property
    def beats_its_ceiling(self) -> bool:
        """Then not the measurement is wrong but the ceiling: it was taken while the machine was busy."""
        return self.seconds < self.least * (1 - CEILING)

    @property
    def believable(self) -> bool:
        return self.spread <= AGREE and not self.beats_its_ceiling

    @property
    def doubt(self) -> str:
        """What the reader must know; empty where nothing is in doubt."""
        if self.beats_its_ceiling:
            return f"{self.least / self.seconds:.2f} times as fast as this machine's own ceiling. {BUSY}"
        return "" if self.believable else f"Repeats differ by {100 * self.spread:.0f} %. {BUSY}"

    def ratio(self, other: Timing) -> tuple[float, float]:
        """How many times as fast as the other this is, and how far that may be off: what lies within it is no order."""
        value = other.seconds / self.seconds
        return value, value * max(AGREE, self.spread + other.spread)


def repeat(sample: Callable[[], float], repeats: int = 5, warmup: int = 1, least: float = 0.0) -> Timing:
    """Call ``sample``, which returns seconds, until the fastest repeats agree, but no more than `PATIENCE` times `repeats`.

    Raises:
        ValueError: no repeats are asked for.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        sample()
    timing = Timing(tuple(sample() for _ in range(repeats)), least)
    while timing.spread > AGREE and len(timing.samples) < PATIENCE * repeats:
        timing = Timing((*timing.samples, sample()), least)
    return timing


def doubts(timings: Iterable[Timing]) -> str:
    """The worst doubt about several measurements; empty where there is none."""
    worst = max(timings, key=lambda t: (t.beats_its_ceiling, t.spread), default=None)
    return worst.doubt if worst is not None else ""
