"""A tree of drafted tokens: several guesses for the same place. A chain is a tree of one branch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class DraftTree:
    """Drafted tokens, each behind its parent; parent -1 is the newest token of the text.

    Raises ValueError: a node stands before its parent, or two children of one parent are the same token.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise ValueError(f"{len(self.tokens)} tokens have {len(self.parents)} parents")
        if any(not -1 <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError(f"every node must stand behind its parent, got parents {self.parents}")
        if len(set(zip(self.parents, self.tokens))) < len(self.tokens):
            raise ValueError("two children of one parent are the same token")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_chains(cls, chains: Iterable[Sequence[int]], most: int | None = None) -> "DraftTree":
        """Several continuations, shared where they begin alike; at most `most` nodes, the first chains first."""
        tree = cls()
        known: dict[tuple[int, int], int] = {}
        for chain in chains:
            at = -1
            for token in chain:
                if (at, token) not in known:
                    if len(tree) == most:
                        break
                    known[at, token] = len(tree)
                    tree.tokens.append(token)
                    tree.parents.append(at)
                at = known[at, token]
        return tree

    @classmethod
    def chain(cls, tokens: Iterable[int]) -> "DraftTree":
        """Each token behind the one before it."""
        tokens = list(tokens)
        return cls(tokens, list(range(-1, len(tokens) - 1)))

    def first(self, nodes: int) -> "DraftTree":
        """The tree of the first nodes; itself where it has no more."""
        return self if len(self) <= nodes else DraftTree(self.tokens[:nodes], self.parents[:nodes])

    @property
    def branches(self) -> bool:
        """Whether it is more than a chain."""
        return self.parents != list(range(-1, len(self) - 1))

    @property
    def depths(self) -> list[int]:
        """1 for a child of the text's newest token."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def children(self, node: int) -> dict[int, int]:
        """Of a node, or of -1: token -> child."""
        return {self.tokens[i]: i for i, parent in enumerate(self.parents) if parent == node}

    def mask(self) -> Tensor:
        """Whom the newest token (row 0) and each node see, ancestors and oneself: bool [1 + nodes, 1 + nodes], on the CPU."""
        seen = torch.eye(len(self) + 1, dtype=torch.bool, device="cpu")
        for node, parent in enumerate(self.parents):
            seen[node + 1] |= seen[parent + 1]
        return seen
