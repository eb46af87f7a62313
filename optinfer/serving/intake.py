"""From what users hand over to requests: prompts of every kind become token ids, or are refused by name."""

import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from optinfer.serving.request import Request, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One prompt, in whatever form it comes: text, token ids, or a mapping that holds either (see `Intake.read`).
Prompt = str | Sequence[int] | Tensor | np.ndarray | Mapping[str, Any]

# What somebody says in a conversation: {"role", "content"}.
Message = dict[str, Any]

_KEYS = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask"}  # of what tokenizers return
_OURS = ("prompt_token_ids", "prompt")


class Intake:
    """Turns prompts into requests that the engine can serve.

    Args:
        tokenizer: for prompts of text; None: token ids only.
        vocab_size: token ids are below it.
        max_model_len: longest prompt plus output, in tokens.
        num_blocks, block_size: the pages, which must hold the longest request.
        max_num_seqs: most continuations of a prompt.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        vocab_size: int,
        max_model_len: int,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
    ):
        self.tokenizer, self.vocab_size, self.max_model_len = tokenizer, vocab_size, max_model_len
        self.num_blocks, self.block_size, self.max_num_seqs = num_blocks, block_size, max_num_seqs
        self._numbers = itertools.count()

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        arrival: float,
        salt: str = "",
    ) -> Request:
        """A checked request for one prompt.

        Raises ValueError or TypeError: the prompt is empty, of a kind that is not understood, too long for the context or
            for the pages, or holds an unknown token; or other arguments are wrong. The message says which.
        """
        prompts = self.read(prompt)
        if len(prompts) != 1:
            raise ValueError(f"one prompt is wanted here, got {len(prompts)}: use generate for a batch")
        return self.make(prompts[0], params, request_id, arrival=arrival, salt=salt)

    def make(
        self, tokens: list[int], params: SamplingParams | None, request_id: str | None, *, arrival: float, salt: str
    ) -> Request:
        """As `request`, of token ids that `read` returned."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
        if not isinstance(salt, str):
            raise TypeError(f"salt must be a string, got {salt!r}")
        if request_id is None:
            request_id = f"request-{next(self._numbers)}"
        elif not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {request_id!r}")
        self._check_tokens(tokens)
        self._check_fits(tokens, params)
        return Request(request_id, tokens, params, arrival, salt)

    # ------------------------------------------------------------ what a prompt may be

    def read(self, prompts: Prompt | Iterable[Prompt]) -> list[list[int]]:
        """Token ids of each prompt in whatever a user passes for one prompt or several.

        Text, token ids, arrays and tensors of one prompt [length] or several [prompts, length], what a tokenizer returns
        (padding is dropped by its attention mask), {"prompt": text} and {"prompt_token_ids": ids}, and lists of these.
        """
        if isinstance(prompts, str):
            return [self._tokenize(prompts)]
        if isinstance(prompts, Mapping) or hasattr(prompts, "input_ids"):
            return self._read_mapping(prompts)
        if hasattr(prompts, "__array__"):
            return self._read_array(prompts)
        try:
            items = list(prompts)
        except TypeError:
            raise TypeError(f"a prompt must be a string or token ids, got {prompts!r:.80}") from None
        if all(_is_index(item) for item in items):
            return [[operator.index(item) for item in items]]
        if all(isinstance(item, Mapping) and "role" in item for item in items):
            raise TypeError("these are chat messages, not a prompt: use engine.chat(messages)")
        return [self._read_item(i, item) for i, item in enumerate(items)]

    def _read_item(self, i: int, item: Any) -> list[int]:
        if isinstance(item, (int, float)):
            raise TypeError(f"a prompt must be a string or token ids, got {item!r} in place {i} of a list")
        try:
            found = self.read(item)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts[{i}]: {error}") from error
        if len(found) != 1:
            raise ValueError(f"prompts[{i}] holds {len(found)} prompts; a batch within a batch is not taken")
        return found[0]

    def _tokenize(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer; this engine has none: pass token ids")
        return list(self.tokenizer(text)["input_ids"])

    def _read_mapping(self, prompt: Any) -> list[list[int]]:
        fields = prompt if isinstance(prompt, Mapping) else vars(prompt)
        fields = {name: value for name, value in fields.items() if value is not None}
        for name in _OURS:
            if name in fields and len(fields) == 1:
                return self.read(fields[name])
        if set(fields) & {"role", "content"}:
            raise TypeError("this is a chat message, not a prompt: use engine.chat(messages)")
        unknown = sorted(set(fields) - _KEYS)
        if unknown or "input_ids" not in fields:
            raise ValueError(
                f"a prompt with {', '.join(map(str, unknown)) or 'no input_ids'} is not understood: only text is served, "
                "given as input_ids with attention_mask, prompt_token_ids, or prompt"
            )
        ids, mask = _nested(fields["input_ids"]), _nested(fields.get("attention_mask"))
        several = bool(ids) and all(isinstance(row, list) for row in ids)
        rows, masks = (ids, mask) if several else ([ids], mask and [mask])
        if masks and [len(m) for m in masks] != [len(row) for row in rows]:
            raise ValueError("attention_mask must have the shape of input_ids")
        return [self._unpadded(row, masks[i] if masks else None) for i, row in enumerate(rows)]

    @staticmethod
    def _unpadded(row: list[int], mask: list[int] | None) -> list[int]:
        if mask is None:
            return [operator.index(token) for token in row]
        kept = [i for i, seen in enumerate(mask) if seen]
        if kept and kept != list(range(kept[0], kept[-1] + 1)):
            raise ValueError(
                "attention_mask hides tokens in the middle of a prompt; only padding at its ends is understood"
            )
        return [operator.index(row[i]) for i in kept]

    def _read_array(self, array: Any) -> list[list[int]]:
        rows: list[list[Any]] = _nested(array) if array.ndim == 2 else [_nested(array)] if array.ndim == 1 else [[None]]
        if not all(_is_index(token) for row in rows for token in row):
            raise TypeError(
                f"a prompt must be a string or token ids; as an array [length] or [prompts, length] of integers, got "
                f"{list(array.shape)} of {array.dtype}"
            )
        padding: int | None = getattr(self.tokenizer, "pad_token_id", None)
        if padding is not None and padding != getattr(self.tokenizer, "eos_token_id", None):
            for row in rows:
                if len(rows) > 1 and row and padding in (row[0], row[-1]):
                    raise ValueError(
                        f"a row begins or ends with padding (token {padding}); pass what the tokenizer returned, with its "
                        "attention_mask, or lists of different lengths"
                    )
        return [[operator.index(token) for token in row] for row in rows]

    # ------------------------------------------------------------ what a request must fulfil

    def _check_tokens(self, tokens: list[int]) -> None:
        if not tokens:
            raise ValueError("the prompt is empty; it needs at least one token")
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is not in the vocabulary, 0 to {self.vocab_size - 1}")

    def _check_fits(self, tokens: list[int], params: SamplingParams) -> None:
        if len(tokens) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; the context of {self.max_model_len} must hold it and one more"
            )
        most = min(len(tokens) + params.max_tokens - 1, self.max_model_len)  # the last token is never computed
        if math.ceil(most / self.block_size) > self.num_blocks:
            raise ValueError(
                f"prompt and output take up to {most} tokens, and all pages together hold "
                f"{self.num_blocks * self.block_size}: shorten the prompt, lower max_tokens={params.max_tokens}, or give the "
                "engine more blocks"
            )
        if params.n > self.max_num_seqs:
            raise ValueError(f"n={params.n} is more than max_num_seqs={self.max_num_seqs}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; this engine has none: use stop_token_ids")


def _is_index(value: Any) -> bool:
    return hasattr(type(value), "__index__") and not isinstance(value, bool) and not getattr(value, "ndim", 0)


def _nested(array: Any) -> Any:
    """Lists of what lists, tuples, arrays or tensors hold; None of None."""
    if array is None:
        return None
    if hasattr(array, "tolist"):
        return array.tolist()
    return [_nested(item) if hasattr(item, "tolist") or isinstance(item, (list, tuple)) else item for item in array]
