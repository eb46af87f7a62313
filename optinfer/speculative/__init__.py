"""Speculative decoding: a cheap draft guesses several tokens, the target checks them in one pass."""

from optinfer.speculative.by_name import as_draft
from optinfer.speculative.decoding import speculative_decoding
from optinfer.speculative.draft_tree import DraftTree
from optinfer.speculative.drafters import (
    ChainDraft,
    Draft,
    ModelDraft,
    PromptLookupDraft,
    Proposal,
    QuantizedDraft,
    SelfDraft,
    TextDraft,
)
from optinfer.speculative.rejection import greedy_accept, output_distribution, rejection_sample
from optinfer.speculative.statistics import SpeculativeOutput, Statistics
from optinfer.speculative.theory import (
    break_even_alpha,
    expected_tokens,
    operations,
    optimal_gamma,
    speedup,
)
from optinfer.speculative.tree import (
    HeadTree,
    LookupTree,
    TreeDraft,
    TreeOutput,
    accept_drawn,
    accept_path,
    drawn_law,
    tree_decoding,
)

__all__ = [
    "ChainDraft",
    "Draft",
    "DraftTree",
    "HeadTree",
    "LookupTree",
    "ModelDraft",
    "PromptLookupDraft",
    "Proposal",
    "QuantizedDraft",
    "SelfDraft",
    "SpeculativeOutput",
    "Statistics",
    "TextDraft",
    "TreeDraft",
    "TreeOutput",
    "accept_drawn",
    "accept_path",
    "as_draft",
    "break_even_alpha",
    "drawn_law",
    "expected_tokens",
    "greedy_accept",
    "operations",
    "optimal_gamma",
    "output_distribution",
    "rejection_sample",
    "speculative_decoding",
    "speedup",
    "tree_decoding",
]
