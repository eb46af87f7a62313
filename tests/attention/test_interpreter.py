"""The interpreter's repairs, and that switching leaves no trace: the compiler works before, between and after."""

import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from optinfer_kernels.interpreter import _fp32_to_bf16, interpreted, launch, will_interpret  # noqa: E402

UNDER_VARIABLE = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def double(x):
    return x + x


@triton.jit
def softmax_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(double(x) / 2 - tl.max(x, 0))
    tl.store(out_ptr + cols, (e / tl.sum(e, 0)).to(out_ptr.dtype.element_ty), mask=cols < n)


@triton.jit
def bf16_add_kernel(x_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    tl.store(x_ptr + cols, x + x)


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, tl.load(x_ptr + cols).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))


def softmax(x):
    out = torch.empty_like(x)
    launch(softmax_kernel, (1,), x, out, x.numel(), 64)
    return out


def namespace(owners=None):
    """Every name of Triton's language and of this module; pass the first answer to look at the same owners again.

    Without the submodules, which Triton imports on first use.
    """
    if owners is None:
        modules = [m for name, m in sys.modules.items() if name.startswith("triton.language")]
        owners = [*modules, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, sys.modules[__name__]]
    else:
        owners = {owner for owner, _ in owners}
    return {
        (owner, name): id(value)
        for owner in owners
        for name, value in vars(owner).items()
        if not isinstance(value, types.ModuleType)
    }


def test_library_and_helpers_are_interpreted_and_restored():
    x = torch.randn(50)
    before = namespace()
    torch.testing.assert_close(softmax(x), torch.softmax(x, 0))
    assert namespace(before) == before


def test_a_submodule_imported_meanwhile_stays():
    """torch.compile reads `triton.language.extra.libdevice`, which Triton itself imports on the first launch."""
    from optinfer_kernels import interpreter

    tl.extra.__dict__.pop("libdevice", None)
    sys.modules.pop("triton.language.extra.libdevice", None)
    with interpreter._session(softmax_kernel):
        from triton.language.extra import libdevice  # noqa: F401
    assert tl.extra.libdevice is sys.modules["triton.language.extra.libdevice"]


def test_restored_after_an_error():
    before = namespace()
    with pytest.raises(Exception, match="bfloat16 arithmetic"):
        launch(bf16_add_kernel, (1,), torch.ones(16, dtype=torch.bfloat16), 16)
    assert namespace(before) == before
    x = torch.randn(10)
    torch.testing.assert_close(softmax(x), torch.softmax(x, 0))


@pytest.mark.skipif(UNDER_VARIABLE, reason="with TRITON_INTERPRET=1 nothing compiles")
def test_compiles_after_interpreting():
    from optinfer_kernels.compile import compile_for

    softmax(torch.randn(10))
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}
    assert compile_for(80, softmax_kernel, signature, {"BLOCK": 64}).registers > 0
    softmax(torch.randn(10))


@pytest.mark.parametrize("source", (torch.float32, torch.float16, torch.int8, torch.int32, torch.bfloat16))
def test_casts_to_bf16_round_to_nearest_even(source):
    x = torch.randn(4096) * 50 if source.is_floating_point else torch.randint(-128, 127, (4096,))
    x = x.to(source)
    out = torch.empty(4096, dtype=torch.bfloat16)
    launch(cast_kernel, (1,), x, out, 4096)
    assert torch.equal(out, x.to(torch.bfloat16))


@pytest.mark.parametrize("target", (torch.float32, torch.float16, torch.int32))
def test_casts_from_bf16(target):
    x = (torch.randn(4096) * 50).to(torch.bfloat16)
    out = torch.empty(4096, dtype=target)
    launch(cast_kernel, (1,), x, out, 4096)
    assert torch.equal(out, x.to(target))


def test_rounding_of_special_values():
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, 3.4e38, 1.00390625, 1.01171875], dtype=np.float32)
    ours = torch.from_numpy(_fp32_to_bf16(special).view(np.int16)).view(torch.bfloat16)
    theirs = torch.from_numpy(special).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~theirs.isnan()].view(torch.int16), theirs[~theirs.isnan()].view(torch.int16))


def test_bf16_dot_multiplies_numbers_not_bit_patterns():
    a, b = (torch.randn(16, 16).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(16, 16)
    launch(dot_kernel, (1,), a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_threads_take_turns():
    x = torch.randn(50)
    expected, wrong = torch.softmax(x, 0), []

    def work():
        for _ in range(3):
            try:
                torch.testing.assert_close(softmax(x), expected)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@triton.jit
def through_fp8_kernel(x_ptr, fp8_ptr, back_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < n, other=0.0)
    fp8 = x.to(tl.float8e4nv)
    tl.store(fp8_ptr + cols, fp8.to(tl.uint8, bitcast=True), mask=cols < n)
    tl.store(back_ptr + cols, fp8.to(tl.bfloat16), mask=cols < n)


def test_fp8_to_bf16_and_back():
    """All finite codes of E4M3, subnormals too: bit patterns on both sides."""
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    x = codes.view(torch.float8_e4m3fn).bfloat16()
    out, back = torch.empty_like(codes), torch.empty_like(x)
    launch(through_fp8_kernel, (1,), x, out, back, len(x), BLOCK=256)
    assert torch.equal(out.view(torch.float8_e4m3fn).float(), x.float()) and torch.equal(back, x)


def test_which_tensors_are_interpreted():
    assert will_interpret("cpu") and will_interpret(torch.device("cpu"))
    assert will_interpret("cuda:0") == UNDER_VARIABLE
    with interpreted():
        assert will_interpret("cuda")


def test_the_environment_variable_works_too():
    code = """
import torch
from optinfer.attention import flash_attention, attention_reference
q = torch.randn(1, 2, 40, 32).bfloat16()
out = flash_attention(q, q, q, True, backend="triton")
print(float((out.double() - attention_reference(q.double(), q.double(), q.double(), True)).abs().max()))
try:
    from optinfer_kernels import compile, flash_attention as f
    compile.compile_for(80, f.flash_attention_kernel, {}, {})
except RuntimeError as error:
    print(error)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    error, refusal = done.stdout.strip().split("\n")
    assert float(error) < 0.02 and "TRITON_INTERPRET is set" in refusal
