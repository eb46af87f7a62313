"""What the course tells the reader between cells: one text, shown as a card in a notebook and as plain lines in a console."""

import html
import re
import sys
from dataclasses import dataclass
from typing import Literal, TypeVar

Tone = Literal["info", "good", "bad", "note", "said"]
_TONES: dict[Tone, tuple[str, str]] = {
    "info": ("#0072B2", ""),
    "good": ("#009E73", "✓ "),
    "bad": ("#D55E00", "✗ "),
    "note": ("#6E6E6E", ""),
    "said": ("", ""),  # an ordinary sentence of the lesson
}


@dataclass(frozen=True)
class Card:
    """A title, a few lines, and a tone: ``info``, ``good``, ``bad``, ``note`` or ``said``. Lines hold `code` in backticks."""

    title: str
    lines: tuple[str, ...] = ()
    tone: Tone = "info"

    def __post_init__(self) -> None:
        if self.tone not in _TONES:
            raise ValueError(f"tone must be one of {', '.join(_TONES)}, not {self.tone!r}")

    def __repr__(self) -> str:
        return "\n".join([_TONES[self.tone][1] + self.title, *(f"  {line}" for line in self.lines)])

    def _repr_html_(self) -> str:
        if self.tone == "said":
            return f"<p>{_inline(self.title)}</p>"
        color, mark = _TONES[self.tone]
        body = "".join(f"<div>{_inline(line)}</div>" for line in self.lines)
        return (
            f'<div style="border-left:4px solid {color};padding:6px 12px;margin:6px 0;line-height:1.5">'
            f"<strong>{mark}{_inline(self.title)}</strong>{body}</div>"
        )


def in_a_plain_script() -> bool:
    """Nobody shows the value of an expression there: neither a notebook nor a prompt."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is None and not hasattr(sys, "ps1") and not sys.flags.interactive


T = TypeVar("T")


def shown(answer: T) -> T:
    """The answer itself, printed in a plain script, where a call alone would show nothing."""
    if in_a_plain_script():
        print(answer)
    return answer


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


@dataclass(frozen=True)
class Table:
    """Columns and rows of text, shown as an HTML table or as aligned columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __repr__(self) -> str:
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (self.columns, *self.rows)
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, *([self.caption] if self.caption else [])])

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="text-align:left">{_inline(c)}</th>' for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{_inline(cell)}</td>' for cell in row) + "</tr>"
            for row in self.rows
        )
        caption = (
            f'<caption style="caption-side:bottom;text-align:left">{_inline(self.caption)}</caption>'
            if self.caption
            else ""
        )
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class Folded:
    """A text that opens on a click in a notebook, such as source code; in a console it is printed whole."""

    title: str
    text: str

    def __repr__(self) -> str:
        return f"{self.title}\n\n{self.text}"

    def _repr_html_(self) -> str:
        body = html.escape(self.text)
        return f"<details><summary>{_inline(self.title)}</summary><pre><code>{body}</code></pre></details>"
