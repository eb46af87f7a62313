"""Flash attention, forward: softmax(q kᵀ · scale) v without ever storing the scores.

One program computes BLOCK_M rows of the output. It keeps three things in registers, a running maximum `m`, a running
sum `l` and an unnormalized output `acc`, walks over K and V in tiles of BLOCK_N rows, and brings the three up to date
after each tile. At the end it divides once. HBM sees q, k, v and out; the N x N scores live and die on the chip.

Read in this order: `online_softmax_step` (the idea), `attend` (one walk over tiles), `flash_attention_kernel` (which
tiles, for which rows), `flash_attention` (the launch).

Sources: FlashAttention (Dao et al. 2022, arXiv 2205.14135), FlashAttention-2 (Dao 2023, arXiv 2307.08691, alg. 1),
online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

import math
from dataclasses import dataclass, replace

import torch

from optinfer_kernels import acting_capability, require_triton
from optinfer_kernels.attention_arguments import AttentionArguments, check_attention

triton = require_triton()

import triton.language as tl  # noqa: E402

from optinfer_kernels.interpreter import device_shape, launch, will_interpret  # noqa: E402

LOG2E = math.log2(math.e)  # GPUs compute 2^x, not e^x: the scale absorbs the difference
MAX_HEAD_DIM = 256


# ---- the kernel -------------------------------------------------------------------------------------------------


@triton.jit
def online_softmax_step(scores, m, l, acc, scale):
    """Take one more tile of scores into account.

    m: the largest logit of each row so far, in base 2. l: the sum of 2^(logit - m). acc: the same sum, weighted with V.
    When a larger logit turns up, everything summed so far was measured against the wrong maximum, by the one factor
    2^(m - m_new): shrink it, then add the tile. Exact in real arithmetic, whatever the order of the tiles.
    """
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - m_new[:, None])  # one multiply-add and one exp2 per score
    shrink = tl.math.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    return p, m_new, l, acc


@triton.jit
def is_visible(rows, cols, kv_len, shift, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which keys (cols) each query (rows) may see. Query i stands at key position i + shift."""
    visible = cols[None, :] < kv_len
    if CAUSAL:
        visible = visible & (cols[None, :] <= rows[:, None] + shift)
    if WINDOWED:
        visible = visible & (cols[None, :] > rows[:, None] + shift - window)
    return visible


@triton.jit
def tanh(x):
    """tanh in fp32. Near 0 the formula by exp2 cancels, and its odd series is used (error below 1e-8 of the value)."""
    t = tl.math.exp2(tl.abs(x) * (-2 * 1.4426950408889634))  # in (0, 1]: nothing can overflow
    large = tl.where(x < 0, t - 1, 1 - t) / (1 + t)
    x2 = x * x
    small = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(x2 < 0.0625, small, large)


