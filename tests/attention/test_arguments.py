"""Bad input is refused by name, before anything runs; and `auto` can say what it takes and why."""

import subprocess
import sys

import pytest
import torch

from optinfer.attention import (
    BACKENDS,
    UnsupportedBackend,
    attention_reference,
    flash_attention,
    online_softmax_attention,
    select_backend,
)
from optinfer.attention.dispatch import Problem, obstacle
from optinfer_kernels import TritonMissing


def qkv(heads=4, kv_heads=2, q_len=5, kv_len=7, head_dim=16, dtype=torch.float16):
    return torch.zeros(1, heads, q_len, head_dim, dtype=dtype), *torch.zeros(
        2, 1, kv_heads, kv_len, head_dim, dtype=dtype
    )


BAD = {
    "must be a multiple of KV heads: q has 4, k has 3": lambda q, k, v: ((q, *torch.zeros(2, 1, 3, 7, 16).half()), {}),
    "head_dim differs: q has 16, k has 8": lambda q, k, v: ((q, k[..., :8], v), {}),
    "k and v must have one shape": lambda q, k, v: ((q, k, v[:, :, :3]), {}),
    "batch sizes differ: q has 1, k has 2": lambda q, k, v: ((q, *torch.zeros(2, 2, 2, 7, 16).half()), {}),
    "one dtype: q is torch.float16, k is torch.bfloat16": lambda q, k, v: ((q, k.bfloat16(), v), {}),
    r"one device: q is on \S+, k on meta": lambda q, k, v: ((q, k.to("meta"), v), {}),
    "q has dtype torch.int8; supported": lambda q, k, v: ((q.to(torch.int8), k, v), {}),
    r"q must be \[batch, heads, length, head_dim\], got shape \[4, 5, 16\]": lambda q, k, v: ((q[0], k, v), {}),
    "q must be a torch.Tensor, not list": lambda q, k, v: (([1.0], k, v), {}),
    "scale must be a positive number, got 0": lambda q, k, v: ((q, k, v), {"scale": 0}),
    "scale must be a positive number, got -1.0": lambda q, k, v: ((q, k, v), {"scale": -1.0}),
    "scale must be a positive number, got nan": lambda q, k, v: ((q, k, v), {"scale": float("nan")}),
    "window must be a positive number of keys or None, got 0": lambda q, k, v: ((q, k, v), {"causal": True, "window": 0}),
    "window counts the last keys .* needs causal=True": lambda q, k, v: ((q, k, v), {"window": 4}),
    "softcap must be a positive number or None, got -2": lambda q, k, v: ((q, k, v), {"softcap": -2}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    args, options = BAD[message](*qkv())
    for function in (flash_attention, attention_reference, online_softmax_attention):
        with pytest.raises((ValueError, TypeError), match=message):
            function(*args, **options)


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="backend must be auto, reference, online, sdpa, triton, .*; not 'cudnn'"):
        flash_attention(*qkv(), backend="cudnn")


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    (
        ("sdpa", {"softcap": 5.0}, "'sdpa' has no soft-cap; these can: reference, online, triton"),
        ("sdpa", {"return_lse": True}, "'sdpa' does not return the log-sum-exp; these can: reference, online, triton"),
        ("triton_ws", {"softcap": 5.0}, "'triton_ws' has neither window nor soft-cap"),
    ),
)
def test_forced_backend_that_cannot(backend, options, message):
    pytest.importorskip("triton")
    if backend == "triton_ws" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        message = "'triton_ws' is specialized for compute capability 9.0"  # that comes first
    with pytest.raises(UnsupportedBackend, match=message):
        flash_attention(*qkv(), backend=backend, **options)


def test_kernels_refuse_what_they_do_not_have():
    pytest.importorskip("triton")
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(UnsupportedBackend, match="takes float16 and bfloat16, not float32; these can: .*triton"):
        flash_attention(q, k, v, backend="triton_tma")
    with pytest.raises(UnsupportedBackend, match="has no backward pass"):
        flash_attention(q.requires_grad_(), k, v, backend="triton")
    with pytest.raises(UnsupportedBackend, match="up to 256, not 512"):
        flash_attention(*qkv(head_dim=512), backend="triton")
    with pytest.raises(UnsupportedBackend, match="multiple of 8, not 12"):
        flash_attention(*qkv(head_dim=12), backend="triton_tma")


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "reason"),
    (
        ("triton", (7, 0), torch.float16, "needs compute capability 7.5, this GPU has 7.0"),
        ("triton", (7, 5), torch.bfloat16, "no bfloat16"),
        ("triton_tma", (8, 9), torch.float16, "needs a TMA unit: compute capability 9.0, this GPU has 8.9"),
        ("triton_ws", (12, 0), torch.float16, "specialized for compute capability 9.0, this GPU has 12.0"),
        ("triton", (7, 5), torch.float16, None),
        ("triton_tma", (10, 0), torch.bfloat16, None),
        ("triton_ws", (9, 0), torch.bfloat16, None),
    ),
)
def test_what_each_gpu_can(backend, capability, dtype, reason):
    pytest.importorskip("triton")
    found = obstacle(backend, Problem("cuda", capability, dtype, 128))
    assert found is None if reason is None else reason in found


def test_auto_says_why():
    assert select_backend("cpu")[0] == "sdpa"
    assert select_backend("cpu", softcap=30.0)[0] == "online"
    assert select_backend("cuda", (9, 0))[0] == "sdpa"
    if obstacle("triton", Problem("cuda", (9, 0), torch.float16, 128)) is None:
        assert select_backend("cuda", (9, 0), window=512)[0] == "triton_tma"
        assert select_backend("cuda", (8, 0), q_len=512, kv_len=4096)[0] == "triton"
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        name, reason = select_backend("cuda", capability)
        assert name in BACKENDS and len(reason) > 20


def test_without_triton_the_error_explains_itself():
    code = """
import sys
sys.modules["triton"] = None                      # what `import triton` meets on macOS and Windows
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch, optinfer.attention as A
q = torch.randn(1, 2, 8, 16)
print(A.flash_attention(q, q, q).shape, A.select_backend("cuda", (9, 0), window=5)[0])
try:
    A.flash_attention(q, q, q, backend="triton")
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 2, 8, 16]) sdpa" in done.stdout
    assert "TritonMissing" in done.stdout and "backend='reference', 'online' or 'sdpa'" in done.stdout
    assert issubclass(TritonMissing, ImportError)


def test_who_lent_scratch_memory_lends_again():
    """Triton's own `set_allocator` is seen through, and what it held before stands again after the kernel, or after an error."""
    import triton
    from triton.runtime import _allocation

    from optinfer_kernels.scratch import scratch_memory

    def mine(size, alignment, stream):
        raise AssertionError("nothing is asked for here")

    before = _allocation._allocator.get()
    triton.set_allocator(mine)
    try:
        with scratch_memory(torch.device("cpu")):
            assert _allocation._allocator.get() is mine
        with pytest.raises(RuntimeError, match="launch"), scratch_memory(torch.device("cuda")):
            lent = _allocation._allocator.get()
            assert lent is not mine
            raise RuntimeError("launch")
        assert _allocation._allocator.get() is mine
    finally:
        triton.set_allocator(before)
