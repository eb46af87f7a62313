"""What exercises on kernels share: Triton, or a stand-in where there is none, and a launch whose memory is watched."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    from optinfer_kernels.interpreter import launch
    from optinfer_kernels.memory_check import memory_check
except ImportError:  # macOS, Windows: exercises with kernels can be read there, and say what is missing when run

    class triton:  # type: ignore[no-redef]
        @staticmethod
        def jit(function: Callable[..., Any]) -> Callable[..., Any]:
            return function

    class tl:  # type: ignore[no-redef]
        constexpr = int

    def launch(*_: Any, **__: Any) -> None:
        from optinfer_kernels import TritonMissing

        raise TritonMissing

    def memory_check() -> AbstractContextManager[str]:
        return nullcontext("no findings")


__all__ = ["launched", "launched_reference", "tl", "triton"]

_UNWRITTEN = 0x7FC0BEEF  # the bits of a NaN that no arithmetic makes


def launched(kernel: Any, grid: tuple[int, ...], out: Tensor, *args: Any, **constants: Any) -> dict[str, Any]:
    """Launch with `out` in the place of `...`: the result, and what the kernel touched that it should not have.

    Numbers that no program writes are told from NaN that one computed.
    """
    out.view(torch.int32).fill_(_UNWRITTEN)
    with memory_check() as memory:
        launch(kernel, grid, *(out if arg is ... else arg for arg in args), **constants)
    return {
        "numbers never written": int((out.view(torch.int32) == _UNWRITTEN).sum()),
        "out": out,
        "memory": str(memory).splitlines()[0],
    }


def launched_reference(out: Tensor) -> dict[str, Any]:
    """What `launched` returns for a right kernel whose result is `out`."""
    return {"numbers never written": 0, "out": out, "memory": "no findings"}
