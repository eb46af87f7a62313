"""Triton kernels: tensors in, tensors out; nothing here knows of `optinfer`.

    flash_attention       pointers, every architecture: the one to read first
    flash_attention_tma   tensor descriptors (TMA), Hopper and later
    flash_attention_ws    warp-specialized, Hopper
    interpreter           run any kernel on a CPU, in this process
    compile               compile any kernel for a GPU that is not here
    emulator              execute what was compiled, without a GPU: checks and counts
    memory_check          watch what an interpreted kernel reads and writes

This package itself imports no Triton; its modules do, and say so with `TritonMissing` where there is none.
"""

import os
import re


def acting_capability() -> tuple[int, int] | None:
    """The compute capability in ``OPTINFER_CAPABILITY``, such as 7.5: act as if this machine's GPU had it.

    So the ways of an older GPU (its dtype, its tiles) can be walked on any machine, a CPU too. None: not set.
    """
    given = os.environ.get("OPTINFER_CAPABILITY")
    if not given:
        return None
    if not re.fullmatch(r"\d+\.\d", given):
        raise ValueError(f"OPTINFER_CAPABILITY must be a compute capability such as 7.5, not {given!r}")
    major, minor = given.split(".")
    return int(major), int(minor)


class TritonMissing(ImportError):
    """A Triton kernel was asked for on a machine without Triton (macOS, Windows, a minimal install)."""

    def __init__(self) -> None:
        super().__init__(
            "this needs Triton, which is not installed here. Triton publishes wheels for Linux only: "
            "`pip install triton` there (a CPU is enough, kernels are then interpreted), or on Windows use WSL 2. "
            "Without it, use backend='reference', 'online' or 'sdpa', which need torch alone."
        )


def require_triton():
    """The `triton` module, or `TritonMissing`."""
    try:
        import triton
        import triton.language
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise TritonMissing from error
    return triton