@triton.jit
def load_rows(base, rows, stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INSIDE: tl.constexpr):
    """A tile [rows, BLOCK_D] of a matrix [length, HEAD_DIM]; zeros outside. INSIDE promises that all rows exist."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + dims[None, :]
    if INSIDE and HEAD_DIM == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(rows[:, None] < length) & (dims[None, :] < HEAD_DIM), other=0.0)
    return tile


@triton.jit
def attend(
    q, k_base, v_base, m, l, acc, rows, first, last,
    k_stride, v_stride, kv_len, shift, window, scale, cap_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk over the keys first..last in tiles. MASKED is off where every query of the tile sees every key."""
    for start in tl.range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, cols, k_stride, kv_len, HEAD_DIM, BLOCK_D, not MASKED)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if SOFTCAP:
            scores = tanh(scores * cap_scale)
        if MASKED:
            scores = tl.where(is_visible(rows, cols, kv_len, shift, window, CAUSAL, WINDOWED), scores, -float("inf"))
        p, m, l, acc = online_softmax_step(scores, m, l, acc, scale)
        v = load_rows(v_base, cols, v_stride, kv_len, HEAD_DIM, BLOCK_D, not MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return m, l, acc


@triton.jit
def key_range(
    first_row, kv_len, shift, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Cut the keys of BLOCK_M rows where the mask begins to matter; cuts before the last are multiples of BLOCK_N.

        keys   0 ........ begin ................ ragged ...... end
                 unseen          seen by all           mask        unseen

    Most tiles lie in the middle run, which needs no mask. A window has a second ragged edge: there, mask everything.
    """
    begin = 0
    ragged = kv_len
    end = kv_len
    if CAUSAL:
        ragged = tl.minimum(kv_len, tl.maximum(first_row + 1 + shift, 0))  # what the first row sees
        end = tl.minimum(kv_len, tl.maximum(first_row + BLOCK_M + shift, 0))  # what the last row sees
    ragged = ragged // BLOCK_N * BLOCK_N
    if WINDOWED:
        begin = tl.maximum(first_row + 1 + shift - window, 0) // BLOCK_N * BLOCK_N
        ragged = begin
    return begin, ragged, end


@triton.jit
def flash_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, out_stride_b, out_stride_h, out_stride_n,
    group, q_len, kv_len, window, scale, cap_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    STORE_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, heads, batch). `scale` includes log2(e); head_dim is padded to BLOCK_D, a power of two."""
    # Which rows, of which head. Causal rows see more keys the later they stand: start the longest ones first.
    block = tl.program_id(0)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)  # offsets of whole sequences may pass 2^31
    q_base = q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h
    k_base = k_ptr + batch * k_stride_b + (head // group).to(tl.int64) * k_stride_h  # shared KV heads, not repeated
    v_base = v_ptr + batch * v_stride_b + (head // group).to(tl.int64) * v_stride_h

    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    shift = kv_len - q_len
    q = load_rows(q_base, rows, q_stride_n, q_len, HEAD_DIM, BLOCK_D, False)

    # m starts low but finite, so that a row that sees nothing meets no inf - inf.
    m = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, ragged, end = key_range(first_row, kv_len, shift, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED)
    if not WINDOWED:
        m, l, acc = attend(
            q, k_base, v_base, m, l, acc, rows, begin, ragged, k_stride_n, v_stride_n, kv_len, shift, window,
            scale, cap_scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOWED, SOFTCAP, False, PRECISION,
        )  # fmt: skip
    m, l, acc = attend(
        q, k_base, v_base, m, l, acc, rows, ragged, end, k_stride_n, v_stride_n, kv_len, shift, window,
        scale, cap_scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOWED, SOFTCAP, True, PRECISION,
    )  # fmt: skip

    # Divide once. A row that saw nothing has l = 0: its output is 0 and its log-sum-exp is -inf.
    out = acc / tl.where(l > 0, l, 1.0)[:, None]
    dims = tl.arange(0, BLOCK_D)
    out_base = out_ptr + batch * out_stride_b + head.to(tl.int64) * out_stride_h
    out_pointers = out_base + rows[:, None] * out_stride_n + dims[None, :]
    inside = (rows[:, None] < q_len) & (dims[None, :] < HEAD_DIM)
    tl.store(out_pointers, out.to(out_ptr.dtype.element_ty), mask=inside)
    if STORE_LSE:
        store_lse(lse_ptr, m, l, rows, q_len, head, batch, tl.num_programs(1))


@triton.jit
def store_lse(lse_ptr, m, l, rows, q_len, head, batch, heads):
    """log(sum(exp(logits))) of every row, natural logarithm, into a contiguous [batch, heads, q_len]."""
    lse = tl.where(l > 0, (m + tl.math.log2(l)) * 0.6931471805599453, -float("inf"))
    tl.store(lse_ptr + (batch * heads + head) * q_len + rows, lse, mask=rows < q_len)


# ---- tiles ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How much of the problem one program holds, and with how many warps and tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    """head_dim padded to what `tl.dot` takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


# (bytes per element, padded head_dim) -> tile. Large tiles do more arithmetic per byte loaded, until the accumulator
# (block_m x head_dim in fp32) and the scores no longer fit the registers. Every entry compiles without a spill.
_FP32 = {
    (4, 32): Tile(32, 32, 8, 2),
    (4, 64): Tile(64, 32, 8, 2),
    (4, 128): Tile(16, 32, 8, 2),
    (4, 256): Tile(16, 16, 8, 1),
}
_AMPERE = {  # and later; sm_86, 89 and 120 have 99 KB of shared memory
    (2, 32): Tile(128, 64, 8, 3),
    (2, 64): Tile(128, 64, 8, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(64, 32, 8, 2),
}
_TURING = {  # no tensor cores from Triton: products run on the ordinary cores, and small tiles are all that fits
    (2, 32): Tile(32, 32, 4, 1),
    (2, 64): Tile(32, 32, 8, 1),
    (2, 128): Tile(32, 32, 8, 1),
    (2, 256): Tile(16, 16, 8, 1),
}
# Compute capability and later -> tiles.
TILES = {75: _TURING | _FP32, 80: _AMPERE | _FP32}
INTERPRETER_TILE = Tile(64, 64, 4, 2)


def stages_for(arch: int, num_stages: int) -> int:
    """How many tiles may be in flight on compute capability `arch` (90 is Hopper): `num_stages`, or 1 with Triton 3.6.

    There wgmma reads what asynchronous copies wrote, with no `fence.proxy.async` in between (PTX, "Proxies"). Triton 3.7 has
    the fence; with one stage 3.6 has it too, since the copies are ordinary stores.
    """
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return 1 if 90 <= arch < 120 and (major, minor) < (3, 7) else num_stages


def tile_for(arch: int, dtype: torch.dtype, head_dim: int, softcap: bool = False) -> Tile:
    """The tile for a compute capability (90 is Hopper), from `TILES`; tanh needs registers, so a soft-cap halves it."""
    family = max((known for known in TILES if known <= arch), default=75)
    tile = TILES[family][dtype.itemsize, max(32, block_d(head_dim))]
    tile = replace(tile, num_stages=stages_for(arch, tile.num_stages))
    return replace(tile, block_n=tile.block_n // 2) if softcap and tile.block_n > 16 else tile


# ---- the launch -------------------------------------------------------------------------------------------------


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    tile: Tile | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of q [B, H, N, D] over k, v [B, Hkv, M, D]; returns out [B, H, N, D] and lse [B, H, N] fp32, or None.

    fp16, bf16 or fp32, one dtype for all, which the output has too; sums are kept in fp32. H is a multiple of Hkv.
    `causal` is aligned to the bottom right: the last query sees the last key. `window`: a query sees that many keys,
    itself the last. `softcap`: logits become softcap * tanh(logits / softcap). `out`: write there instead.
    """
    a = check_attention(q, k, v, causal, scale, window, softcap)
    if a.head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {a.head_dim} is more than this kernel's {MAX_HEAD_DIM}; use backend='sdpa'")
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel() == 0:
        return out, lse
    tile = tile or choose_tile(q, softcap is not None)
    launch(
        flash_attention_kernel,
        (triton.cdiv(a.q_len, tile.block_m), a.heads, a.batch),
        q, k, v, out, lse if return_lse else out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        a.group, a.q_len, a.kv_len, a.window or 0, *logit_scales(a),
        HEAD_DIM=a.head_dim, BLOCK_D=block_d(a.head_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        CAUSAL=a.causal, WINDOWED=a.window is not None, SOFTCAP=a.softcap is not None, STORE_LSE=return_lse,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def logit_scales(a: AttentionArguments) -> tuple[float, float]:
    """(scale, cap_scale): base-2 logits are scale * scores, or scale * tanh(cap_scale * scores) with a soft-cap."""
    if a.softcap is None:
        return a.scale * LOG2E, 0.0
    return a.softcap * LOG2E, a.scale / a.softcap


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, copied only if its last dimension is not contiguous, or an offset within one head would not fit 32 bits."""
    return x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def choose_tile(q: torch.Tensor, softcap: bool) -> Tile:
    """The table's tile for this tensor's GPU; a middling one for the interpreter."""
    if will_interpret(q.device) and acting_capability() is None:
        return INTERPRETER_TILE
    return tile_for(device_shape(q.device)[0], q.dtype, q.shape[3], softcap)
