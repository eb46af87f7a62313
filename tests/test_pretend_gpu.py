"""Starts what must pretend to have a GPU in processes of its own: it cannot be undone within one."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from optinfer.bench.gpu_day.checks import small_copy
from optinfer.execute import execute
from tests.pretend_gpu import CARDS, environment

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for folder in ("", "solutions/") for p in ROOT.glob(f"notebooks/{folder}0*.ipynb"))
SHORTEST = ROOT / "notebooks/solutions/00_start_here.ipynb"  # in seconds, and on the same way as all the others


@pytest.mark.parametrize("card", ["h100", pytest.param("t4", marks=pytest.mark.thorough)])
def test_as_on(card):
    pytest.importorskip("triton")
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.pretend_gpu.plugin", "tests/pretend_gpu"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env=clean | environment(card) | {"OMP_NUM_THREADS": "1", "OPTINFER_TEST_DEVICE": "cuda"},  # as `make test-gpu`
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.notebook
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path == SHORTEST else pytest.mark.slow) for path in NOTEBOOKS],
    ids=[path.relative_to(ROOT / "notebooks").with_suffix("").as_posix() for path in NOTEBOOKS],
)
def test_notebooks_run_from_top_to_bottom(path, card, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    for name, value in {**environment(card), "OMP_NUM_THREADS": "1", "OPTINFER_PROGRESS": "progress.json"}.items():
        monkeypatch.setenv(name, value)
    copy = small_copy(path, tmp_path)
    notebook = nbformat.read(copy, as_version=4)  # its own last cell says where it ran: solutions print no device
    notebook.cells.append(nbformat.v4.new_code_cell("import torch\nprint(torch.cuda.get_device_name())"))
    nbformat.write(notebook, copy)
    notebook = execute(copy, timeout=3000)
    assert notebook.cells[-1].outputs[0]["text"] == f"Pretend {card.upper()}\n"
    assert path.parent.name != "solutions" or "✗" not in nbformat.writes(notebook), "a solution fails its own check"
