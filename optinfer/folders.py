"""Where things are kept, and files and folders that appear whole or not at all: a reader sees the old or the new, never half."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def cache_directory() -> Path:
    """Where converted models and compiled kernels live: ``$OPTINFER_CACHE``, or ``optinfer`` in the user's cache folder."""
    if given := os.environ.get("OPTINFER_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "optinfer"


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write to, whose file becomes `target` when the block ends and vanishes when it raises."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield work
        work.chmod(0o644)  # safetensors writes files that only their owner may read
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)


def write_whole(target: Path, content: str) -> None:
    """Write a text file, whole or not at all."""
    with new_file(target) as work:
        work.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends and vanishes when it raises.

    Args:
        target: the name it will have; parents are made.
        replace: whether a folder of that name gives way.

    Raises:
        FileExistsError: `target` exists and `replace` is False.
    """
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists: choose another folder, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    work.mkdir()
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():  # safetensors writes files that only their owner may read
                file.chmod(work.stat().st_mode & 0o666)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
