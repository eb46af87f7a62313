"""What the engine did, step by step: requests as rows, steps as columns, drawn from the engine's own log."""

from pathlib import Path
from typing import TYPE_CHECKING

from optinfer.widgets.base import StaticWidget, traitlets

if TYPE_CHECKING:
    from optinfer.serving import Engine


class EngineTimeline(StaticWidget):
    """Scrub through one or more logs of the same requests. Use `EngineTimeline.of(mixed=engine, static=other)`.

    Traits:
        runs: per engine its name, the labels of its rows, and one frame per step.
        step: the last step that is shown, from 0.
    """

    _esm = Path(__file__).with_suffix(".js")

    runs = traitlets.List().tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)

    @classmethod
    def of(cls, **engines: "Engine") -> "EngineTimeline":
        """The logs of engines that served the same requests, by the name to show.

        Raises ValueError: no engine, or one without a log.
        """
        if not engines or not all(engine.log for engine in engines.values()):
            raise ValueError("need at least one engine that has a log (log_steps above 0, and at least one step)")
        runs = [_run(name.replace("_", " "), engine) for name, engine in engines.items()]
        return cls(runs=runs, step=max(len(run["frames"]) for run in runs) - 1)  # the whole story first

    def summary(self) -> str:
        lines = ["Engine timeline: steps, tokens computed, preemptions, drafts accepted"]
        for run in self.runs:
            cells = [cell for frame in run["frames"] for cell in frame["cells"]]
            tokens = sum(cell["tokens"] + cell["drafted"] for cell in cells)
            preempted = sum(len(frame["preempted"]) for frame in run["frames"])
            accepted = sum(cell["accepted"] for cell in cells)
            lines.append(
                f"{run['name']}: {len(run['frames'])} steps, {tokens} tokens, {preempted} preemptions, {accepted} accepted"
            )
        return "\n".join(lines)


def _run(name: str, engine: "Engine") -> dict:
    rows: dict[tuple[str, int], int] = {}
    frames = []
    for record in engine.log:
        cells = []
        for chunk in record.chunks:
            row = rows.setdefault((chunk.request_id, chunk.index), len(rows))
            cells.append(
                {
                    "row": row,
                    "kind": chunk.kind,
                    "tokens": chunk.num_tokens,
                    "start": chunk.start,
                    "drafted": chunk.drafted,
                    "accepted": chunk.accepted,
                }
            )
        frames.append(
            {
                "cells": cells,
                "preempted": [rows[s] for s in record.preempted if s in rows],
                "finished": [rows[s] for s in record.finished if s in rows],
                "ms": round(record.seconds * 1e3, 2),
                "waiting": record.waiting,
                "running": record.running,
                "used": record.used_blocks,
            }
        )
    labels = [request_id if index == 0 else f"{request_id} · {index}" for request_id, index in rows]
    return {"name": name, "labels": labels, "frames": frames, "blocks": engine.manager.num_blocks}
