"""Softmax over a row that is only ever seen in tiles: the running maximum, sum and accumulator, step by step."""

from pathlib import Path
from typing import Any

import torch
import traitlets

from optinfer.attention import TileStep, attention_reference, online_softmax_attention
from optinfer.widgets.base import StaticWidget


class OnlineSoftmax(StaticWidget):
    """Watch the flash algorithm take in one query's scores, tile by tile. Use `OnlineSoftmax.trace(...)`.

    Traits:
        scores: the whole row, which the algorithm never holds.
        frames: one per tile, as `online_softmax_attention` computed them.
        exact: the output of the whole-row softmax, for comparison.
        step: tiles taken in so far.
    """

    _esm = Path(__file__).with_suffix(".js")
    _widget_css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

    scores = traitlets.List().tag(sync=True)
    block = traitlets.Int(4).tag(sync=True)
    frames = traitlets.List().tag(sync=True)
    exact = traitlets.List().tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)

    @classmethod
    def trace(cls, scores: list[float], values: list[list[float]], block: int = 4) -> "OnlineSoftmax":
        """Run the real algorithm on one query whose logits are `scores` [N], over `values` [N, head_dim]."""
        if len(scores) != len(values) or not scores:
            raise ValueError(f"scores and values must have one length, got {len(scores)} and {len(values)}")
        v = torch.tensor(values, dtype=torch.float64)[None, None]
        k = torch.zeros_like(v)
        k[0, 0, :, 0] = torch.tensor(scores, dtype=torch.float64)
        q = torch.zeros_like(v[:, :, :1])
        q[..., 0] = 1.0  # so that q · k is the score
        frames: list[dict[str, Any]] = []

        def keep(step: TileStep) -> None:
            frames.append(
                {
                    "first": step.cols.start,
                    "last": step.cols.stop,
                    "weights": step.weights.flatten().tolist(),
                    "max": step.running_max.item(),
                    "sum": step.running_sum.item(),
                    "rescale": step.rescale.item(),
                    "acc": step.accumulator.flatten().tolist(),
                    "out": (step.accumulator / step.running_sum).flatten().tolist(),
                }
            )

        online_softmax_attention(q, k, v, scale=1.0, block_m=1, block_n=block, on_step=keep)
        exact = attention_reference(q, k, v, scale=1.0).flatten().tolist()
        return cls(scores=list(map(float, scores)), block=block, frames=frames, exact=exact)

    def summary(self) -> str:
        lines = [f"Online softmax over {len(self.scores)} scores in {len(self.frames)} tiles of {self.block}:"]
        for i, f in enumerate(self.frames, 1):
            lines.append(f"tile {i}: max {f['max']:.2f}, earlier sums x {f['rescale']:.3f}, sum {f['sum']:.3f}")
        error = max(abs(a - b) for a, b in zip(self.frames[-1]["out"], self.exact, strict=True)) if self.frames else 0
        lines.append(f"difference from the softmax of the whole row: {error:.1e}")
        return "\n".join(lines)
