"""Kernels interpreted once for each kind of input and checked there; after that their formula, for whole lessons take hours
otherwise. And measurements of one repeat: how long a pretence takes says nothing."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from tests.quantized_matmul.weights import restore

from .log import tapes
from .tensor import PretendTensor

KERNELS = {
    "quantized_matmul_fast": "quantized_matmul", "quantized_matmul": "quantized_matmul", "int8_matmul": "int8_matmul",
    "paged_attention": "paged_attention", "flash_attention": "flash_attention",
    "flash_attention_tma": "flash_attention", "flash_attention_ws": "flash_attention",
}  # fmt: skip
TOLERANCE = 0.03  # of the largest number of the output: formulas round elsewhere


def install() -> None:
    """Both; before `optinfer.bench` is imported."""
    interpret_once()
    _measure_once()


def interpret_once() -> None:
    for module_name, name in KERNELS.items():
        module = importlib.import_module(f"optinfer_kernels.{module_name}")
        setattr(module, name, _once(getattr(module, name), FORMULAS[name]))


def _once(kernel: Callable[..., Any], formula: Callable[..., Any]) -> Callable[..., Any]:
    seen: set[Any] = set()
    formula = _on_the_cpu(formula)

    @functools.wraps(kernel)
    def run(*args: Any, **options: Any) -> Any:
        if not isinstance(args[0], PretendTensor) or any(options.get(o) is not None for o in ("tile", "splits", "out")):
            return kernel(*args, **options)
        case = _kind(args), _kind(tuple(sorted(options.items())))
        if case in seen or tapes:  # what is captured has been run before
            return as_one_operation(formula, args, options)
        seen.add(case)
        out = kernel(*args, **options)
        with _disable_current_modes():
            ours, exact = (
                _held(x if isinstance(x, tuple) else (x,)) for x in (out, formula(*_held(args), **_held(options)))
            )
            for a, b in zip(ours, exact):
                if a is not None and a.numel():
                    worst, largest = (a.double() - b.double()).abs().max(), b.double().abs().max()
                    assert worst <= TOLERANCE * largest, f"{kernel.__module__} is off by {worst:.3g} of {largest:.3g}"
        return out

    return run


def as_one_operation(function: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
    """Compute on the CPU what is one launch on a GPU."""
    args, options = _held(args), _held(options)
    with _disable_current_modes(), torch.inference_mode(torch.is_inference_mode_enabled()):
        out = function(*args, **options)
    if tapes:
        tapes[-1].append((function, args, options, out))
    return tuple(map(_shown, out)) if isinstance(out, tuple) else _shown(out)


def _shown(x: Any) -> Any:
    return PretendTensor(x) if isinstance(x, torch.Tensor) else x


def _held(x: Any) -> Any:
    """The CPU tensors behind pretend ones, in containers and in data classes too."""
    if isinstance(x, torch.Tensor):
        return getattr(x, "held", x)
    if isinstance(x, (list, tuple)):
        return type(x)(map(_held, x))
    if isinstance(x, dict):
        return {key: _held(value) for key, value in x.items()}
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(x, **{f.name: _held(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return x


def _kind(x: Any) -> Any:
    """What a kernel's way through its code depends on: dtypes, last dimensions (not of masks), how large the others are."""
    if isinstance(x, torch.Tensor):
        if x.dtype == torch.bool:
            return x.dtype, *(n.bit_length() for n in x.shape)
        return x.dtype, *(n.bit_length() for n in x.shape[:-1]), *x.shape[-1:]
    if isinstance(x, (list, tuple)):
        return tuple(map(_kind, x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return tuple(_kind(getattr(x, f.name)) for f in dataclasses.fields(x))
    return x.bit_length() if type(x) is int else x


# ---- formulas, of tensors on the CPU


_restored: dict[tuple[int, torch.dtype], tuple[StorageWeakRef, torch.Tensor]] = {}


def _weight(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """A layer's weight in `dtype`, kept as long as its codes live."""
    storage = weight.codes.untyped_storage()
    key = storage._cdata, dtype
    if key not in _restored or _restored[key][0].expired():
        for old in [k for k, (alive, _) in _restored.items() if alive.expired()]:
            del _restored[old]
        _restored[key] = StorageWeakRef(storage), restore(weight, dtype).to(dtype)
    return _restored[key][1]


def _on_the_cpu(formula: Callable[..., Any]) -> Callable[..., Any]:
    """What it makes without saying where is there, whatever the default device."""

    def run(*args: Any, **options: Any) -> Any:
        with torch.device("cpu"):
            return formula(*args, **options)

    return run


def _quantized(x: torch.Tensor, weight: Any) -> torch.Tensor:
    return x @ _weight(weight, x.dtype).T


def _int8(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(a, b.T)


def _paged(*args: Any, **options: Any) -> torch.Tensor:
    from optinfer.kv_cache import paged_attention

    return paged_attention(*args, **options)  # on a CPU: loops in C++, or torch


def _flash(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from optinfer.attention import attention_reference

    result: Any = attention_reference(*args, **options)
    return (result[0], result[1].float()) if options.get("return_lse") else (result, None)


FORMULAS = {"quantized_matmul": _quantized, "int8_matmul": _int8, "paged_attention": _paged, "flash_attention": _flash}


# ---- measurements


def _measure_once() -> None:
    """Before the benchmarks are imported, which take `in_turns` by its name."""
    from optinfer import hardware, noise
    from optinfer.bench import timing

    in_turns = timing.in_turns
    noise.repeat = lambda sample, repeats=1, warmup=0, least=0.0: noise.Timing((sample(),), least)
    timing.in_turns = lambda calls, device, repeats, warmup=0: in_turns(calls, device, 1, 0)
    hardware.measure_bandwidth = lambda device: 3e12
    hardware.measure_matmul = lambda device, dtype: 7e14
    from optinfer.bench import attention

    problems = attention.problems
    attention.problems = lambda device, quick: problems(torch.device("cpu"), True)
