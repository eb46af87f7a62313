"""One function, six ways to run it: `flash_attention(q, k, v, backend=...)`, and the choice of the way."""

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from optinfer import hardware
from optinfer.attention.online import online_softmax_attention
from optinfer.attention.reference import attention_reference, causal_mask
from optinfer_kernels.attention_arguments import DTYPES, AttentionArguments, check_attention

Backend = Literal["auto", "reference", "online", "sdpa", "triton", "triton_tma", "triton_ws"]
KERNELS: dict[Backend, str] = {
    "triton": "flash_attention",
    "triton_tma": "flash_attention_tma",
    "triton_ws": "flash_attention_ws",
}
BACKENDS = get_args(Backend)[1:]


class UnsupportedBackend(ValueError):
    """A backend was asked for by name and cannot do this; the message says why, and which can."""


@dataclass(frozen=True)
class Problem:
    """All that decides which backends can compute an attention."""

    device: str  # "cpu" or "cuda"
    capability: tuple[int, int] | None  # of the GPU
    dtype: torch.dtype
    head_dim: int
    q_len: int = 1024
    kv_len: int = 1024
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    return_lse: bool = False
    needs_grad: bool = False


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    backend: Backend = "auto",
    *,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · scale) v.

    Args:
        q: [batch, heads, q_len, head_dim], fp16, bf16 or fp32.
        k, v: [batch, kv_heads, kv_len, head_dim]; heads is a multiple of kv_heads (grouped-query attention).
        causal: each query sees the keys up to its own position, the last query up to the last key (bottom right).
        scale: multiplies the scores; 1/sqrt(head_dim) by default.
        backend: "auto", or one of
            "reference": the formula, with the whole matrix of scores;
            "online": the flash algorithm in plain torch;
            "sdpa": `torch.nn.functional.scaled_dot_product_attention`;
            "triton", "triton_tma", "triton_ws": our kernels, compiled on a GPU, interpreted on a CPU.
        window: with causal, a query sees at most this many keys, itself the last.
        softcap: logits become softcap * tanh(logits / softcap).
        return_lse: also return the log-sum-exp of the logits, [batch, heads, q_len] in fp32.

    Returns:
        out like q, or (out, lse). A query that sees no key gives zeros and -inf.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        UnsupportedBackend: the named backend cannot do this on this device; a ValueError.
        TritonMissing: a kernel was named and Triton is not installed; an ImportError.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}; not {backend!r}")
    a = check_attention(q, k, v, causal, scale, window, softcap)
    problem = Problem(
        device=q.device.type,
        capability=hardware.capability(q.device),
        dtype=q.dtype,
        head_dim=a.head_dim,
        q_len=a.q_len,
        kv_len=a.kv_len,
        causal=a.causal,
        window=window,
        softcap=softcap,
        return_lse=return_lse,
        needs_grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    if backend == "auto":
        backend, _ = choose(problem)
    elif reason := obstacle(backend, problem):
        if backend in KERNELS:
            _load(backend)  # raises TritonMissing when that is the reason
        able = [name for name in BACKENDS if obstacle(name, problem) is None]
        raise UnsupportedBackend(f"backend {backend!r} {reason}; these can: {', '.join(able)}")

    options: dict[str, Any] = {"window": window, "softcap": softcap, "return_lse": return_lse}
    if backend == "sdpa":
        return sdpa(q, k, v, a)
    if backend == "reference":
        result = attention_reference(q, k, v, a.causal, a.scale, **options)
        return (result[0], result[1].float()) if return_lse else result
    if backend == "online":
        return online_softmax_attention(q, k, v, a.causal, a.scale, **options)
    out, lse = _load(backend).flash_attention(q, k, v, a.causal, a.scale, **options)
    return (out, lse) if return_lse else out


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArguments) -> torch.Tensor:
    """torch's own attention, with our alignment: its `is_causal` counts from the top left, ours from the bottom right."""
    gqa = a.group > 1
    if not a.causal or (a.q_len == 1 and a.window is None):
        return F.scaled_dot_product_attention(q, k, v, scale=a.scale, enable_gqa=gqa)
    if a.shift == 0 and a.window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=a.scale, enable_gqa=gqa)
    mask = causal_mask(a.q_len, a.kv_len, a.window, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=a.scale, enable_gqa=gqa)
    return out.masked_fill(~mask.any(-1)[:, None], 0.0) if a.shift < 0 else out


