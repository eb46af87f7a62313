"""The course in Colab's exact versions: wheel installed as a notebook's first cell does, notebooks run in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "constraints-colab.txt"
pytestmark = [pytest.mark.versions, pytest.mark.timeout(3600)]


def python313() -> str | None:
    """A Python 3.13 that runs: a version manager's stand-in on the PATH may start nothing."""
    candidates = [os.environ.get("OPTINFER_PYTHON313"), shutil.which("python3.13")]
    candidates += sorted(map(str, Path.home().glob(".pyenv/versions/3.13*/bin/python")))
    return next((path for path in candidates if path and is_python313(path)), None)


def is_python313(path: str) -> bool:
    if not Path(path).is_file():
        return False
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.startswith("Python 3.13.")


def run(*command: str | Path | float, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {"OMP_NUM_THREADS": "2"} | environment | {"MPLBACKEND": "agg"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def colab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with Colab's versions, the course's wheel installed into it without changing them."""
    ready = os.environ.get("OPTINFER_COLAB_ENV")  # an environment that already has the pins, to save minutes
    folder = tmp_path_factory.mktemp("colab")
    if ready:
        python = Path(ready) / "bin" / "python"
    else:
        base = python313()
        if base is None:
            if os.environ.get("CI"):
                pytest.fail("no Python 3.13: set OPTINFER_PYTHON313")
            pytest.skip("no Python 3.13: set OPTINFER_PYTHON313")
        run(base, "-m", "venv", folder / "env", cwd=folder)
        python = folder / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", "--no-cache-dir", "-r", PINS, cwd=folder)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(
        python, "-m", "pip", "uninstall", "-q", "-y", "optinfer", cwd=folder
    )  # pip would keep an older one of this version
    run(python, "-m", "pip", "install", "-q", wheel, cwd=folder)
    return python


def test_the_install_changes_none_of_colabs_versions(colab: Path, tmp_path: Path) -> None:
    installed = run(colab, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).lower().splitlines()
    versions = dict(line.split("+")[0].split("==") for line in installed if "==" in line)
    pins = dict(line.split("==") for line in PINS.read_text().splitlines() if "==" in line)
    assert {name: versions.get(name) for name in pins} == pins


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_notebook(colab: Path, path: Path, tmp_path: Path) -> None:
    """From the wheel alone: the notebook's copy, an empty folder, the package from site-packages."""
    shutil.copy(path, tmp_path)
    where = run(colab, "-c", "import optinfer; print(optinfer.__file__)", cwd=tmp_path)
    assert "site-packages" in where
    run(colab, "-m", "optinfer.execute", path.name, cwd=tmp_path)


@pytest.mark.parametrize(("folder", "fraction"), [("solutions", 1.0), ("exercises", 0.0)])
def test_exercise_notebooks_score(colab: Path, folder: str, fraction: float, tmp_path: Path) -> None:
    """Solved: all points. Unsolved: none, and not a single cell raises."""
    paths = sorted((ROOT / "notebooks" / folder).glob("*.ipynb"))
    program = "import sys; from optinfer.cli import main; sys.exit(main())"
    grades = json.loads(run(colab, "-c", program, "grade", *paths, "--json", "--min", fraction, cwd=tmp_path))
    assert len(grades) == len(paths)
    assert {Path(g["notebook"]).stem: (g["fraction"], g["problems"]) for g in grades} == {
        path.stem: (fraction, []) for path in paths
    }
