"""What `torch.cuda` answers on the pretend GPU: facts, generators, streams, events, graphs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .log import log, tapes
from .operations import generators
from .tensor import CPU, CUDA, memory


@dataclass(frozen=True)
class Card:
    name: str
    capability: tuple[int, int]
    nbytes: int
    processors: int


CARDS = {
    "h100": Card("Pretend H100", (9, 0), 80 * 2**30, 132),
    "t4": Card("Pretend T4", (7, 5), 15 * 2**30, 40),
}


class Generator(torch._C.Generator):
    """A CPU's generator that says it is on the device it was made for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls, CPU)
        self.on = torch.device(device)
        if self.on.type == "cuda":
            self.on = CUDA
            generators[self._cdata] = self
        return self

    device = property(lambda self: self.on)  # type: ignore[assignment]


@functools.cache
def default_generator() -> Generator:
    return Generator("cuda").manual_seed(20_000)  # type: ignore[return-value]


_any_stream = torch.Stream


class Stream:
    """Both `torch.cuda.Stream` and `torch.Stream`, which is the CPU's own where that is asked for."""

    device = CUDA

    def __new__(cls, device: Any = None, **options: Any) -> Any:
        if isinstance(device, (str, torch.device)) and torch.device(device).type != "cuda":
            return _any_stream(device, **options)
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return bool(tapes)

    def synchronize(self) -> None:
        log().wait("synchronize")


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timing, self.at = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        log().wait("synchronize")

    def elapsed_time(self, end: Event) -> float:
        if not (self.timing and end.timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return (end.at - self.at) * 1e3


class CUDAGraph:
    """Keeps what was launched during capture, and does it again on the same memory at each replay."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.tape: list[tuple] = []

    def replay(self) -> None:
        with torch.inference_mode(), _disable_current_modes():
            for func, args, kwargs, out in self.tape:
                new = func(*args, **kwargs)
                written = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
                pairs = zip(*((o if type(o) in (list, tuple) else [o]) for o in (out, new)))
                for old, now in pairs:
                    if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata not in written:
                        old.copy_(now)


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    tapes.append(cuda_graph.tape)
    try:
        yield
    finally:
        tapes.pop()


def install_device_guard() -> None:
    """C++ wants an object that knows the current device: ours is the CPU's, with three answers changed."""
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    registry = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    methods = (ctypes.c_void_p * 32).from_address(ctypes.c_void_p.from_address(registry[0]).value)  # type: ignore[arg-type]
    cuda_0 = ctypes.CFUNCTYPE(ctypes.c_uint16, ctypes.c_void_p, ctypes.c_uint16)(lambda this, device: 1)
    ours = (ctypes.c_void_p * 32)(*methods)
    ours[0] = ours[1] = ours[2] = ctypes.cast(cuda_0, ctypes.c_void_p).value  # type, exchangeDevice, getDevice
    guard = ctypes.c_void_p(ctypes.addressof(ours))
    install_device_guard.kept = cuda_0, ours, guard  # type: ignore[attr-defined]  # C++ does not keep them
    registry[1] = ctypes.addressof(guard)


def patch(card: Card) -> None:
    """Let torch.cuda and torch.accelerator answer for the card."""
    facts = SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=card.nbytes,
        multi_processor_count=card.processors, L2_cache_size=50 * 2**20, warp_size=32,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    )  # fmt: skip
    constants = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": card.name, "is_initialized": True,
        "get_device_capability": card.capability, "get_device_properties": facts, "set_device": None, "empty_cache": None,
        "_lazy_init": None, "init": None, "ipc_collect": None, "is_bf16_supported": card.capability >= (8, 0),
        "memory_stats": {}, "_is_compiled": True, "_is_in_bad_fork": False, "get_arch_list": ["sm_75", "sm_80", "sm_90"],
    }  # fmt: skip
    for name, value in constants.items():
        setattr(torch.cuda, name, lambda *a, value=value, **k: value)
    cuda: Any = torch.cuda
    random = default_generator()
    cuda.synchronize = lambda *a, **k: log().wait("synchronize")
    cuda.mem_get_info = lambda *a, **k: (card.nbytes - memory.used, card.nbytes)
    cuda.memory_allocated = cuda.memory_reserved = lambda *a, **k: memory.used
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *a, **k: memory.peak
    cuda.reset_peak_memory_stats = lambda *a, **k: setattr(memory, "peak", memory.used)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: random.manual_seed(seed % 2**31 + 20_000) and None
    cuda.get_rng_state, cuda.get_rng_state_all = lambda *a: random.get_state(), lambda: [random.get_state()]
    cuda.set_rng_state, cuda.set_rng_state_all = lambda s, *a: random.set_state(s), lambda s: random.set_state(s[0])
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = Stream, Event, CUDAGraph, graph
    torch.Stream = Stream  # type: ignore[misc, assignment]
    cuda.current_stream = cuda.default_stream = lambda *a: Stream()
    cuda.stream = cuda.device = contextlib.nullcontext
    cuda.is_current_stream_capturing = lambda: bool(tapes)
    torch.version.cuda = "12.8"
    constants = {"is_available": True, "device_count": 1, "current_accelerator": torch.device("cuda"),
                 "current_device_index": 0, "synchronize": None, "empty_cache": None, "current_stream": Stream()}  # fmt: skip
    for name, value in constants.items():
        setattr(torch.accelerator, name, lambda *a, value=value, **k: value)
