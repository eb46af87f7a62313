"""Which of several engines a request goes to: to the one that knows the longest part of its prompt already.

Engines do not share pages. Requests that begin alike and land on different engines are computed twice, and both keep a copy.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from optinfer.serving.request import Completion, SamplingParams

if TYPE_CHECKING:
    from optinfer.serving.engine import Engine
    from optinfer.serving.traffic import Rehearsal

Routing = Literal["prefix", "load", "turns"]


class Router:
    """Several engines behind one front; add requests, then `step`, as with one.

    Args:
        engines: each an `Engine` of the same model, or each a `Rehearsal`.
        policy: "prefix": the engine that holds most of the prompt, and of equals the one with least to do; "load": the one
            with least to do; "turns": one after the other.
        max_imbalance: with "prefix", an engine that has so many tokens more to compute than the idlest is passed over:
            a popular prefix must not drown one engine while the others wait.

    Raises ValueError: no engine, or another policy.
    """

    def __init__(self, engines: "Sequence[Engine | Rehearsal]", policy: Routing = "prefix", max_imbalance: int = 2048):
        self.engines: list[Engine | Rehearsal] = list(engines)
        choices: dict[Routing, Callable[[list[int]], int]] = {
            "prefix": self._by_prefix, "load": self._by_load, "turns": self._by_turns,
        }  # fmt: skip
        if not self.engines:
            raise ValueError("a router needs at least one engine")
        if policy not in choices:
            raise ValueError(f"policy must be one of {', '.join(choices)}, got {policy!r}")
        self._choose, self.max_imbalance = choices[policy], max_imbalance
        self._turns = itertools.cycle(range(len(self.engines)))
        self.assigned: list[int] = []  # the engine of each request, in their order

    def add_request(self, token_ids: list[int], params: SamplingParams | None = None, **options: Any) -> str:
        """As `Engine.add_request`, for a prompt of token ids."""
        index = self._choose(token_ids)
        number = len(self.assigned)
        name = options.pop("request_id", None) or f"routed-{number}"
        self.engines[index].add_request(token_ids, params, name, **options)
        self.assigned.append(index)
        return name

    def step(self) -> list[Completion]:
        """One step of each engine that has work."""
        return [done for engine in self.engines if engine.has_work for done in engine.step()]

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    def load(self, index: int) -> int:
        """Tokens that an engine has still to compute or to generate."""
        scheduler = self.engines[index].scheduler
        return sum(
            s.num_uncomputed + s.request.params.max_tokens - len(s.output_ids)
            for s in (*scheduler.waiting, *scheduler.running)
        )

    def _by_prefix(self, token_ids: list[int]) -> int:
        loads = [self.load(i) for i in range(len(self.engines))]
        open_to = [i for i, load in enumerate(loads) if load - min(loads) <= self.max_imbalance]
        return max(open_to, key=lambda i: (self._known(i, token_ids), -loads[i]))

    def _known(self, index: int, token_ids: list[int]) -> int:
        """Leading tokens of the prompt that an engine has in its pages, or will have: of requests that still wait, too."""
        engine = self.engines[index]
        longest = engine.manager.num_cached_tokens(token_ids)
        for sequence in (*engine.scheduler.waiting, *engine.scheduler.running):
            pairs = zip(sequence.request.prompt_token_ids, token_ids)
            common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            longest = max(longest, common - common % engine.manager.block_size)
        return longest

    def _by_load(self, token_ids: list[int]) -> int:
        return min(range(len(self.engines)), key=self.load)

    def _by_turns(self, token_ids: list[int]) -> int:
        return next(self._turns)
