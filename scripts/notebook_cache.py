"""Executed notebooks, kept so that the tests and the book run each notebook once.

The store is jupyter-cache's, which finds a notebook by its code cells. It is emptied when the package, its kernels or its
data have changed, because the same cells would then print something else.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "_build" / ".jupyter_cache"
_WATCHED = ("optinfer/**/*", "kernels/**/*", "data/**/*", "constraints.txt")


def fingerprint() -> str:
    """A hash of everything besides the cells that a notebook's outputs depend on."""
    digest = hashlib.sha256()
    for pattern in _WATCHED:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def prune() -> bool:
    """Empty the store if it was made from other sources; returns whether it was still good. Safe in several processes."""
    stamp, current = FOLDER.with_name(".jupyter_cache_of"), fingerprint()
    with _lock():
        if FOLDER.is_dir() and stamp.is_file() and stamp.read_text() == current:
            return True
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        _ = _store().db  # makes the database now, before several processes want it
        stamp.write_text(current)
        return False


@functools.cache
def _prune_once(folder: Path) -> None:
    """Before the first notebook of a process, whoever asks for it: a later prune would empty what was just executed."""
    prune()


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with FOLDER.with_name(".jupyter_cache_lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: there the tests run in one process
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _store() -> Any:
    from jupyter_cache import get_cache

    return get_cache(FOLDER)


def cached(path: Path) -> Any | None:
    """The executed notebook with these code cells, or None."""
    import nbformat

    store = _store()
    try:
        return store.merge_match_into_notebook(nbformat.read(path, as_version=4))[1]
    except KeyError:
        return None


def executed(path: Path, timeout: float = 1800) -> Any:
    """The notebook with its outputs: from the store, or executed in an empty folder and then kept.

    Outputs of earlier sources are forgotten first.

    Raises:
        optinfer.execute.NotebookError: a cell raised or took too long.
    """
    from jupyter_cache.base import CacheBundleIn

    from optinfer.execute import execute

    _prune_once(FOLDER)
    if (known := cached(path)) is not None:
        return known
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = time.perf_counter()
    os.environ["OPTINFER_PROGRESS"] = "progress.json"  # in the notebook's own empty folder, never the user's file
    notebook = execute(path, timeout=timeout)
    seconds = time.perf_counter() - start
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of execution would make it a different notebook to the store
    bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
    _store().cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    return notebook
