"""Run Triton kernels on a CPU: the same source, executed by Triton's interpreter (NumPy) instead of compiled.

Triton decides this once, when it is first imported, from the environment variable TRITON_INTERPRET. That is awkward
in a notebook and in a test run that also compiles. Here the choice is made per launch:

    launch(kernel, grid, *args, **options)     # compiled for CUDA tensors, interpreted for CPU tensors
    with interpreted(): ...                    # interpret CUDA tensors too

The variable keeps working: with TRITON_INTERPRET=1 every kernel is already interpreted and `launch` only calls it.

Two kinds of repair live here, both tested against Triton 3.6, 3.7 and 3.9:
 - `_repair_arithmetic`: bfloat16 is a second-class citizen in the interpreter and fails silently; `tl.dot_scaled` is missing;
 - `_session`: swap kernels and Triton's own library for interpreted twins, then restore every attribute.
"""

import contextlib
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from optinfer_kernels import acting_capability, require_triton

if TYPE_CHECKING:
    import torch

triton = require_triton()

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as _triton_interpreter  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


class Launcher(Protocol):
    """Who takes launches in this module's place, such as the emulator; `arch` is the compute capability times ten."""

    @property
    def arch(self) -> int: ...

    @property
    def processors(self) -> int: ...

    def launch(self, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None: ...


_lock = threading.RLock()  # the interpreter patches triton.language globally: one launch at a time
_forced = False
_stand_in: Launcher | None = None  # what every launch goes to instead, such as the emulator


def launch(kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel[grid](*args, **options)`: compiled if the tensors are on a GPU, interpreted if they are not.

    Compile options such as `num_warps` may be given in both cases; the interpreter ignores them.
    Interpreted launches take turns: one at a time per process, whatever the number of threads.
    """
    if isinstance(kernel, _Twin):  # another thread's session has it swapped just now
        kernel = kernel.original
    if _stand_in is not None:
        _stand_in.launch(kernel, grid, *args, **options)
        return
    with _lock, np.errstate(all="ignore"):  # a GPU does not warn of log(0) either
        if not isinstance(kernel, JITFunction):  # TRITON_INTERPRET=1: it is interpreted already
            _repair_arithmetic()
            kernel[grid](*args, **options)
        elif _forced or not any(getattr(arg, "is_cuda", False) for arg in _tensors(args)):
            with _session(kernel) as twin:
                twin[grid](*args, **options)
        else:
            kernel[grid](*args, **options)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Interpret every kernel launched inside, also those on CUDA tensors (copied to the host and back)."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def launches_go_to(gpu: Launcher) -> Iterator[None]:
    """Inside, `launch` calls `gpu.launch` whatever the device of the tensors, and `device_shape` is the one of `gpu`."""
    global _stand_in
    before, _stand_in = _stand_in, gpu
    try:
        yield
    finally:
        _stand_in = before


def will_interpret(device: "torch.device | str") -> bool:
    """Whether `launch` would interpret a kernel whose tensors are on `device`."""
    if _stand_in is not None:
        return False
    return _forced or getattr(device, "type", str(device)).split(":")[0] != "cuda" or _environment_interprets()


def device_shape(device: "torch.device | str") -> tuple[int, int]:
    """(compute capability times ten, number of processors); a small imaginary GPU where kernels are interpreted.

    `acting_capability` comes before the real one.
    """
    capability, processors = (8, 0), 8
    if _stand_in is not None:
        return _stand_in.arch, _stand_in.processors
    if not will_interpret(device):
        import torch

        properties = torch.cuda.get_device_properties(device)
        capability, processors = (properties.major, properties.minor), properties.multi_processor_count
    major, minor = acting_capability() or capability
    return 10 * major + minor, processors


def _environment_interprets() -> bool:
    return not isinstance(tl.standard.sum, JITFunction)


def _tensors(args: tuple) -> Iterator[Any]:
    for arg in args:
        yield getattr(arg, "base", arg) if type(arg).__name__ == "TensorDescriptor" else arg


# ---- the switch -------------------------------------------------------------------------------------------------


class _Twin(_triton_interpreter.InterpretedFunction):
    """An interpreted kernel whose helper calls do not patch `triton.language` again: `_session` did it once."""

    original: JITFunction

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.rewrite()(*args, **kwargs)
        except _triton_interpreter.InterpreterError:
            raise
        except Exception as error:
            raise _triton_interpreter.InterpreterError(repr(error)) from error


def _twin(function: JITFunction) -> _Twin:
    twin = _twin_of(function.fn)  # hashing a JITFunction itself would hash its source and all it calls
    twin.original = function
    return twin


@functools.cache
def _twin_of(function: Callable) -> _Twin:
    return _Twin(function)


def _namespaces(kernel: JITFunction) -> list[dict]:
    """The global namespaces of a kernel and of every helper it can reach."""
    found: dict[int, dict] = {}
    todo = [kernel]
    while todo:
        namespace = todo.pop().fn.__globals__
        if id(namespace) not in found:
            found[id(namespace)] = namespace
            todo += [value for value in namespace.values() if isinstance(value, JITFunction)]
    return list(found.values())


@contextlib.contextmanager
def _session(kernel: JITFunction) -> Iterator[_Twin]:
    """Lend out the interpreted twin of `kernel`.

    `tl.max`, `tl.sum`, `tl.zeros`... are themselves @triton.jit functions, so they need twins as well, and so do the
    kernel's own helpers. Everything is put back afterwards, so compiling in the same process still works.
    """
    with _lock:
        _repair_arithmetic()
        modules = [m for name, m in list(sys.modules.items()) if name.startswith("triton.language") and m]
        spaces = [*map(vars, modules), *_namespaces(kernel)]
        classes = [tl.tensor, tl.dtype, tl.core.tensor_descriptor_base]
        spaces_before = [(space, dict(space)) for space in spaces]
        classes_before = [(cls, dict(vars(cls))) for cls in classes]
        knob = triton.knobs.runtime.interpret
        try:
            triton.knobs.runtime.interpret = True
            for space, names in spaces_before:
                space.update({name: _twin(f) for name, f in names.items() if isinstance(f, JITFunction)})
                space["interpreter_semantic"] = _triton_interpreter.interpreter_semantic  # twins refer to it
            everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
            _triton_interpreter._patch_lang(everything)
            yield _twin(kernel)
        finally:
            triton.knobs.runtime.interpret = knob
            for space, names in spaces_before:
                for name in space.keys() - names.keys():
                    if not isinstance(space[name], types.ModuleType):  # a submodule first imported meanwhile stays
                        del space[name]
                space.update(names)
            for cls, names in classes_before:
                now = dict(vars(cls))
                for name in now.keys() - names.keys():
                    delattr(cls, name)
                for name, value in names.items():
                    if now.get(name) is not value:
                        setattr(cls, name, value)


# ---- arithmetic -------------------------------------------------------------------------------------------------


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _bf16_to_fp32(handle: Any) -> Any:
    """bfloat16 is the upper half of a float32, so widening is a shift: exact."""
    bits = handle.data.astype(np.uint32) << 16
    return _triton_interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _fp32_to_bf16(data: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, as GPUs do; the result is the bit pattern in uint16."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(data))


def _scaled(data: np.ndarray, scale: Any, form: str) -> np.ndarray:
    """An operand of `tl.dot_scaled`, rows [..., k] or [..., k / 2] in bit patterns, as the float32 numbers it stands for."""
    import torch

    codes = torch.from_numpy(np.ascontiguousarray(data))
    if form == "E2M1":  # two codes in a byte, the first in the low half
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()
        magnitude = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cpu")[codes & 7]
        values = torch.where(codes > 7, -magnitude, magnitude)
    else:
        dtypes = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2, "BF16": torch.bfloat16, "FP16": torch.float16}
        values = codes.view(dtypes[form]).float()
    if scale is not None:
        bits = torch.from_numpy(np.ascontiguousarray(scale.data))
        is_e4m3 = scale.dtype.scalar == tl.float8e4nv
        scales = bits.view(torch.float8_e4m3fn).float() if is_e4m3 else torch.exp2(bits.float() - 127)
        values = values * scales.repeat_interleave(values.shape[-1] // scales.shape[-1], -1)
    return values.numpy()


@functools.cache
def _repair_arithmetic() -> None:
    """Make bfloat16 right, or loud, in the interpreter. Idempotent; never undone: it only touches the interpreter.

    The interpreter keeps bfloat16 as uint16 and, in every version so far, `tl.dot` multiplies those bit patterns,
    float32 -> bfloat16 truncates instead of rounding, and integer -> bfloat16 copies the integer's bits. All without
    an error. Here dot and casts are put right, and elementwise bfloat16 arithmetic raises: kernels convert with
    `.to(tl.float32)` first, which costs nothing on a GPU.
    """
    builder = _triton_interpreter.InterpreterBuilder
    _repair_casts(builder)
    _repair_products(builder)
    for name in ("binary_op", "unary_op", "create_fma"):
        _refuse_bf16(builder, name)
    _repair_loop_bounds()


def _widened(handle: Any) -> Any:
    return _bf16_to_fp32(handle) if _is_bf16(handle.dtype) else handle


def _repair_casts(builder: Any) -> None:
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        if _is_bf16(dst_type) and not _is_bf16(src.dtype):
            rounded = _fp32_to_bf16(np.asarray(src.data, dtype=np.float32))
            return _triton_interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, src if _is_bf16(dst_type) else _widened(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_bf16(dst_type) and src.dtype.scalar.is_fp8():  # bit patterns on both sides
            return cast_impl(self, convert(self, src, tl.float32, None), dst_type)
        if _is_bf16(src.dtype) and dst_type.scalar.is_fp8():
            return convert(self, _widened(src), dst_type, rounding_mode)
        if _is_bf16(dst_type) or _is_bf16(src.dtype):
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_products(builder: Any) -> None:
    """`tl.dot` of bfloat16, and `tl.dot_scaled`, which the interpreter does not have."""
    dot, semantic = builder.create_dot, _triton_interpreter.interpreter_semantic
    dot_scaled = semantic.dot_scaled

    def create_dot(self, a, b, acc, *rest):
        return dot(self, _widened(a), _widened(b), acc, *rest)  # products of bf16 are exact in fp32, as in hardware

    def create_dot_scaled(self, a, a_scale, a_format, b, b_scale, b_format, fast_math, a_k_pack, b_k_pack, acc):
        if not (a_k_pack and b_k_pack):
            raise NotImplementedError("tl.dot_scaled in the Triton interpreter: operands must be packed along k")
        left = _scaled(a.data, a_scale, a_format.name)
        right = _scaled(b.data.swapaxes(-1, -2), b_scale, b_format.name).swapaxes(-1, -2)
        summed = (left @ right).astype(acc.data.dtype) + acc.data
        return _triton_interpreter.TensorHandle(summed, acc.dtype.scalar)

    def dot_scaled_of_strings(a, a_scale, a_format, b, b_scale, b_format, *rest):  # constants are plain strings here
        return dot_scaled(a, a_scale, tl.constexpr(a_format), b, b_scale, tl.constexpr(b_format), *rest)

    builder.create_dot, builder.create_dot_scaled = create_dot, create_dot_scaled
    semantic.dot_scaled = dot_scaled_of_strings


def _refuse_bf16(builder: Any, name: str) -> None:
    operation = getattr(builder, name)

    def guarded(self, first, *rest):
        if _is_bf16(first.dtype) and first.data.dtype == np.uint16:
            raise TypeError(
                "bfloat16 arithmetic in the Triton interpreter would work on bit patterns: "
                "convert with .to(tl.float32) first"
            )
        return operation(self, first, *rest)

    setattr(builder, name, guarded)


def _repair_loop_bounds() -> None:
    """Triton 3.6 with NumPy >= 2.4: int() of a one-element array raises, so run-time loop bounds do."""
    patch_tensor = _triton_interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    _triton_interpreter._patch_lang_tensor = patch_lang_tensor
