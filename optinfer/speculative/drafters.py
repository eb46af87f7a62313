"""Who guesses the next tokens: everything that can draft, behind one method, ``propose``.

A drafter sees the text so far and names some tokens that may follow. It can be wrong without harm: the target checks
every token. So a drafter keeps no promise but one: when it draws its tokens at random, it says from which law.
"""

import copy
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.speculative.draft_tree import DraftTree
from optinfer.speculative.rollback import check_can_truncate
from optinfer.speculative.sampler import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optinfer.quantization.schemes import SchemeName


@dataclass
class Proposal:
    """Drafted tokens, int64 [gamma], and the law each was drawn from, [gamma, vocab]; None when none was drawn."""

    tokens: Tensor
    probs: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


class Draft:
    """What the decoder asks of a drafter. Only `propose` must be written."""

    needs_hidden = False  # whether `observe` wants the target's hidden states
    on_host = False  # whether it reads texts on the CPU, wherever the target is
    max_tokens: int | None = None  # more than this is never worth asking for

    def bind(self, target: "PreTrainedModel") -> None:
        """Called once per text, before anything else, with the target model.

        Raises:
            ValueError: this drafter cannot draft for this target.
        """

    def evidence(self, input_ids: Tensor) -> int | None:
        """How many tokens at the end of the text speak for what `propose` would say: more is surer, 0 is nothing.

        None for a drafter that cannot tell without drafting.
        """
        return None

    def propose(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> Proposal:
        """Up to ``num_tokens`` tokens that may follow ``input_ids`` [1, length]; none when it has nothing to say."""
        raise NotImplementedError

    def propose_marked(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> Tensor:
        """The tokens of `propose` on their device, -1 from where they end: the host can wait for those of many texts at once."""
        return self.propose(input_ids, num_tokens, sampler).tokens

    def as_tree(self, marked: list[int]) -> DraftTree:
        """What `propose_marked` said, once it is on the host: a chain, unless the drafter draws trees."""
        return DraftTree.chain(token for token in marked if token >= 0)

    def observe(self, hidden: Tensor) -> None:
        """The target's last hidden states of the tokens that just became final, [1, new, hidden_size]."""

    @property
    def members(self) -> "list[Draft]":
        """The drafters to ask in turn; a chain has several."""
        return [self]


def names(drafts: Sequence[Draft]) -> list[str]:
    """One name for each, no two alike: by these their acceptance is told apart."""
    kinds = [type(draft).__name__ for draft in drafts]
    return [f"{kind} {kinds[:i].count(kind) + 1}" if kind in kinds[:i] else kind for i, kind in enumerate(kinds)]


def context_length(model: "PreTrainedModel") -> int:
    """The longest text that the model's positions are made for, in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


class ModelDraft(Draft):
    """A smaller model with the target's tokenizer, or any model that is cheaper to run.

    Args:
        model: a causal language model over the same vocabulary; None: `bind` makes it of the target.
        min_confidence: stop drafting when the chance that the whole draft survives, by the draft's own reckoning, falls
            below this; 0 drafts to the end.
    """

    def __init__(self, model: "PreTrainedModel | None", min_confidence: float = 0.0):
        self.model: Any = model  # torch takes a module's attributes for tensors
        self.min_confidence = min_confidence

    def bind(self, target: "PreTrainedModel") -> None:
        own, targets = (model.config.get_text_config().vocab_size for model in (self.model, target))
        if own != targets:
            raise ValueError(
                f"the draft's vocabulary has {own} tokens, the target's {targets}: "
                f"their tokenizers differ; use TextDraft(model, tokenizer, target_tokenizer), which drafts through text"
            )
        if self.model.device != target.device:
            raise ValueError(
                f"the draft is on {self.model.device} and the target on {target.device}; move it with draft.to('{target.device}')"
            )
        self._new_text()
        check_can_truncate(self._cache, f"the draft, a {type(self.model).__name__},")

    def _new_text(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)
        self._cached_ids: Tensor | None = None

    def propose(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> Proposal:
        num_tokens = min(num_tokens, context_length(self.model) - input_ids.shape[1] + 1)  # the last one is not run
        if num_tokens < 1:
            return Proposal(input_ids.new_empty(0))
        self._forget_what_was_rejected(input_ids)
        text, tokens, laws, survival = input_ids, [], [], 1.0
        for _ in range(num_tokens):
            new = text[:, self._cache.get_seq_length() :]
            logits = self.model(new, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if self.min_confidence:
                survival *= float(logits.float().softmax(-1).max())
                if survival < self.min_confidence:
                    break
            token, law = sampler.choose(text, logits)
            tokens.append(token)
            laws.append(law)
            text = torch.cat([text, token[:, None]], dim=1)
        self._cached_ids = text[0, : self._cache.get_seq_length()]
        if not tokens:
            return Proposal(input_ids.new_empty(0))
        return Proposal(torch.cat(tokens), None if laws[0] is None else torch.cat(laws))  # type: ignore[arg-type]

    def _forget_what_was_rejected(self, input_ids: Tensor) -> None:
        """Cut the cache back to what it shares with the text; at least one token is left to run."""
        if self._cached_ids is None:
            return
        length = min(len(self._cached_ids), input_ids.shape[1] - 1)
        same = (self._cached_ids[:length] == input_ids[0, :length]).cumprod(0).sum()
        if extra := len(self._cached_ids) - int(same):
            self._cache.crop(-extra)


class QuantizedDraft(ModelDraft):
    """The target itself, quantized: no second model to find, and it agrees nearly always.

    Args:
        scheme: any scheme of `optinfer.quantize`: ``"int8"``, ``"nf4"``, …
        options: passed on to `optinfer.quantize`.
    """

    def __init__(self, scheme: "SchemeName" = "int8", min_confidence: float = 0.0, **options: Any):
        super().__init__(None, min_confidence)
        self.scheme, self.options = scheme, options
        self._source: Any = None

    def bind(self, target: "PreTrainedModel") -> None:
        if self._source is not target:
            from optinfer.quantization import quantize

            shared = {id(p): p for p in (target.get_input_embeddings().weight, target.get_output_embeddings().weight)}
            self.model = quantize(copy.deepcopy(target, memo=shared), self.scheme, **self.options)
            self._source = target
        super().bind(target)


class SelfDraft(ModelDraft):
    """Some of the target's own layers, then its own head. Untrained, the first few layers guess badly.

    Args:
        layers: how many of the first layers, or which ones by index.
    """

    def __init__(self, layers: int | Sequence[int], min_confidence: float = 0.0):
        super().__init__(None, min_confidence)
        self.layers = layers

    def bind(self, target: "PreTrainedModel") -> None:
        total = target.config.num_hidden_layers
        kept = list(range(self.layers)) if isinstance(self.layers, int) else list(self.layers)
        if not kept or not all(0 <= i < total for i in kept):
            raise ValueError(f"layers must name some of the target's {total} layers, got {self.layers!r}")
        self.model = _with_layers(target, kept)
        super().bind(target)


def _with_layers(model: Any, kept: list[int]) -> Any:
    """The same model with only these layers; every weight is shared."""

    def shallow(module: Any) -> Any:
        twin = copy.copy(module)
        twin._modules = dict(module._modules)
        return twin

    twin = shallow(model)
    twin.config = copy.copy(model.config)
    twin.config.num_hidden_layers = len(kept)
    if getattr(twin.config, "layer_types", None):
        twin.config.layer_types = [model.config.layer_types[i] for i in kept]
    twin.model = shallow(model.model)
    twin.model.config = twin.config
    layers = []
    for position, index in enumerate(kept):
        layer = shallow(model.model.layers[index])
        layer.self_attn = shallow(layer.self_attn)
        layer.self_attn.layer_idx = position  # its place in the draft's own cache
        layers.append(layer)
    twin.model.layers = torch.nn.ModuleList(layers)
    return twin


class TextDraft(Draft):
    """A model with a *different* tokenizer: the text is decoded, continued greedily, and encoded again.

    Greedy, because the law of a text over another tokenizer's tokens is not known; a greedy draft needs none.

    Args:
        model: any causal language model.
        tokenizer: the draft's.
        target_tokenizer: the target's.
        window: characters of text that the draft is shown.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        target_tokenizer: "PreTrainedTokenizerBase",
        window: int = 2000,
    ):
        self.model, self.tokenizer, self.target_tokenizer, self.window = model, tokenizer, target_tokenizer, window

    def propose(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> Proposal:
        text = self.target_tokenizer.decode(input_ids[0])[-self.window :]
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(self.model.device)
        ids = ids[:, -max(0, context_length(self.model) - num_tokens) :]
        if not 0 < ids.shape[1] <= context_length(self.model) - num_tokens:
            return Proposal(input_ids.new_empty(0))
        with torch.no_grad():
            longer = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            )
        shown, continued = self.tokenizer.decode(ids[0]), self.tokenizer.decode(longer[0])
        guess = self.target_tokenizer(continued[len(shown) :], add_special_tokens=False).input_ids
        return Proposal(input_ids.new_tensor(guess[:num_tokens]))


class PromptLookupDraft(Draft):
    """The text itself: find where the current n-gram occurred before and copy what followed (Saxena 2023).

    The longest n-gram that occurred counts, and its length is the evidence. Of several places it takes the one where
    reading goes on. A finger under the source starts at the beginning; once a guess came true it stands behind that and
    moves with the text, so a changed word does not lose the place. The first place from the finger on is taken, and the
    latest of all where there is none.

    One matching token is rarely enough to be right, but where a pass over a few more tokens costs little it pays;
    `AdaptiveLength` finds out whether it does.

    Args:
        max_ngram: the longest n-gram tried, first.
        min_ngram: the shortest; 1 drafts more often and is wrong more often. Take 2 where another drafter is asked next
            or where the length is fixed.
    """

    on_host = True

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1):
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"1 <= min_ngram <= max_ngram must hold, got {min_ngram} and {max_ngram}")
        self.sizes = range(max_ngram, min_ngram - 1, -1)
        self._new_text()

    def _new_text(self) -> None:
        self._text: list[int] = []
        self._follows: dict[tuple[int, ...], list[int]] = {}  # n-gram -> where its continuations start, ascending
        self._match = (0, 0)  # of the n-gram at the end of the text: its length, where its continuation starts
        self._finger = 0  # the place in the text that is being copied

    def bind(self, target: "PreTrainedModel") -> None:
        self._new_text()

    def evidence(self, input_ids: Tensor) -> int:
        self._read(input_ids[0].tolist())
        return self._match[0]

    def propose(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> Proposal:
        self._read(input_ids[0].tolist())
        size, start = self._match
        if size == 0:
            return Proposal(input_ids.new_empty(0))
        copied = self._text[start : start + num_tokens]
        while len(copied) < num_tokens:  # the match overlaps the end: the text repeats itself
            copied += self._text[start : start + num_tokens - len(copied)]
        return Proposal(input_ids.new_tensor(copied))

    def _read(self, text: list[int]) -> None:
        """Take in what was added to the text, and find the n-gram at its end."""
        if text == self._text:
            return
        known = len(self._text)
        if text[:known] != self._text:
            self._new_text()
            known = 0
        self._move_finger(text[known:])
        # Index every n-gram that something follows; the one at the very end is what we look for.
        for end in range(max(1, known), len(text)):
            for size in self.sizes:
                if size <= end:
                    self._follows.setdefault(tuple(text[end - size : end]), []).append(end)
        self._text, self._match = text, (0, 0)
        for size in self.sizes:
            if size <= len(text) and (places := self._follows.get(tuple(text[-size:]))):
                self._match = size, self._where_reading_goes_on(places)
                return

    def _move_finger(self, added: list[int]) -> None:
        size, start = self._match
        if size and added[0] == self._text[start]:  # the guess came true
            self._finger = start + len(added)
        elif self._finger:
            self._finger += len(added)

    def _where_reading_goes_on(self, places: list[int]) -> int:
        next_one = bisect_left(places, self._finger)
        return places[next_one] if next_one < len(places) else places[-1]


class ChainDraft(Draft):
    """Several drafters, asked in turn; the first that has something to say drafts. Put the cheap and sure one first."""

    def __init__(self, drafts: Sequence[Draft]):
        if not drafts:
            raise ValueError("a chain needs at least one draft")
        self._members = [member for draft in drafts for member in draft.members]

    @property
    def members(self) -> list[Draft]:
        return self._members

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        return any(member.needs_hidden for member in self._members)
