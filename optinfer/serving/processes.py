"""Functions in processes of their own, with a channel between each two of them (torch.distributed, gloo on a CPU)."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


def run_in_processes(
    work: Callable[..., Result], count: int, *arguments: object, timeout: float = 300.0
) -> list[Result]:
    """Call ``work(rank, count, *arguments)`` in `count` processes that can talk by `torch.distributed`.

    Args:
        work: a function that a module defines: the processes import it.
        arguments: are sent to all of them; tensors, and so models, are shared memory and not copied.
        timeout: seconds to wait for all of them.

    Returns: what each returned, by rank.

    Raises RuntimeError: one of them failed, with its traceback; TimeoutError.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        processes = [
            context.Process(
                target=_begin, args=(work, rank, count, str(Path(folder) / "meet"), timeout, results, arguments)
            )
            for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            return _collect(results, processes, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
                if process.pid is not None:  # it was started
                    process.join()


def _collect(results: Any, processes: list[Any], timeout: float) -> list[Any]:
    import time

    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(found) < len(processes):
        if not results.empty():
            rank, ok, value = results.get()
            if not ok:
                raise RuntimeError(f"process {rank} failed:\n{value}")
            found[rank] = value
        elif time.monotonic() > deadline:
            raise TimeoutError(f"processes took longer than {timeout} seconds")
        elif any(not p.is_alive() and i not in found for i, p in enumerate(processes)) and results.empty():
            time.sleep(0.5)  # its last words may be on their way
            if results.empty():
                codes = [p.exitcode for p in processes]
                raise RuntimeError(f"a process ended without a result; exit codes {codes}")
        else:
            time.sleep(0.005)
    return [found[rank] for rank in range(len(processes))]


def _begin(work: Any, rank: int, count: int, meeting: str, timeout: float, results: Any, arguments: Any) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(max(1, (os.cpu_count() or count) // count))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
        )
        results.put((rank, True, work(rank, count, *arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
