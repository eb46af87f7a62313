"""The wheel: what a Colab session or a machine without the repository gets."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=600)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with optinfer from the wheel, and this environment's other packages behind it."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, timeout=600)
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def in_elsewhere(python: Path, folder: Path, *arguments: str, timeout: float = 600) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.xdist_group("wheel")
def test_everything_travels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = {n for n in tracked if n.startswith("optinfer/")}
    code |= {n.removeprefix("kernels/") for n in tracked if n.startswith("kernels/optinfer_kernels/")}
    shared = {n for n in tracked if n.startswith("data/") or (n.startswith("notebooks/") and n.endswith(".ipynb"))}
    packed = {n.split(".data/data/share/optinfer/")[-1] for n in names}
    assert code <= names, sorted(code - names)
    assert shared <= packed, sorted(shared - packed)
    assert not [n for n in names if n.startswith(("kernels/", "tests/"))]


@pytest.mark.xdist_group("wheel")
def test_installed_package_finds_its_data(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, optinfer, optinfer_kernels; from optinfer import data; from optinfer.course import lab;"
        "print(json.dumps([optinfer.__file__, len(data.text()), str(data.root()), str(lab.notebooks_folder())]))"
    )
    module, length, root, notebooks = json.loads(in_elsewhere(installed, tmp_path, "-c", code))
    assert str(installed.parents[1]) in module and str(installed.parents[1]) in root
    assert length == len((ROOT / "data" / "text" / "evaluation.txt").read_text(encoding="utf-8"))
    assert (
        notebooks == str(tmp_path / "optinfer-course") and (tmp_path / "optinfer-course/00_start_here.ipynb").exists()
    )


@pytest.mark.versions
@pytest.mark.xdist_group("wheel")
def test_notebook_01_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    notebook = installed.parents[1] / "share/optinfer/notebooks/01_quantization.ipynb"
    assert "cells in" in in_elsewhere(installed, tmp_path, "-m", "optinfer.execute", str(notebook))