def obstacle(backend: Backend, p: Problem) -> str | None:
    """Why this backend cannot solve this problem; None if it can."""
    if backend in ("reference", "online"):
        return None
    if backend == "sdpa":
        if p.softcap is not None:
            return "has no soft-cap"
        return "does not return the log-sum-exp" if p.return_lse else None
    if not triton_installed():
        return "needs Triton"
    if p.needs_grad:
        return "has no backward pass"
    if p.device not in ("cpu", "cuda"):
        return f"runs on cuda, and interpreted on cpu; not on {p.device}"
    if p.head_dim > 256:
        return f"takes head dimensions up to 256, not {p.head_dim}"
    if backend == "triton":
        if p.capability and p.capability < (7, 5):
            return f"needs compute capability 7.5, this GPU has {_dotted(p.capability)}"
        if p.capability and p.capability < (8, 0) and p.dtype == torch.bfloat16:
            return "has no bfloat16 before compute capability 8.0"
        return None
    if p.dtype == torch.float32:
        return "takes float16 and bfloat16, not float32"
    if p.head_dim % 8:
        return f"needs rows of a multiple of 16 bytes (TMA): head_dim a multiple of 8, not {p.head_dim}"
    if backend == "triton_tma":
        if p.capability and p.capability < (9, 0):
            return f"needs a TMA unit: compute capability 9.0, this GPU has {_dotted(p.capability)}"
        return None
    if p.capability and p.capability[0] != 9:
        return f"is specialized for compute capability 9.0, this GPU has {_dotted(p.capability)}"
    if p.window is not None or p.softcap is not None:
        return "has neither window nor soft-cap: a second masked loop would undo the specialization"
    if p.head_dim > 128:
        return f"takes head dimensions up to 128, not {p.head_dim}: the accumulator would spill"
    return None


def choose(p: Problem) -> tuple[Backend, str]:
    """(backend, reason) that `auto` takes."""
    if p.device == "cpu":
        if obstacle("sdpa", p) is None:
            return "sdpa", "on a CPU torch's own kernel is the fast one; ours are interpreted there"
        return "online", f"sdpa {obstacle('sdpa', p)}, and plain torch is the fastest way left on a CPU"
    needs_mask = p.causal and p.q_len != p.kv_len and p.q_len != 1
    mask_free = obstacle("sdpa", p) is None and p.window is None and not needs_mask
    if mask_free:
        return "sdpa", "torch's fused kernels cover this, and no recorded measurement on this GPU shows ours faster"
    fastest_first: tuple[Backend, ...] = ("triton_tma", "triton")
    kernels = [name for name in fastest_first if obstacle(name, p) is None]
    if kernels and p.dtype != torch.float32:
        why = obstacle("sdpa", p) or "needs the whole mask in memory for this"
        return kernels[0], f"sdpa {why}; the kernel has no such limit"
    if obstacle("sdpa", p) is None:
        return "sdpa", "torch handles this with an explicit mask"
    return "online", f"sdpa {obstacle('sdpa', p)} and no kernel fits"


def select_backend(
    device: str | torch.device,
    capability: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int = 128,
    q_len: int = 1024,
    kv_len: int = 1024,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[str, str]:
    """What `flash_attention(..., backend="auto")` would take for such inputs on such a device, and why.

    Needs no GPU: `select_backend("cuda", (9, 0), torch.bfloat16, 128, 4096, 4096)`.
    """
    if dtype is None:
        dtype = torch.float16 if capability and capability < (8, 0) else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}; not {dtype}")
    kind = torch.device(device).type
    return choose(Problem(kind, capability, dtype, head_dim, q_len, kv_len, causal, window, softcap, return_lse))


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _load(backend: Backend):
    return importlib.import_module(f"optinfer_kernels.{KERNELS[backend]}")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
