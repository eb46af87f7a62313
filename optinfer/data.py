"""The course's own files: evaluation text, prompts, claims. Found beside the repository or in the installed wheel."""

import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Literal, get_args

Split = Literal["calibration", "evaluation"]
PromptKind = Literal["chat", "code", "rewrite", "summarize"]

_MARKER = "data/README.md"


@functools.cache
def root() -> Path:
    """The folder that holds ``data/`` and ``notebooks/``: the repository, or ``share/optinfer`` of the install.

    Raises:
        FileNotFoundError: neither is there, so the installation is incomplete.
    """
    repository = Path(__file__).resolve().parents[1]
    if (repository / _MARKER).is_file() and (repository / "pyproject.toml").is_file():
        return repository
    try:
        files = importlib.metadata.files("optinfer") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.as_posix().endswith(f"share/optinfer/{_MARKER}"):
            return Path(str(file.locate())).resolve().parents[1]
    raise FileNotFoundError(
        "optinfer's data files are missing; install it again with: pip install --force-reinstall optinfer"
    )


def path(name: str) -> Path:
    """The file or folder ``data/<name>``.

    Raises:
        FileNotFoundError: there is no such file; the message lists its neighbours.
    """
    found = root() / "data" / name
    if not found.exists():
        folder = found.parent
        known = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(f"no data file {name!r}; {folder.name}/ holds: {', '.join(known) or 'nothing'}")
    return found


def text(split: Split = "evaluation") -> str:
    """English prose: ``"calibration"`` or ``"evaluation"``, about 30k tokens each, from different novels."""
    if split not in get_args(Split):
        raise ValueError(f"split must be 'calibration' or 'evaluation', not {split!r}")
    return path(f"text/{split}.txt").read_text(encoding="utf-8")


def prompts(kind: PromptKind) -> list[str]:
    """User messages of one kind: ``"chat"``, ``"summarize"``, ``"rewrite"`` or ``"code"``."""
    if kind not in get_args(PromptKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(PromptKind))}, not {kind!r}")
    return json.loads(path(f"prompts/{kind}.json").read_text(encoding="utf-8"))


def claims() -> dict[int, str]:
    """The chapter's claims by number, each put to a measurement in one notebook."""
    return {number: entry["claim"] for number, entry in _claims().items()}


def claim_makers() -> dict[int, str]:
    """Where each claim comes from: a paper, or who repeats it."""
    return {number: entry["made_by"] for number, entry in _claims().items()}


@functools.cache
def _claims() -> dict[int, dict[str, str]]:
    return {int(k): v for k, v in json.loads(path("claims.json").read_text(encoding="utf-8")).items()}
