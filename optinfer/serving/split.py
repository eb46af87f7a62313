"""The two ways to split serving over processes, ready to run: a part of the model each, or a part of the work each."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from optinfer.serving.engine import Engine
from optinfer.serving.handover import Blocks, give_blocks, take_blocks
from optinfer.serving.processes import run_in_processes
from optinfer.serving.request import SamplingParams
from optinfer.serving.tensor_parallel import Traffic, shard
from optinfer.serving.watch import without_lookers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Share:
    """What one process of a tensor-parallel engine had: token ids per prompt, parameters and page bytes held, bytes sent, tokens
    and forward passes computed."""

    token_ids: list[list[int]]
    parameters: int
    page_bytes: int
    sent: Traffic
    computed_tokens: int
    logit_rows: int


def serve_in_parts(
    model: "PreTrainedModel", prompts: list[list[int]], max_tokens: int, processes: int = 2, **options: Any
) -> list[Share]:
    """Greedy continuations by `processes` engines in lockstep, each with its part of every matrix and of the KV heads.

    Args:
        model: Llama-like; stays as it is.
        options: of `Engine`; give num_blocks.
    """
    return run_in_processes(_part, processes, without_lookers(model), prompts, max_tokens, options)


def _part(rank: int, processes: int, model: Any, prompts: list[list[int]], max_tokens: int, options: dict) -> Share:
    model = copy.deepcopy(model)  # the parent's is shared memory
    ring = shard(model, rank, processes)
    engine = Engine(model, fuse=False, **options)
    ring.sent = Traffic()  # trying the model out sent something, too
    rows = 0
    run = engine.runner.run

    def counted(chunks: Any, num_logits: list[int], copies: Any = ()) -> Any:
        nonlocal rows
        rows += sum(num_logits)
        return run(chunks, num_logits, copies)

    engine.runner.run = counted  # type: ignore[method-assign]
    done = engine.generate(prompts, SamplingParams(max_tokens=max_tokens))
    held = sum(parameter.numel() for parameter in model.parameters())
    return Share(
        [c.token_ids for c in done], held, engine.runner.pool.nbytes, ring.sent, engine.stats.computed_tokens, rows
    )


@dataclass(frozen=True)
class Handed:
    """What came of prefill and decoding in two processes: token ids per prompt; bytes of blocks handed over; tokens that the
    prefilling and the decoding engine computed."""

    token_ids: list[list[int]]
    handed_bytes: int
    prefill_tokens: int
    decode_tokens: int


def prefill_and_decode(model: "PreTrainedModel", prompts: list[list[int]], max_tokens: int, **options: Any) -> Handed:
    """One process computes the prompts and sends their blocks; another, with pages of its own, writes the continuations."""
    first, second = run_in_processes(_prefill_or_decode, 2, without_lookers(model), prompts, max_tokens, options)
    return Handed(second[0], first[0], first[1], second[1])


def _prefill_or_decode(rank: int, _: int, model: Any, prompts: list[list[int]], max_tokens: int, options: dict) -> Any:
    engine = Engine(model, **options)
    sent = 0
    done = []
    for prompt in prompts:
        if rank == 0:
            engine.generate([prompt], SamplingParams(max_tokens=1))
            blocks = take_blocks(engine, prompt)
            dist.send_object_list(
                [blocks.token_ids, len(blocks.tensors), [(t.dtype, t.shape) for t in blocks.tensors]], dst=1
            )
            for tensor in blocks.tensors:
                dist.send(tensor.contiguous().view(torch.uint8), dst=1)
            sent += blocks.nbytes
        else:
            header: list[Any] = [None] * 3
            dist.recv_object_list(header, src=0)
            tensors = []
            for dtype, shape in header[2]:
                tensor = torch.empty(shape, dtype=dtype)
                dist.recv(tensor.view(torch.uint8), src=0)
                tensors.append(tensor)
            give_blocks(engine, Blocks(header[0], tensors))
            done += engine.generate([prompt], SamplingParams(max_tokens=max_tokens))
    if rank == 0:
        return sent, engine.stats.computed_tokens
    return [c.token_ids for c in done], engine.stats.computed_tokens
