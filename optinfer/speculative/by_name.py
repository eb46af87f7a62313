"""What a user may pass as ``draft``, to `speculative_decoding` and to `Engine` alike."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from optinfer.speculative.drafters import ChainDraft, Draft, ModelDraft, PromptLookupDraft, QuantizedDraft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DraftName = Literal["prompt_lookup", "head", "lookup_then_head", "int8", "nf4"]
DraftLike: TypeAlias = "DraftName | Draft | PreTrainedModel | Sequence[DraftLike]"


def as_draft(draft: DraftLike, trees: bool = False) -> Draft:
    """The drafter that is meant.

    Args:
        draft: a drafter; a smaller model; a name: ``"prompt_lookup"``, ``"head"`` (the trained head that comes with the
            default model), ``"lookup_then_head"``, ``"int8"`` or ``"nf4"`` (the target itself, quantized); or a list of
            these, asked in turn.
        trees: whether it may draft trees. `Engine` and `tree_decoding` check them, `speculative_decoding` only chains.

    Raises:
        ValueError: none of these, or a drafter of trees where only chains are checked.
    """
    if hasattr(draft, "propose_tree") and not trees:
        raise ValueError(
            f"draft {type(draft).__name__} drafts trees, and only chains are checked here. Use Engine, "
            "optinfer.speculative.tree_decoding, or the drafter's chain (PromptLookupDraft, HeadDraft)"
        )
    if isinstance(draft, Draft):
        return draft
    if isinstance(draft, torch.nn.Module):
        return ModelDraft(draft)
    if isinstance(draft, (list, tuple)) and draft:
        return ChainDraft([as_draft(member, trees) for member in draft])
    if isinstance(draft, str) and draft in _NAMED:
        return _NAMED[draft]()
    raise ValueError(f"draft must be a drafter, a model, a list of them, or one of {', '.join(_NAMED)}; got {draft!r}")


def _head() -> Draft:
    from optinfer.speculative.draft_head import HeadDraft

    return HeadDraft.shipped()


_NAMED: dict[DraftName, Callable[[], Draft]] = {
    "prompt_lookup": PromptLookupDraft,
    "head": _head,
    "lookup_then_head": lambda: ChainDraft([PromptLookupDraft(min_ngram=2), _head()]),
    "int8": lambda: QuantizedDraft("int8"),
    "nf4": lambda: QuantizedDraft("nf4"),
}
