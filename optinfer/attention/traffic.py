"""How many bytes attention moves between a GPU's memory (HBM) and its cores: counted, and predicted."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Kind = Literal["naive", "eager", "flash", "once"]
KINDS = get_args(Kind)


@dataclass
class HbmCounter:
    """Adds up the bytes of tensors that would be read from and written to HBM."""

    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def total(self) -> int:
        return self.bytes_read + self.bytes_written

    def read(self, *tensors: torch.Tensor) -> None:
        self.bytes_read += sum(t.numel() * t.element_size() for t in tensors)

    def write(self, *tensors: torch.Tensor) -> None:
        self.bytes_written += sum(t.numel() * t.element_size() for t in tensors)

    def load(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a read, hand the tensor on."""
        self.read(tensor)
        return tensor

    def store(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a write, hand the tensor on."""
        self.write(tensor)
        return tensor


def hbm_bytes(
    kind: Kind,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    itemsize: int,
    *,
    kv_heads: int | None = None,
    causal: bool = False,
    block_m: int = 64,
    block_n: int = 64,
) -> int:
    """Bytes that one forward pass of attention moves to and from HBM.

    Kinds:
        "naive": three kernels, scores · softmax · output. The N x M matrix is written, read, written and read.
        "eager": what transformers' eager attention launches: also repeats K and V, scales, adds a mask, takes the
            softmax in fp32 and casts back. About 24 bytes per score in 16 bit.
        "flash": tile by tile; each block of block_m rows reads all keys it sees. No help from the L2 cache.
        "once": q, k, v and the output once each. No exact attention moves less; a large L2 brings flash close.

    The truth for a flash kernel on a GPU lies between "flash" and "once". Derived from FlashAttention (Dao et al.
    2022), theorem 2, with the constants kept.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; not {kind!r}")
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = {"batch": batch, "heads": heads, "q_len": q_len, "kv_len": kv_len, "head_dim": head_dim}
    sizes |= {"itemsize": itemsize, "kv_heads": kv_heads, "block_m": block_m, "block_n": block_n}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")

    q_bytes = batch * heads * q_len * head_dim * itemsize  # the output has as many
    kv_bytes = 2 * batch * kv_heads * kv_len * head_dim * itemsize
    repeated_kv_bytes = kv_bytes * (heads // kv_heads)
    scores = batch * heads * q_len * kv_len

    if kind == "once":
        return 2 * q_bytes + kv_bytes
    if kind == "naive":
        return 2 * q_bytes + repeated_kv_bytes + 4 * scores * itemsize
    if kind == "eager":
        repeat = kv_bytes + repeated_kv_bytes if kv_heads != heads else 0
        mask = batch * q_len * kv_len * itemsize if causal else 0
        of_scores = scores * _eager_bytes_per_score(itemsize, causal)
        return 4 * q_bytes + repeated_kv_bytes + repeat + mask + of_scores  # q, out; out again, transposed
    seen = sum(_keys_read(start, q_len, kv_len, causal, block_m) for start in range(0, q_len, block_m))
    return 2 * q_bytes + 2 * batch * heads * seen * head_dim * itemsize


def _eager_bytes_per_score(itemsize: int, causal: bool) -> int:
    written = itemsize  # q kᵀ: write
    scaled = 2 * itemsize  # scale: read, write
    masked = 2 * itemsize if causal else 0  # mask: read, write
    softmax = itemsize + 4  # softmax: read, write in fp32
    cast = 4 + itemsize if itemsize != 4 else 0  # cast back
    return written + scaled + masked + softmax + cast + itemsize  # weights v: read


def _keys_read(first_row: int, q_len: int, kv_len: int, causal: bool, block_m: int) -> int:
    """Keys that the rows first_row ... first_row + block_m - 1 load between them."""
    if not causal:
        return kv_len
    return min(kv_len, max(min(first_row + block_m, q_len) + kv_len - q_len, 0))


def score_matrix_bytes(tokens: int, heads: int = 1, layers: int = 1, itemsize: int = 2) -> int:
    """The N x N matrix of scores, weighed: claim 6."""
    return tokens * tokens * heads * layers * itemsize


def attention_flops(batch: int, heads: int, q_len: int, kv_len: int, head_dim: int, causal: bool = False) -> float:
    """Multiply-adds count as two; causal counts half of a square, as the FlashAttention papers do."""
    return 4.0 * batch * heads * q_len * kv_len * head_dim * (0.5 if causal else 1.0)


def arithmetic_intensity(kind: Kind, *sizes: int, **options) -> float:
    """FLOP per byte of HBM traffic: `hbm_bytes` under `attention_flops`, same arguments."""
    batch, heads, q_len, kv_len, head_dim, _ = sizes
    flops = attention_flops(batch, heads, q_len, kv_len, head_dim, options.get("causal", False))
    moved = hbm_bytes(kind, *sizes, **options)
    return flops / moved if moved else math.inf
