"""What every attention function here accepts, checked in one place. Needs torch only."""

import math
from dataclasses import dataclass

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class AttentionArguments:
    """Sizes of softmax(q kᵀ · scale) v, and its options, after checking."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    causal: bool
    scale: float
    window: int | None
    softcap: float | None

    @property
    def group(self) -> int:
        """Query heads that share one KV head: 1 for multi-head, `heads` for multi-query attention."""
        return self.heads // self.kv_heads

    @property
    def shift(self) -> int:
        """Query i stands at position i + shift among the keys: the last query sees the last key."""
        return self.kv_len - self.q_len


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> AttentionArguments:
    """Check the arguments of an attention function; `scale` defaults to 1/sqrt(head_dim).

    Raises TypeError for what is not a tensor or has the wrong dtype, ValueError for sizes, devices and options.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, tensor, q, dtypes)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    if v.shape != k.shape:
        raise ValueError(f"k and v must have one shape: k is {list(k.shape)}, v is {list(v.shape)}")
    if head_dim == 0:
        raise ValueError("head_dim must be at least 1")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads: q has {heads}, k has {kv_heads}")
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale!r}")
    if window is not None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"window must be a positive number of keys or None, got {window!r}")
        if not causal:
            raise ValueError("window counts the last keys up to the query itself: it needs causal=True")
    if softcap is not None and not (isinstance(softcap, int | float) and math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a positive number or None, got {softcap!r}")
    sizes = (batch, heads, kv_heads, q_len, kv_len, head_dim)
    return AttentionArguments(*sizes, bool(causal), float(scale), window, softcap)


def _check_tensor(name: str, tensor: torch.Tensor, q: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """One of q, k and v: four dimensions, and like q where they must be alike."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be [batch, heads, length, head_dim], got shape {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}; supported: {allowed}")
    if tensor.dtype != q.dtype:
        raise TypeError(f"q, k and v must have one dtype: q is {q.dtype}, {name} is {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"q, k and v must be on one device: q is on {q.device}, {name} on {tensor.device}")
    if tensor.shape[0] != q.shape[0]:
        raise ValueError(f"batch sizes differ: q has {q.shape[0]}, {name} has {tensor.shape[0]}")
    if tensor.shape[3] != q.shape[3]:
        raise ValueError(f"head_dim differs: q has {q.shape[3]}, {name} has {tensor.shape[3]}")
