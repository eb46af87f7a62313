"""Draft trees: several guesses for the same place, checked in one pass (SpecInfer, arXiv:2305.09781; Medusa; EAGLE-2).

A chain stops at its first wrong token. A tree holds second choices: where the first is wrong, the second may be right. All
nodes go through the target at once; a mask lets each see the text and its own ancestors, and nothing else.

Whatever the tree, the law of the text is the target's. Where children were *chosen* (looked up, or a draft's likeliest), the
target draws its token, and a child of that name is walked to. Where they were *drawn* from a law q without replacement, each is
tried in turn with the coin of `rejection`, p giving up after each refusal what q had proposed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.speculative.draft_head import DraftHead, HeadDraft
from optinfer.speculative.draft_tree import DraftTree
from optinfer.speculative.drafters import Draft, PromptLookupDraft
from optinfer.speculative.rejection import residual_distribution
from optinfer.speculative.sampler import Sampler
from optinfer.upload import upload

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# ---------------------------------------------------------------------------------------------- acceptance


def accept_path(tree: DraftTree, target_tokens: Sequence[int]) -> tuple[list[int], int]:
    """Walk down while the target's own tokens have a node.

    Args:
        target_tokens: what the target says behind the newest token and behind each node, [1 + nodes]; greedy or drawn.

    Returns: the nodes on the way, and the token behind the last of them, which the target adds.
    """
    path, at = [], -1
    while (child := tree.children(at).get(int(target_tokens[at + 1]))) is not None:
        path.append(child)
        at = child
    return path, int(target_tokens[at + 1])


def accept_drawn(
    candidates: Sequence[int], draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator | None = None
) -> tuple[int, int | None]:
    """Try children that were drawn from q without replacement, in their order.

    Args:
        candidates: distinct tokens; `draft_probs`: q, `target_probs`: p, both [vocab].

    Returns: the token to emit, and the place of the child it is, or None where all were refused.
    """
    p, q = target_probs, draft_probs
    for place, token in enumerate(candidates):
        if float(torch.rand((), dtype=p.dtype, generator=generator)) < _chance(p[token], q[token]):
            return token, place
        p = residual_distribution(q, p)
        q = _without(q, token)
    return int(torch.multinomial(p, 1, generator=generator)), None


def drawn_law(draft_probs: Tensor, target_probs: Tensor, width: int) -> Tensor:
    """The exact law of what `accept_drawn` emits, all draws and coins enumerated; [vocab]. It is p."""
    law = torch.zeros_like(target_probs)
    names = [i for i, x in enumerate(draft_probs.tolist()) if x > 0]
    for drawn in permutations(names, min(width, len(names))):
        chance, p, q = torch.ones((), dtype=law.dtype), target_probs, draft_probs
        ways = torch.ones((), dtype=law.dtype)  # of drawing them in this order
        left = draft_probs
        for token in drawn:
            ways = ways * left[token]
            left = _without(left, token)
        for token in drawn:
            coin = _chance(p[token], q[token])
            law[token] += ways * chance * coin
            chance = chance * (1 - coin)
            p, q = residual_distribution(q, p), _without(q, token)
        law += ways * chance * p
    return law


def _chance(p: Tensor, q: Tensor) -> float:
    return min(1.0, float(p) / float(q)) if q > 0 else float(p > 0)


def _without(q: Tensor, token: int) -> Tensor:
    rest = q.clone()
    rest[token] = 0
    return rest / rest.sum() if rest.any() else rest


# ---------------------------------------------------------------------------------------------- who drafts trees


class TreeDraft(Draft):
    """A drafter of trees. Only `propose_tree` must be written."""

    def propose_tree(self, input_ids: Tensor, num_tokens: int | None = None) -> DraftTree:
        """What may follow `input_ids` [1, length]; no branch is longer than `num_tokens`, None: than the drafter likes."""
        raise NotImplementedError

    def propose_marked(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> Tensor:
        """The tokens of all nodes, a negative one where they end, then as many parents."""
        tree = self.propose_tree(input_ids, num_tokens)
        return input_ids.new_tensor([*tree.tokens, *tree.parents], dtype=torch.long)

    def as_tree(self, marked: list[int]) -> DraftTree:
        tokens, parents = marked[: len(marked) // 2], marked[len(marked) // 2 :]
        end = next((i for i, token in enumerate(tokens) if token < 0), len(tokens))
        return DraftTree(tokens[:end], parents[:end])


class LookupTree(TreeDraft, PromptLookupDraft):
    """What followed the last words before, at several places.

    Args:
        width: most places; `depth`: tokens from each; `most`: nodes in all.
    """

    def __init__(self, width: int = 4, depth: int = 6, most: int = 16, **options: Any):
        super().__init__(**options)
        self.width, self.depth, self.most = width, depth, most

    def propose_tree(self, input_ids: Tensor, num_tokens: int | None = None) -> DraftTree:
        text = input_ids[0].tolist()
        self._read(text)
        size, first = self._match
        if size == 0:
            return DraftTree()
        depth = self.depth if num_tokens is None else min(self.depth, num_tokens)
        places = self._follows[tuple(text[-size:])]
        order = [first, *(place for place in reversed(places) if place != first)]
        return DraftTree.of_chains((text[place : place + depth] for place in order[: self.width]), self.most)


class HeadTree(TreeDraft, HeadDraft):
    """The trained head's chain, and at each of its tokens the next likeliest beside it: a comb, level by level.

    Args:
        width: tokens per place, the chain's own included; 1 is the chain.
        depth: of the chain.
        min_confidence: as of `HeadDraft`.
    """

    def __init__(self, head: DraftHead, width: int = 3, depth: int = 4, min_confidence: float = 0.15):
        super().__init__(head, min_confidence)
        self.width, self.depth = width, depth

    @classmethod
    def shipped(cls, width: int = 3, depth: int = 4) -> "HeadTree":
        return cls(HeadDraft.shipped().head, width, depth)

    def propose_tree(self, input_ids: Tensor, num_tokens: int | None = None) -> DraftTree:
        depth = self.depth if num_tokens is None else num_tokens
        return self.as_tree(self.propose_marked(input_ids, depth, Sampler(None, greedy=True)).tolist())

    def propose_marked(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> Tensor:
        self._levels: list[Tensor] = []  # of each place the likeliest tokens, the chain's own first
        chain, _, sure = self._draft(input_ids, min(self.depth, num_tokens), Sampler(None, greedy=True))
        if len(chain) == 0:
            return chain
        tokens = torch.stack(self._levels).masked_fill(~sure[:, None], -1)
        parents = [level * self.width if level >= 0 else -1 for level in range(-1, len(chain) - 1)]
        behind = upload(parents, tokens.device)[:, None].expand_as(tokens)
        return torch.cat([tokens.flatten(), behind.flatten()])

    def _choose(self, text: Tensor, logits: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor | None]:
        self._levels.append(self.head.vocabulary[logits[0].topk(self.width).indices])
        return self._levels[-1][:1], None


# ---------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class TreeOutput:
    """Token ids [1, length]; of each pass the nodes it checked, and the tokens it brought."""

    sequences: Tensor
    nodes: list[int]
    emitted: list[int]

    @property
    def tokens_per_pass(self) -> float:
        """Mean over the passes that had a tree to check."""
        counted = [e for n, e in zip(self.nodes, self.emitted) if n]
        return sum(counted) / max(len(counted), 1)


@torch.no_grad()
def tree_decoding(
    model: "PreTrainedModel",
    input_ids: Tensor,
    draft: TreeDraft,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> TreeOutput:
    """Continue a text with draft trees; the law of the output is the model's.

    Args:
        model: a decoder of transformers of full attention whose `attn_implementation` takes masks ("sdpa", "eager").
        input_ids: [1, length].
        draft: `LookupTree`, `HeadTree`, or anything with their methods.
        temperature: 0 is greedy.

    Raises ValueError: more than one text, or a layer of the model's cache cannot leave out rejected tokens.
    """
    from transformers import DynamicCache

    if input_ids.shape[0] != 1:
        raise ValueError(f"trees are decoded for one text at a time, got {input_ids.shape[0]}")
    cache = DynamicCache(config=model.config)
    if kinds := {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer"}:
        raise ValueError(f"a {kinds.pop()} cannot leave out rejected tokens")
    draft.bind(model)
    eos = getattr(model.generation_config, "eos_token_id", None)
    ends = set(eos if isinstance(eos, list) else [eos])
    text, nodes, emitted = input_ids, [], []
    while (room := input_ids.shape[1] + max_new_tokens - text.shape[1]) > 0:
        tree = draft.propose_tree(text) if cache.get_seq_length() else DraftTree()
        logits, hidden = _check(model, text, tree, cache)
        if temperature == 0:
            says = logits.float().argmax(-1)
        else:
            says = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
        path, last = accept_path(tree, says.tolist())
        new = [*(tree.tokens[node] for node in path), last][:room]
        new = new[: next((i + 1 for i, token in enumerate(new) if token in ends), len(new))]
        before = text.shape[1]
        _keep(cache, before, path[: len(new) - 1])
        rows = hidden.shape[1] - len(tree)  # the text's, then the nodes'
        kept = torch.tensor([*range(rows), *(rows + node for node in path[: len(new) - 1])], device=hidden.device)
        draft.observe(hidden[:, kept])
        text = torch.cat([text, text.new_tensor([new])], 1)
        nodes.append(len(tree))
        emitted.append(len(new))
        if new[-1] in ends:
            break
    return TreeOutput(text, nodes, emitted)


def _check(model: Any, text: Tensor, tree: DraftTree, cache: Any) -> tuple[Tensor, Tensor]:
    """Logits behind the text's newest token and behind each node, [1 + nodes, vocab], and hidden states of all that ran."""
    cached = cache.get_seq_length()
    new = torch.cat([text[:, cached:], text.new_tensor([tree.tokens], dtype=torch.long)], 1)
    rows, width = new.shape[1], cached + new.shape[1]
    newest = text.shape[1] - 1
    seen = torch.ones(rows, width, dtype=torch.bool).tril(cached)
    seen[-1 - len(tree) :, newest:] = tree.mask()
    positions = [*range(cached, text.shape[1]), *(newest + depth for depth in tree.depths)]
    least = torch.finfo(model.dtype).min
    mask = torch.zeros(1, 1, rows, width, dtype=model.dtype).masked_fill(~seen, least).to(text.device)
    out = model(
        new, attention_mask=mask, position_ids=text.new_tensor([positions]), past_key_values=cache, use_cache=True,
        logits_to_keep=len(tree) + 1, output_hidden_states=True,
    )  # fmt: skip
    return out.logits[0], out.hidden_states[-1]


def _keep(cache: Any, length: int, path: list[int]) -> None:
    """Of the cache, the text's `length` tokens and the nodes on the path, in their order."""
    kept = torch.tensor([*range(length), *(length + node for node in path)], device=cache.layers[0].keys.device)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(2, kept), layer.values.index_select(2, kept)
