"""Decode steps as CUDA graphs: the thousand launches of a small model's step become one.

A graph repeats the same kernels on the same addresses, so its shapes are fixed. Steps in which every sequence computes
one token are padded to a batch size; block tables always have room for the longest context. Padding sequences write to
a scratch block that no request owns, and their logits are dropped. Each size is captured when it is first met.

Not measured: no figure of this course comes from this path yet.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from optinfer.kv_cache.attention import Backend
from optinfer.kv_cache.pool import KVPool
from optinfer.serving.paged_batch import Chunk, PagedBatch


class Graph(Protocol):
    """A computation that was captured."""

    def replay(self) -> Tensor:
        """Run it again on what its input tensors hold by then; returns its output, the same tensor each time."""
        ...


class CudaGraph:
    """A `Graph` of CUDA."""

    def __init__(self, compute: Callable[[], Tensor]):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside of the capture: kernels are compiled, workspaces allocated
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = compute()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._output


class GraphedDecode:
    """Runs decode steps from captured graphs.

    Args:
        pool: with one block more than the block manager knows; the last one is the scratch block.
        forward: a packed batch's logits.
        max_length: longest context in tokens.
        max_size: largest batch; larger ones are not captured.
        backend: of `paged_attention`.
        capture: makes a graph of a computation.
    """

    def __init__(
        self,
        pool: KVPool,
        forward: Callable[[PagedBatch], Tensor],
        max_length: int,
        max_size: int = 64,
        backend: Backend = "auto",
        capture: Callable[[Callable[[], Tensor]], Graph] = CudaGraph,
    ):
        self.pool, self.forward, self.backend, self.capture = pool, forward, backend, capture
        self.sizes = batch_sizes(max_size)
        self.table_width = min(-(-max_length // pool.block_size), pool.num_blocks)
        self.padding = Chunk([0], 0, [pool.num_blocks - 1])
        self._graphs: dict[int, tuple[PagedBatch, Graph]] = {}

    def takes(self, chunks: list[Chunk], num_logits: list[int]) -> bool:
        """Whether the step is one token of each of not too many sequences."""
        small = len(chunks) <= self.sizes[-1]
        return small and all(len(c.token_ids) == 1 for c in chunks) and all(n == 1 for n in num_logits)

    def run(self, chunks: list[Chunk]) -> Tensor:
        """The logits [chunks, vocabulary]; valid until the next run."""
        size = self.sizes[bisect_left(self.sizes, len(chunks))]
        padded = chunks + [self.padding] * (size - len(chunks))
        batch = PagedBatch(padded, [1] * size, self.pool, self.backend, self.table_width)
        if size not in self._graphs:
            self._graphs[size] = batch, self.capture(lambda: self.forward(batch))
        static, graph = self._graphs[size]
        if static is not batch:
            static.take_over(batch)
        return graph.replay()[: len(chunks)]


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, then multiples of 8: the padding costs little, and the graphs stay few."""
    return sorted({min(size, most) for size in (1, 2, 4, *range(8, most + 8, 8))})
