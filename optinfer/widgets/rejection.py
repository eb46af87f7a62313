"""The coin flip of speculative sampling over four tokens: drag p and q, watch the law of the output stay p."""

from pathlib import Path

import torch
import traitlets

from optinfer.speculative.rejection import output_distribution
from optinfer.widgets.base import StaticWidget


class RejectionExplorer(StaticWidget):
    """Sliders for the target's and the draft's weights of a few tokens; both are normalized.

    Traits:
        tokens: their names.
        target, draft: one weight from 0 to 100 per token.
    """

    _esm = Path(__file__).with_suffix(".js")
    _widget_css = """
.oi-rej table { width: 100%; color: inherit; } .oi-rej td { white-space: nowrap; }
.oi-rej td { vertical-align: middle; } .oi-rej input { width: 90px; }
.oi-rej .bar { display: flex; height: 16px; width: 130px; background: var(--oi-panel); border-radius: 3px; overflow: hidden; }
.oi-rej .kept { background: var(--oi-green); } .oi-rej .left { background: var(--oi-orange); }
.oi-rej .sw { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 4px; }
"""
    tokens = traitlets.List(["the", "a", "my", "no"]).tag(sync=True)
    target = traitlets.List([50, 25, 20, 5]).tag(sync=True)
    draft = traitlets.List([20, 60, 15, 5]).tag(sync=True)

    def law(self) -> list[float]:
        """The exact law of the emitted token, from the package's own enumeration."""
        p, q = (torch.tensor(w, dtype=torch.float64) / sum(w) for w in (self.target, self.draft))
        return output_distribution(q, p).tolist()

    def summary(self) -> str:
        total = sum(self.target)
        rows = [
            f"{t}: p = {p / total:.3f}, emitted with {e:.3f}" for t, p, e in zip(self.tokens, self.target, self.law())
        ]
        return "Rejection sampling\n" + "\n".join(rows)
