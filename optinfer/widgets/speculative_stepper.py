"""Speculative decoding of a real text, pass by pass: drafted, accepted, rejected, and the target's own token."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets

from optinfer.widgets.base import StaticWidget

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from optinfer.speculative.statistics import Statistics


class SpeculativeStepper(StaticWidget):
    """Plays the rounds that `optinfer.speculative_decoding` recorded.

    Args:
        statistics: of one text, from ``generate(…, return_dict_in_generate=True)``.
        tokenizer: to show tokens as text.
        prompt: shown above the text; optional.
    """

    _esm = Path(__file__).with_suffix(".js")
    _widget_css = """
.oi-spec .tok { display: inline-block; padding: 0 3px; margin: 1px; border-radius: 4px;
  border: 1px solid transparent; white-space: pre; }
.oi-spec .yes { border-color: var(--oi-green); box-shadow: inset 0 -3px var(--oi-green); }
.oi-spec .no { border-color: var(--oi-red); text-decoration: line-through; box-shadow: inset 0 -3px var(--oi-red); }
.oi-spec .unseen { border: 1px dashed var(--oi-muted); color: var(--oi-muted); text-decoration: line-through; }
.oi-spec .own { border-color: var(--oi-blue); box-shadow: inset 0 -3px var(--oi-blue); }
.oi-spec .text { min-height: 90px; margin-top: 8px; }
"""
    rounds = traitlets.List().tag(sync=True)
    prompt = traitlets.Unicode("").tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)

    def __init__(self, statistics: "Statistics", tokenizer: "PreTrainedTokenizerBase", prompt: str = "", **kwargs: Any):
        def words(ids: list[int]) -> list[str]:
            return [str(tokenizer.decode([i])) for i in ids]

        rounds = [
            {"drafter": r.drafter, "drafted": words(r.drafted), "accepted": r.accepted, "emitted": words(r.emitted)}
            for r in statistics.rounds
        ]
        super().__init__(rounds=rounds, prompt=prompt, **kwargs)

    def summary(self) -> str:
        tokens = sum(len(r["emitted"]) for r in self.rounds)
        return f"{tokens} tokens in {len(self.rounds)} passes: " + "".join(t for r in self.rounds for t in r["emitted"])
