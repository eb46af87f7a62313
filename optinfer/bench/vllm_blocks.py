"""Cost per operation of vLLM's own block manager, on the pools of `optinfer.bench.kv_cache`.

Runs where vLLM is importable, which is another environment than the course's (`scripts/vllm_environment.sh`):

    PYTHONPATH=. "$(scripts/vllm_environment.sh)" -m optinfer.bench.vllm_blocks 1000 10000 100000

prints both managers' rows. vLLM's manager has no fork: parallel samples are requests that hit the prefix cache.
"""

import json
import sys
import time
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from optinfer.bench.rows import KVCacheRow

if TYPE_CHECKING:
    from vllm.v1.request import Request

BLOCK_SIZE = 16


class Pool:
    """vLLM's KVCacheManager, nine tenths full, its rest a queue of prefix hits."""

    def __init__(self, num_blocks: int):
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(
            config, max_model_len=8192, scheduler_block_size=BLOCK_SIZE, hash_block_size=BLOCK_SIZE
        )
        blocks = 50  # per sequence: 800 tokens
        held = [self.allocate(str(i), [i] * (BLOCK_SIZE * blocks)) for i in range((num_blocks - 1) // blocks)]
        for request in held[: num_blocks // blocks // 10 + 1]:
            self.manager.free(request)

    def allocate(self, name: str, tokens: list[int]) -> "Request":
        """A new request with blocks for all of its tokens; hashing, lookup and allocation, as its scheduler does it."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        request = Request(name, tokens, SamplingParams(max_tokens=8), None, block_hasher=self.hasher)
        found = self.manager.get_computed_blocks(request)
        blocks = self.manager.allocate_slots(request, len(tokens) - found[1], found[1], found[0])
        if blocks is None:
            raise MemoryError("the pool is full")
        request.num_computed_tokens = len(tokens)
        return request

    def append(self, request: "Request") -> None:
        request.append_output_token_ids(1)
        self.manager.allocate_slots(request, 1)


def _allocate(pool: Pool, i: int) -> float:
    start = time.perf_counter()
    request = pool.allocate("new", [7, i] * 128)
    seconds = time.perf_counter() - start
    pool.manager.free(request)
    return seconds


def _append(pool: Pool, i: int) -> float:
    request = pool.allocate("new", [7, i] * 128)
    start = time.perf_counter()
    pool.append(request)
    seconds = time.perf_counter() - start
    pool.manager.free(request)
    return seconds


def _prefix_hit(pool: Pool, i: int) -> float:
    pool.manager.free(pool.allocate("new", [9, i] * 128))
    start = time.perf_counter()
    request = pool.allocate("again", [9, i] * 128)
    seconds = time.perf_counter() - start
    pool.manager.free(request)
    return seconds


def _free(pool: Pool, i: int) -> float:
    request = pool.allocate("new", [7, i] * 128)
    start = time.perf_counter()
    pool.manager.free(request)
    return time.perf_counter() - start


OPERATIONS = {
    "allocate 256 tokens": _allocate,
    "append 1 token": _append,
    "allocate 256 tokens, prefix hit": _prefix_hit,
    "free 256 tokens": _free,
}


def rows(sizes: list[int], repeats: int = 200) -> list[KVCacheRow]:
    """Median seconds of each operation at each pool size; sizes take turns."""
    import vllm

    pools = {size: Pool(size) for size in sizes}
    found = []
    for name, operation in OPERATIONS.items():
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for i in range(repeats):
            for size, pool in pools.items():
                times[size].append(operation(pool, i))
        for size in sizes:
            what = KVCacheRow(kind="operation", operation=name, peer=f"vLLM {vllm.__version__}", num_blocks=size)
            found.append(replace(what, seconds=median(times[size])))
    return found


if __name__ == "__main__":
    from optinfer.bench.kv_cache import operation_costs

    chosen = [int(size) for size in sys.argv[1:]] or [1_000, 10_000]
    for row in operation_costs(chosen) + rows(chosen):
        print(json.dumps(row.as_dict()))
