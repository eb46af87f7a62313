"""Decode steps as CUDA graphs: the thousand launches of a small model's step become one.

A graph repeats the same kernels on the same addresses, so its shapes are fixed. Steps in which every sequence computes
one token are padded to a bucket: to a batch size, and to a number of blocks per sequence. Padding sequences write to a
scratch block that no request owns, and their logits are dropped. Each bucket is captured when it is first met.

Not measured: no figure of this course comes from this path yet.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optinfer.serving.paged_batch import Chunk, KVPool, PagedBatch


class CudaGraph:
    """One captured computation; `replay` runs it again on what its input tensors hold by then."""

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
        max_size: largest batch; larger ones are not captured.
        capture: makes a graph of a computation; it has a method `replay`.
    """

    def __init__(
        self,
        pool: KVPool,
        forward: Callable[[PagedBatch], Tensor],
        max_size: int = 64,
        capture: Callable[[Callable[[], Tensor]], Any] = CudaGraph,
    ):
        self.pool, self.forward, self.capture = pool, forward, capture
        self.sizes = batch_sizes(max_size)
        self.padding = Chunk([0], 0, [pool.num_blocks - 1])
        self._graphs: dict[tuple[int, int], tuple[PagedBatch, Any]] = {}

    def takes(self, chunks: list[Chunk], num_logits: list[int]) -> bool:
        """Whether the step is one token of each of not too many sequences."""
        small = len(chunks) <= self.sizes[-1]
        return small and all(len(c.token_ids) == 1 for c in chunks) and all(n == 1 for n in num_logits)

    def run(self, chunks: list[Chunk]) -> Tensor:
        """The logits [chunks, vocabulary]; valid until the next run."""
        size, num_blocks = bucket = self.bucket(chunks)
        padded = chunks + [self.padding] * (size - len(chunks))
        batch = PagedBatch(padded, [1] * size, self.pool, num_blocks)
        if bucket not in self._graphs:
            self._graphs[bucket] = batch, self.capture(lambda: self._compute(batch))
        static, graph = self._graphs[bucket]
        static.load(batch)
        return graph.replay()[: len(chunks)]

    def bucket(self, chunks: list[Chunk]) -> tuple[int, int]:
        """Batch size and blocks per sequence that the step is padded to."""
        size = self.sizes[bisect_left(self.sizes, len(chunks))]
        longest = max(chunk.start // self.pool.block_size + 1 for chunk in chunks)
        return size, 1 << (longest - 1).bit_length()

    def _compute(self, batch: PagedBatch) -> Tensor:
        batch.forget_masks()  # they follow from the positions, so they are part of the graph
        return self.forward(batch)


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, then multiples of 8: the padding costs little, and the graphs stay few."""
    return sorted({min(size, most) for size in (1, 2, 4, *range(8, most + 8, 8))})
