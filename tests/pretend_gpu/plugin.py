"""The pytest plugin: `PRETEND_GPU=h100 python -m pytest -p tests.pretend_gpu.plugin …` (or t4)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import cuda, operations
from .log import log, tapes
from .operations import MODE, aten, held, refuse
from .tensor import CUDA, PretendTensor


def installed() -> str | None:
    """Which card is pretended; None: none."""
    return getattr(torch, "_pretend_gpu", None)


def install(card: str = "h100") -> None:
    """Pretend from now on, in this thread and in every one started later. It cannot be undone."""
    if installed():
        return
    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401  before it would look for a CUDA library
    import torch._inductor.utils  # before it would look for CUDA's part of C++

    torch._pretend_gpu = card  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)
    cuda.install_device_guard()
    cuda.patch(cuda.CARDS[card])
    _patch_tensors()
    _patch_attention()
    _patch_one_hot()
    _patch_kernels()
    _patch_threads()
    MODE.__enter__()


def _patch_tensors() -> None:
    base, set_data = torch._C.TensorBase, torch._C.TensorBase.data.__set__

    def to(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], PretendTensor):  # C++ would take its device for the CPU
            args = (CUDA, args[0].dtype, *args[1:])
        return base.to(self, *args, **kwargs)

    def put(self: Any, value: Any) -> None:
        if not isinstance(self, PretendTensor) and not isinstance(value, PretendTensor):
            set_data(self, value)
        elif isinstance(self, PretendTensor) and isinstance(value, PretendTensor):
            set_data(self, PretendTensor(value.held))
            self.held = value.held
        else:  # from one device to the other: the Python object must become one of the other class
            new, self.grad = value.detach(), None
            new = torch.nn.Parameter(new, self.requires_grad) if isinstance(self, torch.nn.Parameter) else new
            torch.utils.swap_tensors(self, new)

    tensor: Any = torch.Tensor
    tensor.to, tensor.data = to, property(base.data.__get__, put)
    tensor.pin_memory = lambda self, *a: self
    torch.Generator = cuda.Generator  # type: ignore[misc]
    autocast: Any = torch.amp.autocast_mode.autocast
    enter = autocast.__init__
    autocast.__init__ = lambda self, device_type, *a, **k: enter(self, "cpu", *a, **k)


def _patch_attention() -> None:
    """torch's attention makes masks in C++, which would be on the CPU."""
    usual = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = [t for t in (query, key, value, attn_mask) if t is not None]
        wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if not isinstance(query, PretendTensor) or wants_gradient:
            return usual(query, key, value, attn_mask, *args, **kwargs)
        operations._check_devices(aten._scaled_dot_product_flash_attention.default, tensors, True, tuple(tensors))
        plain = tuple(held(x, []) for x in (query, key, value, attn_mask, *args))
        with _disable_current_modes():
            out = usual(*plain, **kwargs)
        if tapes:
            tapes[-1].append((usual, plain, kwargs, out))
        return PretendTensor(out)

    torch.nn.functional.scaled_dot_product_attention = attention


def _patch_one_hot() -> None:
    """torch compares with a range made in C++, which would be on the CPU."""
    usual = torch.nn.functional.one_hot

    def one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        if not isinstance(tensor, PretendTensor) or num_classes < 0:
            return usual(tensor, num_classes)
        return torch.zeros(*tensor.shape, num_classes, dtype=torch.int64, device=CUDA).scatter_(
            -1, tensor[..., None], 1
        )

    torch.nn.functional.one_hot = one_hot


def _patch_kernels() -> None:
    """Launches on pretend tensors are interpreted; what chooses tiles and splits still sees the GPU."""
    from optinfer_kernels import interpreter

    usual = interpreter.launch

    def launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        bases = [a.base if hasattr(a, "block_shape") else a for a in args]  # of TMA descriptors
        gpu = [isinstance(t, PretendTensor) for t in bases if isinstance(t, torch.Tensor)]
        if any(gpu) and not all(gpu):
            refuse("Pointer argument cannot be accessed from Triton (cpu tensor?)", ValueError)

        def plain(a: Any) -> Any:
            return dataclasses.replace(a, base=held(a.base, [])) if hasattr(a, "block_shape") else held(a, [])

        log().launches[getattr(kernel, "__name__", str(kernel))] += 1
        call = functools.partial(usual, kernel, grid, *map(plain, args), **options)
        if tapes:
            tapes[-1].append((call, (), {}, None))
        with _disable_current_modes():
            call()

    interpreter.launch = launch  # before the kernels' modules take it
    from optinfer_kernels import quantized_matmul_fast

    quantized_matmul_fast.decoding = lambda *a: ""  # type: ignore[assignment]  # the interpreter runs no machine code


def _patch_threads() -> None:
    """Modes belong to a thread, and end with it."""
    start = threading.Thread.start

    def start_pretending(self: threading.Thread) -> None:
        run = self.run
        self.run = lambda: MODE.__enter__() and run()  # type: ignore[method-assign]
        start(self)

    threading.Thread.start = start_pretending  # type: ignore[method-assign]


def pytest_configure(config: Any) -> None:
    install(os.environ.get("PRETEND_GPU", "h100"))
    if os.environ.get("PRETEND_KERNELS") == "once":  # for rooms that are not about kernels
        from . import once

        once.interpret_once()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(str(log()))
