"""Memory that a kernel needs beyond its arguments, such as for descriptors that it makes itself: Triton asks us for it."""

import contextlib
from collections.abc import Iterator

import torch

from optinfer_kernels import require_triton

triton = require_triton()


@contextlib.contextmanager
def scratch_memory(device: torch.device) -> Iterator[None]:
    """Lend torch's memory on `device` to the kernels that start within; afterwards lends whoever did before.

    On a CPU, where kernels are interpreted, nothing is asked for and nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    from triton.runtime import _allocation  # Triton tells in no other way who lends now

    before = _allocation._allocator.get()
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    try:
        yield
    finally:
        triton.set_allocator(before)
