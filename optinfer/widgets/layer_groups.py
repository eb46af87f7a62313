"""One pool, several block tables: pages of a model whose layers keep different things, step by step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optinfer.kv_cache import LayerGroupManager, OutOfBlocks
from optinfer.kv_cache.groups import LayerGroup
from optinfer.widgets.base import StaticWidget, traitlets


class LayerGroupsView(StaticWidget):
    """Sequences that grow, and who holds which page. Use `LayerGroupsView.of(...)`.

    Traits:
        groups: of each group its kind, window (None: all tokens) and layers.
        frames: per step what happened, the length of every sequence, the owner of every page ([sequence, group] or None),
            and the pages that would be held if every layer kept all tokens.
        step: the frame that is shown.
    """

    _esm = Path(__file__).with_suffix(".js")
    _widget_css = """
.oi-groups .pages { display: grid; grid-template-columns: repeat(auto-fill, minmax(34px, 1fr)); gap: 3px; }
.oi-groups .page { border: 1px solid var(--oi-line); border-radius: 3px; text-align: center; font-size: 12px; padding: 3px 0; }
.oi-groups .page.all { border: 2px solid var(--oi-blue); } .oi-groups .page.some { border: 2px dashed var(--oi-orange); }
"""
    groups = traitlets.List().tag(sync=True)
    frames = traitlets.List().tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)

    @classmethod
    def of(
        cls,
        groups: Sequence[LayerGroup],
        num_blocks: int,
        block_size: int,
        history: Sequence[tuple[str, int]],
    ) -> "LayerGroupsView":
        """Play a history with a real `LayerGroupManager`.

        Args:
            groups, num_blocks, block_size: of the manager.
            history: (sequence, tokens that it gets more, one by one); 0: it ends. One without room stops there, and waits.

        Raises ValueError: the history is empty; UnknownSequence: one ends that has not begun.
        """
        if not history:
            raise ValueError("history must hold at least one (sequence, tokens), got none")
        manager = LayerGroupManager(groups, num_blocks, block_size)
        frames = []
        for seq_id, num_tokens in history:
            frames.append(_frame(manager, _advance(manager, seq_id, num_tokens)))
        shown = [{"kind": g.cache.kind, "window": g.cache.window, "layers": list(g.layers)} for g in groups]
        return cls(groups=shown, frames=frames, step=len(frames) - 1)

    def summary(self) -> str:
        lines = [_name(group, number) for number, group in enumerate(self.groups)]
        for frame in self.frames:
            held = sum(owner is not None for owner in frame["owners"])
            lines.append(f"{frame['text']}: {held} of {len(frame['owners'])} pages, {frame['uniform']} without windows")
        return "\n".join(lines)


def _advance(manager: LayerGroupManager, seq_id: str, num_tokens: int) -> str:
    """Do one line of a history; what happened, in words."""
    if num_tokens == 0:
        manager.free(seq_id)
        return f"{seq_id} ends"
    for done in range(num_tokens):
        try:
            (manager.append if seq_id in manager.sequence_ids else manager.allocate)(seq_id, 1)
        except OutOfBlocks as error:
            return f"{seq_id} gets {done} of {num_tokens} tokens: the next {error}"
    return f"{seq_id} has {manager.num_tokens(seq_id)} tokens"


def _frame(manager: LayerGroupManager, text: str) -> dict[str, Any]:
    owners: list[list[Any] | None] = [None] * manager.num_blocks
    lengths = {str(seq_id): manager.num_tokens(seq_id) for seq_id in manager.sequence_ids}
    for seq_id in lengths:
        for group in range(len(manager.groups)):
            for page in manager.pages(seq_id, group):
                owners[page] = [seq_id, group]
    keeping = [group for group in range(len(manager.groups)) if manager.groups[group].bytes_per_token]
    fixed = sum(manager.num_pages(g, 1) for g in range(len(manager.groups)) if g not in keeping)
    uniform = sum(-(-length // manager.block_size) * len(keeping) + fixed for length in lengths.values())
    return {"text": text, "lengths": lengths, "owners": owners, "uniform": uniform}


def _name(group: dict[str, Any], number: int) -> str:
    """As the figure labels it: "group 1: 2 sliding layers, window 8"."""
    window = f", window {group['window']}" if group["window"] else ""
    return f"group {number}: {len(group['layers'])} {group['kind']} layer{'s'[: len(group['layers']) > 1]}{window}"
