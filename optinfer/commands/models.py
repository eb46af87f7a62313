"""What `quantize` and `export` share: a model by the name given, a folder that must be new."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from optinfer.models import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_named(name: str, **options: Any) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Model and tokenizer of a hub id or folder, or of ``"default"``."""
    return load_model(None if name == "default" else name, **options)


def refuse_existing(folder: Path) -> None:
    """Before the work, not after it: raise ValueError if the folder is there."""
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another folder, or remove it first")
