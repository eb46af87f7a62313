"""The figures of notebooks 01 and 02."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optinfer import plots
from optinfer.quantization.number_formats import CODEBOOKS, FORMATS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "activation_outliers",
    "compensation",
    "instructions_per_weight",
    "ladder",
    "number_lines",
    "rounding",
    "scheme_quality",
    "weight_levels",
]


def number_lines(names: tuple[str, ...] = ("FP8 E4M3", "FP8 E5M2", "INT8", "INT4", "NF4", "FP4")) -> Figure:
    """All values of each format between -1 and 1, the largest scaled to 1."""
    fig, ax = plots.figure(height=0.5 + 0.5 * len(names))
    for row, name in enumerate(names):
        values = FORMATS[name].values() / FORMATS[name].max
        ax.vlines(values, row - 0.3, row + 0.3, color=plots.CYCLE[row % len(plots.CYCLE)], lw=1)
    ax.set_yticks(range(len(names)), [f"{n} · {len(FORMATS[n].values())} values" for n in names])
    ax.set(xlabel="value / largest value", xlim=(-1.17, 1.02))  # integers reach one step further below
    ax.invert_yaxis()
    ax.grid(False)
    return fig


def rounding(weight: Tensor, restored: dict[str, Tensor]) -> Figure:
    """Weights against what is restored of them, one panel a scheme, ``[n]`` each."""
    fig, axes = plots.figure(height=2.9, ncols=len(restored), sharey=True)
    for ax, (name, values) in zip(np.atleast_1d(axes), restored.items()):
        ax.plot(weight, weight, color=plots.COLORS["gray"], lw=0.8)
        ax.plot(weight, values, ".", ms=3)
        ax.set(title=name, xlabel="weight")
    np.atleast_1d(axes)[0].set_ylabel("restored")
    return fig


def activation_outliers(x: Tensor, threshold: float = 6.0) -> Figure:
    """Largest magnitude of each channel of activations ``[tokens, channels]``."""
    fig, ax = plots.figure(height=2.8)
    peak = x.abs().amax(0).float().cpu().numpy()
    color = np.where(peak >= threshold, plots.COLORS["red"], plots.COLORS["blue"])
    ax.scatter(range(len(peak)), peak, s=7, c=color)
    ax.axhline(threshold, color=plots.COLORS["gray"], ls="--", lw=1)
    ax.annotate(
        "threshold of LLM.int8()",
        (len(peak) * 0.99, threshold),
        ha="right",
        va="bottom",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
    )
    ax.set(xlabel="channel", ylabel="largest |activation|", yscale="log")
    return fig


def weight_levels(scaled: Tensor, schemes: tuple[str, ...] = ("NF4", "INT4")) -> Figure:
    """Histogram of weights divided by their group's absmax, and where each format has its values."""
    fig, axes = plots.figure(height=3.6, nrows=len(schemes), sharex=True)
    for ax, name in zip(axes, schemes):
        ax.hist(scaled.numpy(), bins=121, range=(-1, 1), density=True, color=plots.COLORS["sky"], alpha=0.6)
        levels = np.array(CODEBOOKS[name.lower()]) if name.lower() in CODEBOOKS else np.arange(-7, 8) / 7
        ax.vlines(levels, 0, 2, color=plots.COLORS["red"], lw=1.4)
        ax.set(title=f"{name}, {len(levels)} levels", ylabel="density of weights", ylim=(0, 2.6))
        ax.grid(False)
    axes[-1].set_xlabel("weight / absmax of its group of 64")
    return fig


def scheme_quality(rows: list[dict[str, Any]]) -> Figure:
    """KL divergence against megabytes, one point a scheme, with standard errors."""
    fig, ax = plots.figure(height=3.6)
    for row, color in zip(rows, plots.CYCLE * 2):
        ax.errorbar(row["megabytes"], row["kl"], yerr=row["kl_stderr"], fmt="o", color=color, capsize=3)
        left = len(row["scheme"]) > 8  # long names go where there is room
        ax.annotate(
            row["scheme"],
            (row["megabytes"], row["kl"]),
            xytext=(-7 if left else 7, -4 if left else 4),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=9,
        )
    ax.set(xlabel="whole model (MB)", ylabel="KL divergence from bf16 (nats per token)", yscale="log")
    ax.margins(x=0.3, y=0.12)
    return fig


