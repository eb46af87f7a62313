"""Timing that can be believed: peers in turns, buffers past the caches, launches out of the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from optinfer import noise

ROTATED_BYTES = 256 << 20  # more than any last-level cache: what is read again has been evicted meanwhile


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """One run: by the GPU's own events, or by the clock on a CPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def in_turns(
    calls: dict[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Samples in seconds per peer. Peers take turns, so that whatever disturbs the machine disturbs all alike.

    Where a peer's samples disagree, all have some more turns.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + noise.PATIENCE * repeats):
        if turn >= warmup + repeats and all(noise.Timing(tuple(own)).believable for own in samples.values()):
            break
        for name, call in calls.items():
            seconds = seconds_of(call, device)
            if turn >= warmup:
                samples[name].append(seconds)
    return samples


def copies_past_the_cache(nbytes: int) -> int:
    """How many buffers of this size to use in turn, so that each is read from memory every time."""
    return max(1, -(-ROTATED_BYTES // nbytes))


def one_after_another(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], None]:
    """All calls as one: on a GPU recorded in a CUDA graph, which replays them without a launch from Python each."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # compiles, allocates, chooses algorithms: nothing of that may happen while recording
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
