"""From logits to tokens, for drafter and target alike: processors first, then greedy choice or the coin flip."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from optinfer.speculative.rejection import rejection_sample

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

# Processors of transformers that answer from text and logits alone, however often they are asked.
_WITHOUT_MEMORY = frozenset(
    getattr(logits_process, name)
    for name in (
        "EpsilonLogitsWarper", "EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper", "NoBadWordsLogitsProcessor", "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper",
    )
    if hasattr(logits_process, name)
)  # fmt: skip


class Sampler:
    """Temperature, filters and penalties (transformers' logits processors) and the random numbers of one text.

    A processor may remember what it was asked (one that counts its calls, `guidance_scale` with its own cache). So all
    but those known to remember nothing are asked exactly as in plain decoding: once per emitted token, in order, and
    never for a draft.

    Args:
        processors: called with (text [1, length], logits [1, vocab]), as `generate` does.
        greedy: take the most likely token and flip no coins.
        generator: its random numbers; torch's global ones when None.
    """

    def __init__(
        self,
        processors: "LogitsProcessorList | Callable[[Tensor, Tensor], Tensor] | None",
        greedy: bool,
        generator: torch.Generator | None = None,
    ):
        self.processors: Any = processors  # transformers asks for kinds of tensors that torch does not make
        self.greedy, self.generator = greedy, generator
        self.in_turn = bool(processors) and not _without_memory(processors)

    @property
    def drafts_greedily(self) -> bool:
        """Whether drafters take their likeliest token: the law they would have to draw from may not be asked for."""
        return self.greedy or self.in_turn

    def process(self, text: Tensor, logits: Tensor) -> Tensor:
        logits = logits.float()
        return self.processors(text, logits.clone()) if self.processors else logits

    def choose(self, text: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A drafter's next token [1] and the law it was drawn from [1, vocab], None when greedy."""
        if self.in_turn:
            return logits.argmax(-1), None
        logits = self.process(text, logits)
        if self.greedy:
            return logits.argmax(-1), None
        law = logits.softmax(-1)
        return torch.multinomial(law, 1, generator=self.generator).squeeze(1), law

    def accept(self, text: Tensor, drafted: Tensor, law: Tensor | None, logits: Tensor) -> Tensor:
        """What the target makes of a draft: 1 to gamma + 1 tokens, int64 [gamma + 1], followed by -1. Nobody waits for them,
        but where processors must be asked in turn.

        Args:
            text: the final text and the draft behind it, [1, length + gamma].
            drafted: [gamma]; ``law``: [gamma, vocab], or None for a deterministic draft.
            logits: the target's, at the end of the text and after each drafted token, [gamma + 1, vocab].
        """
        if self.in_turn:
            return self._accept_in_turn(text, drafted, law, logits)
        first = text.shape[1] - len(drafted)  # the processors see the text as it stood at each position
        if self.processors:
            rows = [self.process(text[:, : first + k], row[None]) for k, row in enumerate(logits)]
            logits = torch.cat(rows)
        return self._accept(drafted, law, logits)

    def _accept_in_turn(self, text: Tensor, drafted: Tensor, law: Tensor | None, logits: Tensor) -> Tensor:
        """One position at a time: the processors are not asked about a position that is never reached."""
        first, emitted = text.shape[1] - len(drafted), []
        for k, row in enumerate(logits):
            one, row = drafted[k : k + 1], self.process(text[:, : first + k], row[None])
            said = self._accept(one, None if law is None else law[k : k + 1], row.expand(len(one) + 1, -1))
            emitted.append(said[:1])
            if len(said) == 1 or bool(said[1] < 0):  # nothing was drafted here, or rejected
                break
        return torch.nn.functional.pad(torch.cat(emitted), (0, len(logits) - len(emitted)), value=-1)

    def _accept(self, drafted: Tensor, law: Tensor | None, logits: Tensor) -> Tensor:
        if self.greedy:
            says = logits.float().argmax(-1)  # of bfloat16 it takes four times as long on a CPU
            agreed = torch.nn.functional.pad(
                (drafted == says[:-1]).cumprod(-1), (1, 0), value=1
            )  # all before it were right
            return torch.where(agreed > 0, says, -1)
        law = None if law is None else law[None]
        return rejection_sample(drafted[None], law, logits.float().softmax(-1)[None], self.generator)[0]


def _without_memory(processors: Any) -> bool:
    return isinstance(processors, Iterable) and all(type(one) in _WITHOUT_MEMORY for one in processors)
