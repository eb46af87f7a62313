"""One operation, as CUDA would see it: which device it belongs to, what is refused, what makes the host wait."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .log import line_of_the_project, log, tapes
from .tensor import CPU, CUDA, PretendTensor

aten = torch.ops.aten
COPIES = {
    aten._to_copy.default,
    aten.copy_.default,
    aten.copy.default,
    aten.lift_fresh.default,
    aten.set_.source_Tensor,
}
INDEXING = {
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default, aten._unsafe_index_put.default,
}  # these take indices from the CPU as well  # fmt: skip
MIXING = {aten.masked_fill, aten.masked_fill_, aten.where, aten.fill, aten.fill_, aten.index_fill, aten.index_fill_}
WAITS = {
    aten._local_scalar_dense.default: "item", aten.equal.default: "equal", aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select", aten._unique2.default: "unique", aten.bincount.default: "bincount",
    aten.unique_consecutive.default: "unique", aten.unique_dim.default: "unique",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "addbmm"}
CPU_ONLY = ("mkldnn", "_for_cpu", "onednn", "quantized", "_weight_int8pack_mm")  # torch's own, without a CUDA kernel
# Of integers the CPU has no such kernel.
CUDA_HAS = {aten.histc.default: lambda x, *a, **k: aten.histc.default(x.double(), *a, **k).to(x.dtype)}
LARGE = 10_000  # elements: less on the CPU is bookkeeping

generators: dict[int, Any] = {}  # address -> a generator of the GPU, kept so that no address is given out twice
_leaving = [False]


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operation(func, args, kwargs or {})


MODE = Mode()


@contextlib.contextmanager
def leaving(really: bool) -> Iterator[None]:
    """Whether a copy to the CPU is meant: C++, which takes pretend tensors for the CPU's, asks for many."""
    _leaving.append(really)
    try:
        yield
    finally:
        _leaving.pop()


