"""Open JupyterLab on the first notebook."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from optinfer import data
from optinfer.errors import OptinferError

FIRST = "00_start_here.ipynb"


def notebooks_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The notebooks to work in: the given folder, the repository's, or a copy of the installed ones in ./optinfer-course.

    A copy never overwrites a notebook that is already there.
    """
    if folder is not None:
        chosen = Path(folder)
        if not (chosen / FIRST).is_file():
            raise OptinferError(f"folder {str(folder)!r} holds no {FIRST}")
        return chosen
    installed = data.root() / "notebooks"
    if (data.root() / "pyproject.toml").is_file():
        return installed
    mine = Path.cwd() / "optinfer-course"
    beside = ("*.ipynb", "book/glossary.md", "book/images/colab.svg")  # what the notebooks show and link to
    for source in sorted(path for pattern in beside for path in installed.rglob(pattern)):
        target = mine / source.relative_to(installed)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(source, target)
    return mine


def open_lab(folder: str | os.PathLike[str] | None = None, browser: bool = True, port: int = 8888) -> int:
    """Replace this process by JupyterLab, opened on the first notebook.

    Raises:
        OptinferError: JupyterLab is not installed, or the folder holds no notebooks.
    """
    import importlib.util

    if importlib.util.find_spec("jupyterlab") is None:
        raise OptinferError("JupyterLab is not installed; install it with: pip install 'optinfer[lab]'")
    notebooks = notebooks_folder(folder)
    command = [sys.executable, "-m", "jupyter", "lab", f"--port={port}"]
    command += [
        f"--ServerApp.root_dir={notebooks}",
        f"--LabApp.default_url=/lab/tree/{FIRST}",  # also the address that is printed without a browser
        f"--LabApp.app_settings_dir={Path(__file__).with_name('jupyter')}",  # no question about news over the lesson
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    if os.name == "nt":  # there exec would give the console back while JupyterLab still runs
        return subprocess.call(command)
    os.execv(sys.executable, command)
