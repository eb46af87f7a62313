"""A decode step of our engine beside llama.cpp's, on the same bits: every format at several batch sizes, in turns."""

from __future__ import annotations

import contextlib
import copy
import random
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from optinfer.bench.rows import QuantizationRow
from optinfer.bench.serving import LlamaCpp, Served, TraceRequest, run_engine, served
from optinfer.bench.worker import environment_of
from optinfer.quantization import quantize
from optinfer.quantization.schemes import SchemeName
from optinfer.serving import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Ours, and llama.cpp's name for as many bits, if it has one. Its 8 and 4 bits include the head: so ours run twice, with the
# head as it was, and with a copy of it in the same format.
FORMATS: dict[SchemeName | Literal["bf16"], str | None] = {
    "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0", "nf4": None,
}  # fmt: skip
BATCHES = (1, 8, 16, 64)
PROMPT, NEW_TOKENS = 16, 40


def beside_llama_cpp(
    model: PreTrainedModel, batches: Sequence[int] = BATCHES, rounds: int = 5
) -> list[QuantizationRow]:
    """Seconds of one step per format, batch size and peer: medians, all peers of a batch taking turns.

    llama.cpp takes part where `OPTINFER_LLAMA_CPP_PYTHON` names the python of its environment.
    """
    python = environment_of("llama.cpp", "OPTINFER_LLAMA_CPP_PYTHON")
    rows = []
    for name, theirs in FORMATS.items():
        own = model if name == "bf16" else quantize(copy.deepcopy(model), name, progress=False)
        with contextlib.ExitStack() as stack:
            peers: dict[str, Callable[[list[TraceRequest]], list[Served]]] = {"optinfer engine": _ours(own)}
            if name != "bf16":
                peers["optinfer engine, head too"] = _ours(own, head=name)
            if python and theirs:
                peer = stack.enter_context(contextlib.closing(LlamaCpp(python, theirs)))
                peers[peer.name] = peer.serve
            for batch in batches:
                taken = _in_turns(peers, _trace(model, batch), rounds)
                rows += [row(name, peer, f"step, batch {batch}", samples) for peer, samples in taken.items()]
    return rows


def _ours(model: PreTrainedModel, head: SchemeName | None = None) -> Callable[[list[TraceRequest]], list[Served]]:
    return lambda trace: served(run_engine(Engine(model, num_blocks=512, head=head), trace))


def _trace(model: Any, batch: int) -> list[TraceRequest]:
    """Prompts that begin with different tokens, so that no cache of prefixes helps."""
    rng, vocabulary = random.Random(batch), model.config.vocab_size
    prompts = [[rng.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(batch)]
    return [TraceRequest(prompt, NEW_TOKENS) for prompt in prompts]


def _in_turns(peers: dict[str, Callable], trace: list[TraceRequest], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds + 1):
        for name, serve in peers.items():
            done = serve(trace)
            if turn:  # the first one warms up
                seconds[name].append(statistics.median(d.tpot for d in done if d.tpot is not None))
    return seconds


def row(variant: str, peer: str, what: str, samples: list[float]) -> QuantizationRow:
    """A row of the suite `quantization`, from the seconds of each run."""
    row = QuantizationRow(variant=variant, peer=peer, what=what, samples=samples)
    row.seconds, row.fastest = statistics.median(samples), min(samples)
    return row
