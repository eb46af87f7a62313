"""Speculative decoding: a cheap draft guesses several tokens, the target checks them in one pass."""

from optinfer.speculative.decoding import speculative_decoding
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

__all__ = [
    "ChainDraft",
    "Draft",
    "ModelDraft",
    "PromptLookupDraft",
    "Proposal",
    "QuantizedDraft",
    "SelfDraft",
    "SpeculativeOutput",
    "Statistics",
    "TextDraft",
    "break_even_alpha",
    "expected_tokens",
    "greedy_accept",
    "operations",
    "optimal_gamma",
    "output_distribution",
    "rejection_sample",
    "speculative_decoding",
    "speedup",
]
