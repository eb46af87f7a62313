"""Rotary angles by position, computed once."""

from typing import Any

import torch
from torch import Tensor, nn

# Kinds of rotary embedding whose angles depend on nothing but the position. The others ("dynamic", "longrope") change all
# angles when a sequence grows, so the same token has different keys beside a longer neighbour.
BY_POSITION = frozenset({"default", "linear", "llama3", "yarn", "proportional"})


def depends_on_position_alone(rotary: nn.Module) -> bool:
    """Whether a rotary module of transformers gives every position one angle for good."""
    return getattr(rotary, "rope_type", None) in BY_POSITION


class Angles:
    """Cosines and sines [positions, head_dim] of a rotary module, in one dtype; the table grows when it must.

    `positions`: how many at first. A captured CUDA graph goes on reading the table that it saw.
    """

    def __init__(self, rotary: nn.Module, dtype: torch.dtype, device: torch.device, positions: int = 1024):
        self.rotary: Any = rotary  # torch takes a module's attributes for tensors
        self.dtype, self.device, self.positions = dtype, device, positions
        self._source: Any = None
        self._table = torch.empty(2, 0, 0, dtype=dtype, device=device)

    def __call__(self, positions: Tensor, highest: int) -> tuple[Tensor, Tensor]:
        """For positions int64 [tokens], of which `highest` is the largest: cos and sin [tokens, head_dim]."""
        source = self.rotary.inv_freq.data_ptr(), self.rotary.inv_freq._version, self.rotary.attention_scaling
        if highest >= self._table.shape[1] or source != self._source:
            self._source = source
            every = torch.arange(max(self.positions, 2 * highest), device=self.device)[None]
            like = torch.empty(1, dtype=self.dtype, device=self.device)
            self._table = torch.stack([angle[0] for angle in self.rotary(like, every)])
        cos, sin = self._table.index_select(1, positions)
        return cos, sin