def operation(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    tensors: list[torch.Tensor] = []
    plain_args = tuple(held(a, tensors) for a in args)
    plain = {name: held(value, tensors) for name, value in kwargs.items()}
    on_gpu = any(isinstance(t, PretendTensor) for t in tensors)
    backward = torch._C._current_graph_task_id() != -1
    asked_by_cpp = backward or (func is aten._to_copy.default and kwargs.get("device") == CPU)
    if on_gpu and "device" in kwargs and asked_by_cpp and not _leaving[-1]:
        kwargs["device"] = CUDA
    target = kwargs.get("device")
    makes_gpu = on_gpu if target is None else torch.device(target).type == "cuda"
    _check_generator(func, kwargs.get("generator"), makes_gpu)
    if not on_gpu and not makes_gpu:
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.numel() >= LARGE and out.device.type == "cpu":
            log().cpu_work[str(func), line_of_the_project()] += out.numel()
        return out
    if _is_composite(func):  # in inference mode these come whole
        with MODE:
            if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
    if func in COPIES:
        _check_copy(func, args, kwargs)
    else:
        _check_devices(func, tensors, on_gpu, args)
        _check_kernel(func, tensors, plain_args)
    if target is not None:
        plain["device"] = CPU if makes_gpu else target
    run = _with_generator(CUDA_HAS.get(func, func), plain, makes_gpu)
    out = _asserted(func, run, plain_args, plain)
    if tapes:
        tapes[-1].append((run, plain_args, plain, out))
    known = {id(t.held if isinstance(t, PretendTensor) else t): t for t in tensors}
    if func.is_view and torch.is_inference_mode_enabled() and not tensors[0].is_inference():
        with torch.inference_mode(False):  # a view of a normal tensor is a normal one
            return _shown(out, known, makes_gpu)
    return _shown(out, known, makes_gpu)


def held(x: Any, seen: list[torch.Tensor]) -> Any:
    """The CPU tensor behind a pretend one, in lists too; `seen` takes all tensors."""
    if isinstance(x, torch.Tensor):
        seen.append(x)
        return x.held if isinstance(x, PretendTensor) else x
    return type(x)(held(y, seen) for y in x) if type(x) in (list, tuple) else x


def _shown(out: Any, known: dict[int, torch.Tensor], on_gpu: bool) -> Any:
    """A result as the caller shall see it: an argument as itself, what is new on its device."""
    if not isinstance(out, torch.Tensor):
        return type(out)(_shown(x, known, on_gpu) for x in out) if type(out) in (list, tuple) else out
    if id(out) not in known:
        return PretendTensor(out) if on_gpu else out
    argument = known[id(out)]
    if isinstance(argument, PretendTensor) and (argument.shape, argument.stride()) != (out.shape, out.stride()):
        torch._C.TensorBase.data.__set__(argument, PretendTensor(out))  # resize_, t_, unsqueeze_ …
    return argument


def _asserted(func: Any, run: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    try:
        return run(*args, **kwargs)
    except (IndexError, RuntimeError) as error:
        if isinstance(error, IndexError) or "out of " in str(error) or "probability tensor" in str(error):
            log().asserts.append(f"{func} at {line_of_the_project()}: {error}")
            raise RuntimeError(f"CUDA error: device-side assert triggered (here: {error})") from error
        raise


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


# ---------------------------------------------------------------------------------------------- rules


def refuse(message: str, kind: type[Exception] = RuntimeError) -> NoReturn:
    raise kind(f"{message} (at {line_of_the_project()})")


def _check_copy(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Copies between devices wait, unless they go to the GPU and are non-blocking."""
    into = func in (aten.copy_.default, aten.copy.default)
    source = args[1] if into else args[0]
    target = args[0].device if into else torch.device(kwargs.get("device") or source.device)
    non_blocking = kwargs.get("non_blocking") or (into and len(args) > 2 and args[2])
    if not source.numel() or target.type == source.device.type:
        return
    if target.type == "cuda" and not non_blocking:
        log().wait("to the GPU")
    elif target.type == "cpu":
        log().wait("to the CPU")


def _check_devices(func: Any, tensors: list[torch.Tensor], on_gpu: bool, args: tuple) -> None:
    """All tensors on one device; but CPU scalars in pointwise operations, and CPU indices of a GPU tensor."""
    name = func._schema.name
    others = [t for t in tensors if not isinstance(t, PretendTensor) and t.device.type == "cpu"]
    if not on_gpu or not others or "_fused_adam" in name or "_foreach" in name:  # optimizers count steps on the CPU
        return
    if func in INDEXING and isinstance(args[0], PretendTensor):
        indices = [i for i in args[1] if i is not None and not isinstance(i, PretendTensor)]
        if all(any(t is i for i in indices) or t.dim() == 0 for t in others):
            for _ in indices:
                log().wait("index to the GPU")
            return
    writes = isinstance(args[0], torch.Tensor) and not isinstance(args[0], PretendTensor) and name.endswith("_")
    mixes = torch.Tag.pointwise in func.tags or func.overloadpacket in MIXING
    if all(t.dim() == 0 for t in others) and mixes and not writes:
        return
    refuse(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})")


def _check_kernel(func: Any, tensors: list[torch.Tensor], args: tuple) -> None:
    """What CUDA has no kernel for, and what makes the host wait."""
    name = func._schema.name
    short = name.removeprefix("aten::")
    if any(part in name for part in CPU_ONLY) and "scaled_dot_product" not in name:
        refuse(f"Could not run '{name}' with arguments from the 'CUDA' backend", NotImplementedError)
    if short in PRODUCTS and not (tensors[0].dtype.is_floating_point or tensors[0].dtype.is_complex):
        refuse(f'"{short}_cuda" not implemented for {tensors[0].dtype}')
    if short == "_int_mm" and (args[0].shape[0] <= 16 or args[0].shape[1] % 8 or args[1].shape[1] % 8):
        refuse(f"_int_mm on CUDA wants more than 16 rows and multiples of 8, not {args[0].shape}, {args[1].shape}")
    if func in WAITS:
        log().wait(WAITS[func])
    elif short == "repeat_interleave":
        log().wait("repeat_interleave")
    elif func in INDEXING:
        masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if masks and (len(args) < 3 or args[2].numel() != 1):  # one value is filled in without a wait
            log().wait("boolean mask")


def _check_generator(func: Any, generator: Any, on_gpu: bool) -> None:
    if generator is not None and (generator._cdata in generators) != on_gpu:
        want, found = ("cuda", "cpu") if on_gpu else ("cpu", "cuda")
        refuse(f"Expected a '{want}' device type for generator but found '{found}' ({func})")


def _with_generator(func: Any, plain: dict[str, Any], on_gpu: bool) -> Any:
    """The GPU has random numbers of its own: the same seed gives others there than on a CPU."""
    from .cuda import default_generator

    if on_gpu and torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) and plain.get("generator") is None:
        if any(a.name == "generator" for a in func._schema.arguments):
            plain["generator"] = default_generator()
            return func
        name = "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
        if name in func.overloadpacket.overloads():
            plain["generator"] = default_generator()
            return getattr(func.overloadpacket, name)
    return func
