"""Block manager: cost per operation against the size of the pool, and memory wasted on a trace of requests."""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from optinfer.bench.rows import KVCacheRow
from optinfer.kv_cache import (
    BlockManager,
    ContiguousAllocator,
    PagedAllocator,
    parallel_sampling_saving,
    shared_prefix_saving,
    sharegpt_like,
    simulate,
)

POOL_SLOTS = 16_384  # about what an A100-40GB leaves for the cache of OPT-13B


def run(quick: bool = False) -> list[KVCacheRow]:
    """Rows of three kinds: `operation` (seconds each), `waste` (shares of the pool), `sharing` (blocks saved)."""
    sizes = [1_000, 10_000] if quick else [1_000, 10_000, 100_000, 1_000_000]
    return [
        *operation_costs(sizes, 40 if quick else 200),
        *waste(100 if quick else 400),
        *sharing(20 if quick else 100),
    ]


def operation_costs(sizes: list[int], repeats: int = 200) -> list[KVCacheRow]:
    """Median seconds of one operation on a pool that is nine tenths full, its rest a queue of prefix hits."""
    rows: list[KVCacheRow] = []
    managers = {size: _busy_manager(size) for size in sizes}
    for name, operation in _OPERATIONS.items():
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for i in range(repeats):  # sizes take turns, so that a noisy moment hits all of them
            for size, m in managers.items():
                times[size].append(operation(m, i))
        for size in sizes:
            what = KVCacheRow(kind="operation", operation=name, peer="optinfer", num_blocks=size)
            rows.append(replace(what, seconds=median(times[size])))
    return rows


def _busy_manager(num_blocks: int) -> BlockManager:
    m = BlockManager(num_blocks, record_events=False)
    blocks = 50  # per sequence: 800 tokens
    for i in range(num_blocks // blocks):
        m.allocate(i, [i] * (16 * blocks))
    for i in range(num_blocks // blocks // 10 + 1):
        m.free(i)
    return m


def _timed(operation: Callable[[], object]) -> float:
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def _allocate(m: BlockManager, i: int) -> float:
    seconds = _timed(lambda: m.allocate("new", [7, i] * 128))
    m.free("new")
    return seconds


def _append(m: BlockManager, i: int) -> float:
    m.allocate("new", [7, i] * 128)
    seconds = _timed(lambda: m.append("new", [1]))
    m.free("new")
    return seconds


def _fork_and_write(m: BlockManager, i: int) -> float:
    m.allocate("new", [7, i] * 128 + [1])

    def operation() -> None:
        m.fork("new", "child")
        m.append("child", [2])

    seconds = _timed(operation)
    m.free("new")
    m.free("child")
    return seconds


def _prefix_hit(m: BlockManager, i: int) -> float:
    m.allocate("new", [9, i] * 128)
    m.free("new")
    seconds = _timed(lambda: m.allocate("again", [9, i] * 128))
    m.free("again")
    return seconds


def _free(m: BlockManager, i: int) -> float:
    m.allocate("new", [7, i] * 128)
    return _timed(lambda: m.free("new"))


_OPERATIONS = {
    "allocate 256 tokens": _allocate,
    "append 1 token": _append,
    "fork, then copy-on-write": _fork_and_write,
    "allocate 256 tokens, prefix hit": _prefix_hit,
    "free 256 tokens": _free,
}


def waste(num_requests: int = 400, seed: int = 0) -> list[KVCacheRow]:
    """Where the pool's slots are while requests wait: pages, and three ways to reserve."""
    trace = sharegpt_like(num_requests, seed)
    allocators = {p: ContiguousAllocator(POOL_SLOTS, p) for p in ContiguousAllocator.POLICIES}
    rows = []
    for name, allocator in {**allocators, "paged": PagedAllocator(POOL_SLOTS)}.items():
        seconds = time.perf_counter()
        result = simulate(trace, allocator)
        seconds = time.perf_counter() - seconds
        u = result.usage
        shares: dict[str, Any] = {
            kind: getattr(u, kind) / u.total for kind in ("used", "reserved", "internal", "external")
        }
        row = KVCacheRow(kind="waste", peer=name, seconds=seconds, wasted=u.wasted, **shares)
        row.batch, row.preemptions = result.batch, result.preemptions
        rows.append(row)
    return rows


def sharing(num_requests: int = 100, seed: int = 0) -> list[KVCacheRow]:
    """Blocks saved by n answers to one prompt, and by one system prompt for everybody: the paper's 6.3 and 6.4."""
    trace = sharegpt_like(num_requests, seed)
    kinds = [("samples", n, parallel_sampling_saving) for n in (2, 4, 6)]
    kinds += [("system_prompt", n, shared_prefix_saving) for n in (64, 256, 1024)]
    rows = []
    for shared, size, saving in kinds:
        start = time.perf_counter()
        saved = saving(trace, size)
        seconds = time.perf_counter() - start
        name: dict[str, Any] = {shared: size}
        rows.append(KVCacheRow(kind="sharing", peer="paged", **name, saved=saved, seconds=seconds))
    return rows
