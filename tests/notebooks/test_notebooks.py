"""Every notebook runs from top to bottom, as in Colab: in an empty folder, with nothing but the package."""

import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import notebook_cache  # noqa: E402

NOTEBOOKS = sorted(p for folder in ("", "exercises/", "solutions/") for p in ROOT.glob(f"notebooks/{folder}*.ipynb"))
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.mark.notebook
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "notebooks").with_suffix("").as_posix())
def test_runs_from_top_to_bottom(path: Path) -> None:
    notebook = notebook_cache.executed(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert code and all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    if path.parent.name == "notebooks":
        assert outputs[-1] is not None and any("image/png" in o.get("data", {}) for o in outputs), (
            "a lesson without a figure"
        )
    if path.parent.name == "solutions":
        assert "✗" not in nbformat.writes(notebook), "a solution fails its own check"


def small(tmp_path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path = tmp_path / "small.ipynb"
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook_cache, "FOLDER", tmp_path / "store" / ".jupyter_cache")


def test_an_error_is_seen_and_not_kept(tmp_path: Path, own_store: None) -> None:
    from optinfer.execute import NotebookError

    path = small(tmp_path, "1 / 0")
    for _ in range(2):
        with pytest.raises(NotebookError, match="ZeroDivisionError"):
            notebook_cache.executed(path)


def test_each_notebook_is_executed_once(tmp_path: Path, own_store: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import optinfer.execute as runner

    path = small(tmp_path, "import os", "print(6 * 7)")
    assert notebook_cache.cached(path) is None
    assert notebook_cache.executed(path).cells[1].outputs[0].text == "42\n"
    monkeypatch.setattr(runner, "execute", lambda *args, **kwargs: pytest.fail("executed again"))
    assert notebook_cache.executed(path).cells[1].outputs[0].text == "42\n"
    changed = small(tmp_path, "import os", "print(6 * 8)")
    assert notebook_cache.cached(changed) is None


def test_a_new_store_is_not_emptied_again(tmp_path: Path, own_store: None) -> None:
    """The first notebook executed after a change stays, although others are asked for later."""
    path = small(tmp_path, "print(3)")
    notebook_cache.executed(path)
    assert notebook_cache.prune() and notebook_cache.cached(path) is not None


def test_changed_sources_empty_the_store(tmp_path: Path, own_store: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path, "print(1)")
    assert not notebook_cache.prune()
    notebook_cache.executed(path)
    assert notebook_cache.prune() and notebook_cache.cached(path) is not None
    monkeypatch.setattr(notebook_cache, "fingerprint", lambda: "other sources")
    assert not notebook_cache.prune() and notebook_cache.cached(path) is None
