"""What the lessons measured of the chapter's claims, kept beside the reader's progress, for the last lesson's ledger."""

import contextlib
import json
from typing import Any

from optinfer.card import Table
from optinfer.course import records
from optinfer.folders import write_whole

# The lesson that measures each claim last.
LESSONS = {
    1: "01_quantization",
    2: "01_quantization",
    3: "02_calibrated_quantization",
    4: "02_calibrated_quantization",
    5: "01_quantization",
    6: "03_flash_attention",
    7: "03_flash_attention",
    8: "03_flash_attention",
    9: "06_putting_it_together",
    10: "04_kv_cache",
    11: "05_speculative_decoding",
    12: "05_speculative_decoding",
    13: "05_speculative_decoding",
    14: "06_putting_it_together",
}


def load() -> dict[int, dict[str, str]]:
    """By claim: ``lesson``, ``measured``, ``verdict``, ``where``. A missing or damaged file counts as empty."""
    try:
        known = json.loads(_path().read_text(encoding="utf-8"))
        return {int(number): dict(entry) for number, entry in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def record(number: int, *, lesson: str, **entry: str) -> None:
    """Keep the newest measurement of the latest lesson that measured a claim: the first lesson only counts.

    A folder that cannot be written to is no reason to fail.
    """
    known: dict[int, Any] = load()
    if known.get(number, {}).get("lesson", "") > lesson:
        return
    known[number] = {"lesson": lesson, **entry}
    with contextlib.suppress(OSError):
        write_whole(_path(), json.dumps(known, indent=1, sort_keys=True) + "\n")


def table() -> Table:
    """All claims of the course with what was measured on this computer, or the lesson to run for it."""
    from optinfer import data

    known = load()
    rows = []
    for number, claim in data.claims().items():
        entry = known.get(number, {})
        measured = entry.get("measured") or f"not yet: run lesson {LESSONS[number]}"
        rows.append((str(number), claim, measured, entry.get("where", ""), entry.get("verdict", "")))
    return Table(("#", "claim", "measured", "on", "verdict"), tuple(rows))


def of_models() -> Table:
    """The claims about memory for every model of `memory.MODELS`, computed from its shape: do the 16-bit weights need more than
    one GPU of 80 GB (1), do those of 4 bits fit one (2), and does each token still add to the cache at 128k tokens (9)?
    """
    from optinfer import memory

    one = memory.GPUS["A100 or H100"] * 1e9
    rows = []
    for name, shape in memory.MODELS.items():
        halves = 2 * shape.parameters
        fours = shape.linear_parameters * 4.25 / 8 + 2 * shape.other_parameters  # MXFP4, or int4 in groups of 64
        layers = sum(count for count, _ in shape.cache)
        growing = sum(
            n for n, kept in shape.cache if kept.tokens(2**17 + 1) > kept.tokens(2**17) and kept.numbers_per_token
        )
        rows.append((
            name,
            _said(halves > one, f"{halves / 1e9:,.1f} GB"),
            _said(fours <= one, f"{fours / 1e9:,.1f} GB"),
            _said(growing == layers, f"{growing} of {layers} layers", partly=growing > 0),
        ))  # fmt: skip
    return Table(
        ("model", "1: 16 bits need more than one GPU", "2: 4 bits fit one", "9: the cache grows with every token"),
        tuple(rows),
    )


def _said(holds: bool, measured: str, partly: bool = False) -> str:
    return f"{'holds' if holds else 'in part' if partly else 'does not hold'}: {measured}"


def listed() -> Table:
    """The claims up front: what is said, who says it, and the lesson that measures it."""
    from optinfer import data

    makers = data.claim_makers()
    rows = [(str(n), claim, makers[n], LESSONS[n][:2].lstrip("0")) for n, claim in data.claims().items()]
    return Table(("#", "claim", "made by", "measured in lesson"), tuple(rows))


def _path() -> Any:
    return records.path().with_name("claims.json")
