"""The course's figure style: colours that colour-blind readers and printers can tell apart, units on every axis."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from optinfer.hardware import Machine

# Okabe and Ito (2008). Yellow is left out: it does not print.
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "gray": "#6E6E6E",
    "black": "#222222",
}
CYCLE = [COLORS[name] for name in ("blue", "orange", "green", "red", "purple", "sky", "gray")]
RECORDED = {
    "hatch": "///",
    "alpha": 0.55,
}  # how a recorded bar differs from one measured in front of the reader


def style() -> None:
    """Set matplotlib's defaults for the course; safe to call twice."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update(
        {
            "figure.figsize": (7.2, 3.8),
            "figure.dpi": 110,
            "savefig.dpi": 150,
            "savefig.bbox": "tight",
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "axes.prop_cycle": cycler(color=CYCLE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "axes.formatter.min_exponent": 4,  # logarithmic axes read 20, 500, not powers of ten
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.7,
            "lines.linewidth": 2.0,
            "lines.markersize": 6,
            "font.size": 10,
            "legend.frameon": False,
        }
    )


def describe(fig: "Figure") -> str:
    """A figure in words: each panel's title, axes and labelled series; the text beside the picture in a notebook."""
    panels = []
    for ax in fig.axes:
        series = [label for label in ax.get_legend_handles_labels()[1] if not label.startswith("_")]
        parts = [
            ax.get_title(loc="left") or ax.get_title(),
            " over ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel()))),
        ]
        if series:
            parts.append("series: " + ", ".join(dict.fromkeys(series)))
        panels.append("; ".join(" ".join(part.split()) for part in parts if part))
    return "Figure. " + ". ".join(filter(None, panels))


def _describe_figures() -> None:
    """In a notebook, a figure's text/plain is its description instead of its address in memory."""
    import sys

    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        from matplotlib.figure import Figure

        formatter = shell.display_formatter.formatters["text/plain"]
        formatter.for_type(Figure, lambda fig, printer, cycle: printer.text(describe(fig)))


def figure(width: float = 7.2, height: float = 3.8, **kwargs: Any) -> tuple["Figure", Any]:
    """``plt.subplots`` in the course's style; width and height in inches."""
    import matplotlib.pyplot as plt

    style()
    made = plt.subplots(figsize=(width, height), layout="constrained", **kwargs)
    _describe_figures()  # now: a session's first figure loads the notebook's backend, which forgets formatters
    return made


def name_ticks(axis: "Axis", values: list[int]) -> None:
    """On a logarithmic axis: ticks at these values, written out, and no others."""
    axis.set_ticks(values, [f"{value:,}" for value in values])
    axis.set_ticks([], minor=True)


def roofline(machine: "Machine", points: list[dict[str, Any]], recorded: "Machine | None" = None) -> "Figure":
    """The machine's two ceilings and where measured work lies under them, on logarithmic axes.

    Args:
        machine: its measured bandwidth and matmul rate draw the roof.
        points: dicts with ``label``, ``flops`` and ``bytes`` of the work, and the ``seconds`` it took.
        recorded: another machine's roof, drawn dashed.
    """
    import numpy as np

    fig, ax = figure(height=4.2)
    rightmost = max([m.ridge for m in (machine, recorded) if m] + [p["flops"] / p["bytes"] for p in points]) * 8
    intensity = np.geomspace(0.25, rightmost, 200)
    for m, dashes, color in ((machine, "-", COLORS["black"]), (recorded, "--", COLORS["gray"])):
        if m is None:
            continue
        roof = np.minimum(m.matmul_flops, m.bandwidth * intensity) / 1e9
        ax.plot(intensity, roof, dashes, color=color, label=f"the roof of {m.name}")
        ax.axvline(m.ridge, color=color, linewidth=0.8, linestyle=":")
        slope = {"ha": "right", "va": "bottom", "color": color, "fontsize": 9}
        ax.annotate(
            f"{m.bandwidth / 1e9:,.0f} GB/s ",
            ((0.25 * m.ridge) ** 0.5, m.bandwidth * (0.25 * m.ridge) ** 0.5 / 1e9),
            **slope,
        )
        ax.annotate(f"{m.matmul_flops / 1e9:,.0f} GFLOP/s", (rightmost, m.matmul_flops / 1e9 * 1.08), **slope)
    for i, point in enumerate(points):
        x, y = point["flops"] / point["bytes"], point["flops"] / point["seconds"] / 1e9
        ax.plot(x, y, "o", color=CYCLE[i % len(CYCLE)])
        ax.annotate(point["label"], (x, y), textcoords="offset points", xytext=(6, -11), fontsize=9)
    ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP per byte moved)", ylabel="GFLOP/s")
    ax.margins(y=0.12)
    ax.legend(loc="lower right")
    return fig


def bars(
    ax: "Axes", labels: list[str], values: list[float], unit: str, recorded: list[bool] | None = None, axis: str = ""
) -> None:
    """Horizontal bars with their values and unit written at the end; recorded ones are hatched.

    Args:
        axis: what the axis shows; the unit alone where it says enough.
    """
    marks = recorded or [False] * len(values)
    for i, (label, value, is_recorded) in enumerate(zip(labels, values, marks, strict=True)):
        extra: dict[str, Any] = RECORDED if is_recorded else {}
        ax.barh(i, value, color=CYCLE[i % len(CYCLE)], label=label, **extra)
        ax.annotate(f" {value:,.3g} {unit}", (value, i), va="center", fontsize=9)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set_xlabel(axis or unit)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.18)
