"""The figure of layer groups: its frames are the manager's, and the page adds up in node."""

import json
import subprocess
from pathlib import Path

import pytest

from optinfer.kv_cache import LayerCache, LayerGroupManager, UnknownSequence, layer_groups
from optinfer.widgets import layer_groups as module
from optinfer.widgets.layer_groups import LayerGroupsView
from optinfer.widgets.modules import inlined
from tests.javascript import NODE, needs_node

GROUPS = layer_groups([LayerCache("full", 1, 8, 8), LayerCache("sliding", 1, 8, 8, window=8)])
HISTORY = [("A", 10), ("B", 7), ("A", 20), ("B", 40), ("A", 0), ("B", 4)]


@pytest.fixture(scope="module")
def widget() -> LayerGroupsView:
    return LayerGroupsView.of(GROUPS, 16, 4, HISTORY)


def test_frames_are_the_managers(widget: LayerGroupsView) -> None:
    manager = LayerGroupManager(GROUPS, 16, 4)
    for seq_id, count in HISTORY[:3]:
        for _ in range(count):
            (manager.append if seq_id in manager.sequence_ids else manager.allocate)(seq_id, 1)
    frame = widget.frames[2]
    assert frame["lengths"] == {"A": 30, "B": 7} and frame["uniform"] == 2 * (8 + 2)
    for seq_id in "AB":
        for group in range(2):
            mine = [page for page, owner in enumerate(frame["owners"]) if owner == [seq_id, group]]
            assert mine == sorted(manager.pages(seq_id, group)) and mine
    assert sum(owner is not None for owner in frame["owners"]) == 8 + 2 + 2 + 2 < frame["uniform"]
    assert "the next needs 1 new blocks, 0 available" in widget.frames[3]["text"]
    assert widget.frames[4]["text"] == "A ends" and "A" not in widget.frames[4]["lengths"]


def test_page_and_summary(widget: LayerGroupsView) -> None:
    state = widget.static_state()
    assert json.loads(json.dumps(state)) == state
    assert "group 1: 1 sliding layer, window 8" in widget.summary() and "14 of 16 pages, 20 without" in widget.summary()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="history must hold at least one"):
        LayerGroupsView.of(GROUPS, 16, 4, [])
    with pytest.raises(UnknownSequence, match="'A' is not allocated"):
        LayerGroupsView.of(GROUPS, 16, 4, [("A", 0)])


@needs_node
def test_tables_hold_every_page_once(widget: LayerGroupsView, tmp_path: Path) -> None:
    (tmp_path / "groups.mjs").write_text(inlined(Path(module.__file__).with_suffix(".js")), encoding="utf-8")
    program = tmp_path / "program.mjs"
    program.write_text(
        'import widget from "./groups.mjs";\n'
        f"const groups = {json.dumps(widget.groups)}, frames = {json.dumps(widget.frames)};\n"
        "console.log(JSON.stringify(frames.map((frame) => widget.held(frame, groups))));\n"
    )
    done = subprocess.run([NODE, str(program)], capture_output=True, text=True, timeout=600, check=True)
    for frame, rows in zip(widget.frames, json.loads(done.stdout), strict=True):
        assert {row["sequence"]: row["length"] for row in rows} == frame["lengths"]
        pages = sorted(page for row in rows for group in row["pages"] for page in group)
        assert pages == [page for page, owner in enumerate(frame["owners"]) if owner]
