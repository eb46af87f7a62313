"""A tensor that says it is on cuda:0. For C++ it is a CPU tensor without memory, so that autograd works in any build."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .log import log

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Memory:
    """Bytes of the storages behind pretend tensors that are still alive."""

    def __init__(self) -> None:
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0  # to count all of them for each new one would take most of the time
        self.peak = 0

    def add(self, held: torch.Tensor) -> None:
        storage = held.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is None or known[0].expired():
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self._at_most += storage.nbytes()
            if self._at_most > self.peak:
                self.peak = max(self.peak, self.used)

    @property
    def used(self) -> int:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self._at_most = sum(size for _, size in self._alive.values())
        return self._at_most


memory = Memory()


class PretendTensor(torch.Tensor):
    """`held` has the numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> PretendTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=CPU, requires_grad=requires_grad,
        )  # fmt: skip
        self.held = held
        memory.add(held)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .operations import operation

        return operation(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # nn.Module.to then swaps tensors: it cannot set .data
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> PretendTensor:
        return PretendTensor(inner["held"])

    # ---- what torch does in C++ without a dispatch, or by looking at the device there

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        from .operations import leaving

        other = kwargs.pop("other", args[0] if args and isinstance(args[0], torch.Tensor) else None)
        if other is not None:
            args = (other.device, other.dtype, *args[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or CUDA, dtype or self.dtype
        if device.type == "cuda" and dtype == self.dtype and not copy and memory_format is None:
            return self
        with leaving(device.type == "cpu"):
            return torch.ops.aten._to_copy(
                self, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=memory_format
            )

    def cpu(self, *_: Any) -> torch.Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> torch.Tensor:
        return self

    def type_as(self, other: torch.Tensor) -> torch.Tensor:
        return self.to(other)

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        log().wait("to the CPU")
        return self.held.tolist()

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def get_device(self) -> int:
        return 0

    def pin_memory(self, *_: Any) -> torch.Tensor:
        raise RuntimeError("only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo: dict) -> PretendTensor:
        if id(self) not in memo:
            if not self.is_leaf:
                raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
            memo[id(self)] = new = PretendTensor(copy.deepcopy(self.held, memo), self.requires_grad)
            new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "held"})
            new.grad = copy.deepcopy(self.grad, memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError("a pretend tensor cannot be pickled")

    def __repr__(self, **_: Any) -> str:
        log().wait("repr")
        return repr(self.held)[:-1] + ", device='cuda:0')"

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)
