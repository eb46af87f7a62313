"""How fast it is: the suites' cases one by one, so that what was measured stays when the rest is cut."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from optinfer import hardware
from optinfer.bench import attention as attention_suite
from optinfer.bench import paged_attention as paged_suite
from optinfer.bench import quantized_matmul as quantized_suite
from optinfer.bench import random_model
from optinfer.bench import serving as serving_suite
from optinfer.bench import speculative as speculative_suite
from optinfer.bench.gpu_day import tiles
from optinfer.bench.rows import AttentionRow, PagedAttentionRow, QuantizedMatmulRow, ServingRow, SpeculativeRow, TileRow
from optinfer.bench.timing import in_turns, one_after_another


def attention(tiny: bool) -> Iterator[AttentionRow]:
    """Long texts first: they are what the kernels are for."""
    device = hardware.default_device()
    dtype = hardware.default_dtype(device)
    long_first = sorted(attention_suite.problems(device, False), key=lambda p: (-p["head_dim"], p["q_len"] != 4096))
    cases = [attention_suite.problem(1, 2, 2, 64, 64, 64, True)] if tiny else long_first
    for sizes in cases:
        yield from attention_suite.compare(sizes, device, dtype, repeats=2 if tiny else 11)
    yield from [] if tiny else attention_suite.memory_rows(device, dtype, False)


def paged_attention(tiny: bool) -> Iterator[PagedAttentionRow]:
    device = hardware.default_device()
    dtype = hardware.default_dtype(device)
    for batch, context in [(2, 40)] if tiny else [(64, 4096), (1, 131_072), (16, 1024), (1, 2048), (128, 4096)]:
        yield from paged_suite.measure(batch, context, dtype, device)


def quantized_matmul(tiny: bool, out_features: int, in_features: int) -> Iterator[QuantizedMatmulRow]:
    device = hardware.default_device()
    copy = quantized_suite.copy_row(device)
    yield copy
    shape = (128, 256) if tiny else (out_features, in_features)
    for tokens in (1,) if tiny else (1, 16, 4, 64, 8, 32, 2, 128):
        yield from quantized_suite.compare(*shape, tokens, device, copy, tiny, 2 if tiny else None)


def serving(tiny: bool) -> Iterator[ServingRow]:
    """A model of random weights: what it says is noise, how long it takes is not."""
    device = hardware.default_device()
    name = "small" if tiny else "Mistral-7B"
    model = random_model.random_model(name, "bf16", device)
    for requests, rounds in ((2, 1),) if tiny else ((16, 2), (64, 1)):
        trace = _trace(model, requests, longest=9 if tiny else 96)
        for row in serving_suite.throughput(model, trace, rounds):
            yield replace(row, model=f"{name}, random weights")


def _trace(model: Any, requests: int, longest: int) -> list[serving_suite.TraceRequest]:
    rng = random.Random(0)
    trace = []
    for _ in range(requests):
        prompt = [rng.randrange(3, model.config.vocab_size) for _ in range(rng.randint(4, 4 * longest))]
        trace.append(serving_suite.TraceRequest(prompt, rng.randint(8, longest)))
    return trace


def speculative(tiny: bool) -> Iterator[SpeculativeRow]:
    """What a pass over several tokens costs, and what drafts of a known quality gain."""
    from transformers import BatchEncoding

    device = hardware.default_device()
    name = "small" if tiny else "Mistral-7B"
    model = random_model.random_model(name, "bf16", device)
    widths, repeats = ((1, 4), 1) if tiny else ((1, 2, 3, 4, 5, 6, 8, 11, 16), 9)
    curve = speculative_suite.verify_curve(model, widths, context=16 if tiny else 128, repeats=repeats)
    for row in speculative_suite.verify_rows(model, curve):
        yield replace(row, model=f"{name}, random weights")
    ids = torch.randint(3, model.config.vocab_size, (1, 16 if tiny else 128), device=device)
    inputs = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    grid: dict[str, Any] = (
        {"accuracies": (1.0,), "lengths": (3,), "new_tokens": 8}
        if tiny
        else {"accuracies": (0.5, 0.8, 1.0), "lengths": (3, 5)}
    )
    for row in speculative_suite.trade_off(model, inputs, **grid):
        yield replace(row, model=f"{name}, random weights")


def whole_model(tiny: bool, name: str, variant: str) -> Iterator[QuantizedMatmulRow]:
    """Memory and time per token of a whole model; memory also as the allocator counted it."""
    device = hardware.default_device()
    name = "small" if tiny else name
    row, allocated = QuantizedMatmulRow(), 0
    try:
        model = random_model.random_model(name, variant, device)
        if device.type == "cuda":
            allocated = torch.cuda.memory_allocated()
        row = random_model.measure(model, device, repeats=2 if tiny else 21)
        if device.type == "cuda":
            row.peak_bytes = torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        row.skipped = "does not fit this GPU"
    yield replace(row, peer=f"optinfer {variant}", model=name, allocated_bytes=allocated or None)


def attention_tiles(tiny: bool) -> Iterator[TileRow]:
    """Every plausible tile of every attention kernel, each checked against the formula; the one in use among them."""
    yield from tiles.attention(tiny, _seconds)


def quantized_tiles(tiny: bool) -> Iterator[TileRow]:
    yield from tiles.quantized(tiny, _seconds)


def _seconds(call: Any, tiny: bool) -> float:
    device = hardware.default_device()
    samples = in_turns({"": one_after_another([call] * 4, device)}, device, 2 if tiny else 11)[""]
    return statistics.median(samples) / 4
