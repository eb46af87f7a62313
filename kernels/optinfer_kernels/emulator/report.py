"""What a run did: a profiler's view without a GPU. Counts only; nothing here tells how long a GPU would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .counters import Traffic
from .ptx import Instruction

if TYPE_CHECKING:
    from .launch import Run

# The first class whose prefix fits.
CLASSES = {
    "tensor cores": ("mma", "wgmma.mma"),
    "global memory": ("ld.global", "st.global", "atom", "red.", "cp.async.c", "cp.async.bulk.tensor"),
    "shared memory": ("ld.shared", "st.shared", "ldmatrix", "stmatrix"),
    "special functions": ("ex2", "lg2", "rcp", "div.full", "sqrt", "rsqrt", "tanh"),
    "synchronization": ("bar", "mbarrier", "fence", "cp.async", "elect", "wgmma", "tensormap", "setmaxnreg"),
    "shuffles": ("shfl", "vote", "redux"),
    "conversion": ("cvt.",),
    "moves": ("mov", "selp", "ld.", "st."),  # parameters, and what a thread keeps in memory of its own
    "control": ("bra", "ret", "setp"),
}
FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64")


def instruction_class(i: Instruction) -> str:
    for name, prefixes in CLASSES.items():
        if i.op.startswith(prefixes):
            return name
    return "float" if i.parts[-1] in FLOATS else "integer and logic"


def executed(run: Run) -> Iterator[tuple[Instruction, int]]:
    """(instruction, how many warps executed it)"""
    for block, warps in run.machine.executed.items():
        for i in run.kernel.blocks[block]:
            yield i, warps


def instruction_counts(run: Run) -> Counter[str]:
    """PTX instructions of warps, by class."""
    counts: Counter[str] = Counter()
    for i, warps in executed(run):
        counts[instruction_class(i)] += warps
    return counts


@dataclass
class Totals:
    """bytes_loaded, bytes_stored: asked of global memory by instructions, as if there were no cache.
    distinct_read, distinct_written: the same in distinct sectors, as if the cache held everything.
    sectors, wavefronts: what global and shared requests took; least_*: what the same bytes side by side would have.
    """

    instructions: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    distinct_read: int = 0
    distinct_written: int = 0
    sectors: int = 0
    least_sectors: int = 0
    wavefronts: int = 0
    least_wavefronts: int = 0


def _stores(i: Instruction) -> bool:
    return i.parts[0] in ("st", "red", "atom") or "bulk_group" in i.parts


def totals(run: Run) -> Totals:
    found = Totals(instructions=instruction_counts(run).total())
    found.distinct_read, found.distinct_written = run.machine.memory.distinct_bytes()
    for (memory, i), traffic in run.machine.counters.rows.items():
        if memory == "shared":
            found.wavefronts += traffic.cost
            found.least_wavefronts += traffic.ideal
            continue
        found.sectors += traffic.cost
        found.least_sectors += traffic.ideal
        if _stores(i):
            found.bytes_stored += traffic.nbytes
        else:
            found.bytes_loaded += traffic.nbytes
    return found


def summary(run: Run, rows: int = 8) -> str:
    """Counts by class, traffic against the least possible, and the instructions that waste most of it."""
    t, counts = totals(run), instruction_counts(run)
    text = [
        f"{run.name} for sm_{run.arch}: grid {run.grid}, {run.kernel.threads} threads, {run.shared_bytes:,} bytes shared",
        f"  {t.instructions:,} warp instructions: " + ", ".join(f"{name} {n:,}" for name, n in counts.most_common()),
        f"  global memory: {t.bytes_loaded:,} bytes loaded, {t.bytes_stored:,} stored; "
        f"{t.sectors:,} sectors, at best {t.least_sectors:,}{_ratio(t.sectors, t.least_sectors)}",
        f"  distinct sectors: {t.distinct_read:,} bytes read, {t.distinct_written:,} written",
    ]
    if t.wavefronts:
        text.append(f"  shared memory: {t.wavefronts:,} wavefronts, at best {t.least_wavefronts:,}"
                    f"{_ratio(t.wavefronts, t.least_wavefronts)}")  # fmt: skip
    if run.machine.torn:
        text.append(f"  branches at which warps part: {run.machine.torn.total():,}")
    wasteful = [(memory, i, traffic) for (memory, i), traffic in run.machine.counters.rows.items() if wastes(traffic)]
    for memory, i, traffic in sorted(wasteful, key=lambda row: row[2].ideal - row[2].cost)[:rows]:
        unit = "sectors" if memory == "global" else "wavefronts"
        text.append(f"    {traffic.cost:,} {unit}, at best {traffic.ideal:,}: {i.where}")
    return "\n".join(text)


def wastes(traffic: Traffic) -> bool:
    return traffic.cost > 1.05 * traffic.ideal


def _ratio(cost: int, ideal: int) -> str:
    return f" ({cost / ideal:.2f} times)" if ideal else ""


@dataclass
class Line:
    """One line of the kernel's source."""

    place: str  # "flash_attention.py:64"
    classes: Counter[str] = field(default_factory=Counter)
    sectors: int = 0
    least_sectors: int = 0
    wavefronts: int = 0
    least_wavefronts: int = 0

    @property
    def instructions(self) -> int:
        return self.classes.total()


def lines(run: Run, file: str | None = None) -> list[Line]:
    """What each line cost. Instructions of helpers elsewhere count for the line of `file` that called them."""
    found: dict[str, Line] = {}

    def line_of(i: Instruction) -> Line:
        place = next((p for p in i.source if file and p.startswith(f"{file}:")), i.source[-1] if i.source else "?")
        return found.setdefault(place, Line(place))

    for i, warps in executed(run):
        line_of(i).classes[instruction_class(i)] += warps
    for (memory, i), traffic in run.machine.counters.rows.items():
        line, unit = line_of(i), "sectors" if memory == "global" else "wavefronts"
        setattr(line, unit, getattr(line, unit) + traffic.cost)
        setattr(line, f"least_{unit}", getattr(line, f"least_{unit}") + traffic.ideal)
    return sorted(found.values(), key=lambda line: -line.instructions)


def table(rows: list[Line]) -> str:
    text = [f"{'line':30} {'instructions':>12} {'sectors':>9} {'at best':>9} {'wavefronts':>10} {'at best':>9}  mostly"]
    for line in rows:
        mostly = ", ".join(name for name, _ in line.classes.most_common(2))
        text.append(f"{line.place:30} {line.instructions:12,} {line.sectors:9,} {line.least_sectors:9,} "
                    f"{line.wavefronts:10,} {line.least_wavefronts:9,}  {mostly}")  # fmt: skip
    return "\n".join(text)
