"""From logits to tokens, for drafter and target alike: processors first, then greedy choice or the coin flip."""

from collections.abc import Callable

import torch
from torch import Tensor

from optinfer.speculative.rejection import greedy_accept, rejection_sample


class Sampler:
    """Temperature, filters and penalties (transformers' logits processors) and the random numbers of one text.

    Args:
        processors: called with (text [1, length], logits [1, vocab]), as `generate` does.
        greedy: take the most likely token and flip no coins.
        generator: its random numbers; torch's global ones when None.
    """

    def __init__(
        self,
        processors: Callable[[Tensor, Tensor], Tensor] | None,
        greedy: bool,
        generator: torch.Generator | None = None,
    ):
        self.processors, self.greedy, self.generator = processors, greedy, generator

    def process(self, text: Tensor, logits: Tensor) -> Tensor:
        logits = logits.float()
        return self.processors(text, logits.clone()) if self.processors else logits

    def choose(self, text: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A drafter's next token [1] and the law it was drawn from [1, vocab], None when greedy."""
        logits = self.process(text, logits)
        if self.greedy:
            return logits.argmax(-1), None
        law = logits.softmax(-1)
        return torch.multinomial(law, 1, generator=self.generator).squeeze(1), law

    def accept(self, text: Tensor, drafted: Tensor, law: Tensor | None, logits: Tensor) -> Tensor:
        """What the target makes of a draft: 1 to gamma + 1 tokens.

        Args:
            text: the final text and the draft behind it, [1, length + gamma].
            drafted: [gamma]; ``law``: [gamma, vocab], or None for a deterministic draft.
            logits: the target's, at the end of the text and after each drafted token, [gamma + 1, vocab].
        """
        first = text.shape[1] - len(drafted)  # the processors see the text as it stood at each position
        if self.processors:
            rows = [self.process(text[:, : first + k], row[None]) for k, row in enumerate(logits)]
            logits = torch.cat(rows)
        if self.greedy:
            return greedy_accept(drafted, logits.float().argmax(-1))  # of bfloat16 it takes four times as long on a CPU
        return rejection_sample(drafted, law, logits.float().softmax(-1), self.generator)