def compensation(hessian: Tensor, error: float = 0.6) -> Figure:
    """The output error of two weights as a valley, and where the second weight goes when the first is rounded.

    Args:
        hessian: ``[2, 2]``, of two inputs.
        error: what rounding did to the first weight.
    """
    h = hessian.double()
    fig, ax = plots.figure(width=6.0, height=3.6)
    axis = np.linspace(-1, 1, 101)
    first, second = np.meshgrid(axis, axis)
    output = h[0, 0].item() * first**2 + 2 * h[0, 1].item() * first * second + h[1, 1].item() * second**2
    ax.contour(first, second, output, levels=8, colors=plots.COLORS["gray"], linewidths=0.7)
    best = -(h[0, 1] / h[1, 1]).item() * error
    ax.axvline(error, color=plots.COLORS["gray"], ls="--", lw=1)
    for y, label, color in (
        (0.0, "nearest: leave the second alone", "red"),
        (best, "GPTQ: move it to the valley's floor", "blue"),
    ):
        ax.plot(error, y, "o", color=plots.COLORS[color], label=label)
    ax.annotate("", (error, best), (error, 0), arrowprops={"arrowstyle": "->", "color": plots.COLORS["blue"]})
    ax.plot(0, 0, "k+")
    ax.set(
        xlabel="error of the first weight (rounded: given)",
        ylabel="error of the second\n(free)",
        title="lines of equal output error",
    )
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, -0.55), fontsize=8)
    return fig


def instructions_per_weight(counts: dict[str, float], budgets: dict[str, float]) -> Figure:
    """Instructions that each kernel spends on a weight, and what a GPU can spend while its memory brings one.

    Args:
        counts: kernel -> instructions per weight.
        budgets: label -> instructions per weight that fit the time of loading it; drawn as lines.
    """
    fig, ax = plots.figure(height=1.3 + 0.42 * len(counts))
    plots.bars(ax, list(counts), list(counts.values()), "", axis="instructions per weight")
    for (label, budget), height in zip(budgets.items(), (1.14, 1.04)):
        ax.axvline(budget, color=plots.COLORS["red"], lw=1.2, ls="--", clip_on=False, ymax=height)
        ax.text(budget, height, f" {label}", transform=ax.get_xaxis_transform(), color=plots.COLORS["red"], fontsize=9)
    return fig


def ladder(lines: dict[str, dict[int, tuple[float, float]]], full: float) -> Figure:
    """Perplexity of each method, one panel for each number of bits with an axis of its own: 2 bits would hide 4.

    Args:
        lines: method -> bits -> (perplexity, its standard error).
        full: perplexity of the unquantized model, drawn dashed.
    """
    bits = sorted({b for points in lines.values() for b in points}, reverse=True)
    fig, axes = plots.figure(width=8.6, height=1.2 + 0.34 * len(lines), ncols=len(bits), sharey=True)
    for ax, b in zip(np.atleast_1d(axes), bits):
        for row, (points, color) in enumerate(zip(lines.values(), plots.CYCLE * 2)):
            if b in points:
                value, error = points[b]
                ax.errorbar(value, row, xerr=error, fmt="o", ms=5, capsize=3, color=color)
        ax.axvline(full, color=plots.COLORS["gray"], ls="--", lw=1, label="16 bits")
        shown = [points[b][0] for points in lines.values() if b in points]
        ax.set(title=f"{b} bits", xlabel="perplexity", xscale="log" if max(shown) > 10 * min(shown) else "linear")
    first = np.atleast_1d(axes)[0]
    first.set_yticks(range(len(lines)), list(lines))
    first.invert_yaxis()
    first.legend(fontsize=8)
    return fig


def normalized(weight: Tensor, group_size: int = 64) -> Tensor:
    """Weights divided by the largest magnitude of their group, ``[n]`` float32."""
    flat = weight.detach().float().reshape(-1)
    blocks = flat[: len(flat) // group_size * group_size].view(-1, group_size)
    return (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).reshape(-1)
