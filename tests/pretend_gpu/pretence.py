"""A pretend GPU: device mistakes found on a machine without one.

Inside `pretend_gpu()`, ``device="cuda"`` makes a `PretendTensor`: it says that it is on cuda:0 and holds its numbers in a
CPU tensor. Every operation passes through a dispatch mode, which refuses what CUDA would refuse (tensors of two devices, a
generator of the other device, a wait of the host while a graph is captured), counts the waits of the host, and computes
the rest on the CPU.

It cannot show: speed, compiled kernels, races between streams, how CUDA's libraries round, fragmented memory. Nor does it
yet launch Triton kernels, train modules, or replay graphs.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # take indices from the CPU as well
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.bincount.default: "bincount",
}


class Log:
    """How often the host waited, by kind; and whether a graph is being captured, when it must not."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.capturing = False

    def wait(self, kind: str) -> None:
        if self.capturing:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind})")
        self.waits[kind] += 1

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


class PretendTensor(torch.Tensor):
    """For C++ a CPU tensor without memory, for Python one on cuda:0; `held` has the numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    held: torch.Tensor
    mode: "PretendMode"

    @staticmethod
    def __new__(cls, held: torch.Tensor, mode: "PretendMode") -> "PretendTensor":
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=CPU
        )
        self.held, self.mode = held, mode
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("a pretend tensor was used after its pretence had ended")

    def cpu(self, *args: Any) -> torch.Tensor:  # C++ takes it for a CPU tensor and would do nothing
        self.mode.log.wait("to the CPU")
        return self.held.clone()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self, **options: Any) -> str:
        return f"PretendTensor({list(self.shape)}, {self.dtype})"


class PretendMode(TorchDispatchMode):
    """Every operation, as CUDA would see it."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, PretendTensor) for x in tensors)
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        makes_gpu = on_gpu if target is None else target.type == "cuda"
        generator = kwargs.get("generator")
        if generator is not None and makes_gpu:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device}' ({func})")
        if func in COPIES:
            self._copy(args, target)
        elif on_gpu:
            self._one_device(func, tensors, args)
            self._count(func, args)
        if makes_gpu and target is not None:
            kwargs["device"] = CPU
        plain_args, plain = tree_map(lambda x: x.held if isinstance(x, PretendTensor) else x, (args, kwargs))
        out = func(*plain_args, **plain)
        if not makes_gpu:
            return out
        known = {id(x.held): x for x in tensors if isinstance(x, PretendTensor)}  # in-place: the input comes back

        def wrap(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else PretendTensor(x, self)

        return tree_map(wrap, out)

    def _copy(self, args: Any, target: torch.device | None) -> None:
        """A copy between devices waits."""
        source = args[-1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else args[0]
        to = args[0].device if source is not args[0] else target or source.device
        if to.type != source.device.type:
            self.log.wait("to the GPU" if to.type == "cuda" else "to the CPU")

    def _one_device(self, func: Any, tensors: list[torch.Tensor], args: Any) -> None:
        """All tensors on one device, but for scalars in pointwise operations and for indices."""
        strangers = [x for x in tensors if not isinstance(x, PretendTensor)]
        if func in INDEXING and isinstance(args[0], PretendTensor):
            for _ in strangers:
                self.log.wait("index to the GPU")
        elif any(x.dim() for x in strangers) or (strangers and torch.Tag.pointwise not in func.tags):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
            )

    def _count(self, func: Any, args: Any) -> None:
        if func in WAITS:
            self.log.wait(WAITS[func])
        elif func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.log.wait("boolean mask")


@contextmanager
def pretend_gpu() -> Iterator[Log]:
    """Pretend in the block; yields the log of the host's waits."""
    log = Log()
    mode = PretendMode(log)
    move = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """torch's own asks for a CUDA build, and takes a pretend tensor for one of the CPU."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        there = isinstance(self, PretendTensor)
        goes = there if device is None else device.type == "cuda"
        if not there and not goes:
            return move(self, *args, **kwargs)
        held = self.held if isinstance(self, PretendTensor) else self
        if there != goes:
            log.wait("to the GPU" if goes else "to the CPU")
            held = held.clone()
        moved = move(held, dtype or held.dtype)
        if not goes:
            return moved
        return self if there and moved is held else PretendTensor(moved, mode)

    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """Made on the CPU and copied: on a GPU too, the host waits."""
        made = make(data, **kwargs)
        return made if device is None else made.to(device)

    with (
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.tensor", tensor),
        mock.patch.object(torch.Tensor, "to", to),
        mode,
    ):
        yield log
