"""The two pictures every lesson stands on: how a token is made, and where its bytes lie."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optinfer import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optinfer.hardware import Machine

__all__ = ["H100", "cache_sizes", "memory_hierarchy", "one_token"]

# NVIDIA's H100 SXM data sheet and "Hopper Architecture In-Depth": 132 processors at 1.755 GHz; 256 KB of registers and
# 256 KB of SRAM each, of which 128 bytes a cycle are read; 50 MB of L2; 80 GB of HBM3 at 3.35 TB/s.
H100 = [
    ("registers", 132 * 256e3, None),
    ("SRAM", 132 * 256e3, 132 * 128 * 1.755e9),
    ("L2 cache", 50e6, None),
    ("HBM", 80e9, 3.35e12),
]


def one_token(layers: int, hidden: int, vocabulary: int) -> Figure:
    """Text in, one token out: the path through a decoder of so many layers, in prefill and in decode."""
    fig, ax = plots.figure(width=8.6, height=3.9)
    ax.set(xlim=(0, 100), ylim=(0, 46), title="From a text to its next token")
    ax.axis("off")
    steps = [
        (0.5, 13, "text", '"The sky is"', "gray"),
        (16, 13, "tokens", "one number for\neach piece of text", "gray"),
        (31.5, 13, "embedding", f"{hidden} numbers\nfor each token", "blue"),
        (47, 22, f"{layers} layers", "", "green"),
        (71, 13.5, "logits", f"a score for each of\n{vocabulary:,} tokens", "blue"),
        (86.5, 13, "next token", '" blue"', "orange"),
    ]
    for left, width, title, text, color in steps:
        ax.add_patch(_box(left, 13, width, 24, color))
        ax.text(left + width / 2, 33, title, ha="center", va="center", weight="bold", fontsize=9)
        ax.text(left + width / 2, 24, text, ha="center", va="center", fontsize=8)
    for y, title, text in (
        (23.5, "attention", "Q asks, K answers, V tells:\nlook at all earlier tokens"),
        (14, "MLP", "work on each token alone"),
    ):
        ax.add_patch(_box(48, y, 20, 7.5, "purple"))
        ax.text(58, y + 5.6, title, ha="center", va="center", weight="bold", fontsize=8)
        ax.text(58, y + 2.4, text, ha="center", va="center", fontsize=7)
    for (left, width, *_), (right, *_) in itertools.pairwise(steps):
        ax.annotate("", (right, 25), (left + width, 25), arrowprops={"arrowstyle": "->"})
    ax.plot([93, 93, 22.5], [12.5, 6, 6], color=plots.COLORS["black"], linewidth=1)
    ax.annotate("", (22.5, 12.7), (22.5, 5.9), arrowprops={"arrowstyle": "->"})
    again = "decode: the new token goes in, one more comes out; K and V of earlier tokens come from the KV cache"
    ax.text(58, 2.5, again, ha="center", fontsize=8)
    ax.text(22.5, 42, "prefill: all tokens of the prompt go through at once", ha="center", fontsize=8)
    ax.annotate("", (22.5, 37.5), (22.5, 41), arrowprops={"arrowstyle": "->"})
    return fig


def _box(left: float, bottom: float, width: float, height: float, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), width, height, facecolor=plots.COLORS[color] + "22", edgecolor=plots.COLORS[color])


def cache_sizes() -> list[tuple[str, float]]:
    """This processor's data caches, the nearest first: name and bytes. Empty where the system does not tell."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        units = {"K": 2**10, "M": 2**20}
        if kind != "Instruction" and size[-1:] in units:
            found[f"L{level} cache"] = float(size[:-1]) * units[size[-1]]
    return sorted(found.items())


def memory_hierarchy(machine: Machine) -> Figure:
    """Where numbers can lie, on an H100 by its data sheet and on this machine: the smaller, the faster."""
    here = [*((name, size, None) for name, size in cache_sizes()), ("memory", None, machine.bandwidth)]
    fig, axes = plots.figure(width=8.6, height=3.2, ncols=2)
    for ax, title, levels in ((axes[0], "H100 (data sheet)", H100), (axes[1], f"here: {machine.name}", here)):
        ax.set(xlim=(-1, 1), ylim=(-len(levels), 0.05), title=title)
        ax.axis("off")
        for row, (name, size, speed) in enumerate(levels):
            half = 0.3 + 0.65 * (row + 1) / len(levels)
            ax.add_patch(
                _box(-half, -row - 0.9, 2 * half, 0.8, ("orange", "purple", "green", "blue")[-len(levels) :][row])
            )
            facts = [_bytes(size) if size else "", f"{_bytes(speed)}/s" if speed else ""]
            ax.text(
                0,
                -row - 0.5,
                f"{name}: {', '.join(filter(None, facts))}".rstrip(": "),
                ha="center",
                va="center",
                fontsize=8,
            )
    fig.suptitle("near the arithmetic: small and fast; far from it: large and slow", fontsize=9, y=1.06)
    return fig


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
