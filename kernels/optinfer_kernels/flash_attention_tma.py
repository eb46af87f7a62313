"""Flash attention for Hopper and later: tiles fetched by the TMA unit, and a grid that stays.

The algorithm is that of `flash_attention`, line for line. Two things differ.

 - Loads. Instead of computing an address per element, a program hands a descriptor and a coordinate to the TMA unit,
   which copies the tile into shared memory by itself. Registers are freed, the edges of the tensor are filled with
   zeros in hardware, and wgmma takes its operands from there.
 - The grid. One program per multiprocessor stays and takes block after block ("persistent"), the longest causal
   blocks first, so that no multiprocessor ends up alone with a long one.

Sources: FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), section 3; Triton tutorial 09 (persistent matmul).
"""

import torch

from optinfer_kernels import acting_capability, require_triton
from optinfer_kernels.attention_arguments import check_attention

triton = require_triton()

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from optinfer_kernels.flash_attention import (  # noqa: E402
    MAX_HEAD_DIM,
    Tile,
    block_d,
    is_visible,
    key_range,
    logit_scales,
    online_softmax_step,
    store_lse,
    tanh,
)
from optinfer_kernels.interpreter import device_shape, launch, will_interpret  # noqa: E402


@triton.jit
def attend(
    q, k_desc, v_desc, m, l, acc, batch, kv_head, rows, first, last, kv_len, shift, window, scale, cap_scale,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Walk over the keys first..last; as `flash_attention.attend`, but no pointer is ever computed."""
    for start in tl.range(first, last, BLOCK_N):
        k = k_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_N, BLOCK_D)
        scores = tl.dot(q, k.T)
        if SOFTCAP:
            scores = tanh(scores * cap_scale)
        if MASKED:
            cols = start + tl.arange(0, BLOCK_N)
            scores = tl.where(is_visible(rows, cols, kv_len, shift, window, CAUSAL, WINDOWED), scores, -float("inf"))
        p, m, l, acc = online_softmax_step(scores, m, l, acc, scale)
        v = v_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc)
    return m, l, acc


@triton.jit
def flash_attention_tma_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr,
    batches, heads, group, q_len, kv_len, window, scale, cap_scale,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, STORE_LSE: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), any number of them. Descriptors are [batch, heads, length, head_dim]."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    shift = kv_len - q_len
    for work in tl.range(tl.program_id(0), blocks * batches * heads, tl.num_programs(0)):
        if CAUSAL:  # all heads' last and longest blocks first
            block = blocks - 1 - work // (batches * heads)
            index = work % (batches * heads)
        else:  # all blocks of one head together: they share K and V in the L2 cache
            block = work % blocks
            index = work // blocks
        batch = index // heads
        head = index % heads
        first_row = block * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, BLOCK_D)

        m = tl.full([BLOCK_M], -1.0e30, tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        begin, ragged, end = key_range(first_row, kv_len, shift, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED)
        if not WINDOWED:
            m, l, acc = attend(
                q, k_desc, v_desc, m, l, acc, batch, head // group, rows, begin, ragged, kv_len, shift, window,
                scale, cap_scale, BLOCK_D, BLOCK_N, CAUSAL, WINDOWED, SOFTCAP, False,
            )  # fmt: skip
        m, l, acc = attend(
            q, k_desc, v_desc, m, l, acc, batch, head // group, rows, ragged, end, kv_len, shift, window,
            scale, cap_scale, BLOCK_D, BLOCK_N, CAUSAL, WINDOWED, SOFTCAP, True,
        )  # fmt: skip

        out = acc / tl.where(l > 0, l, 1.0)[:, None]
        out_desc.store([batch, head, first_row, 0], out.to(out_desc.dtype).reshape(1, 1, BLOCK_M, BLOCK_D))
        if STORE_LSE:
            store_lse(lse_ptr, m, l, rows, q_len, head, batch.to(tl.int64), heads)


# Compute capability and later -> padded head_dim -> tile. Every entry compiles without a spill.
_HOPPER = {
    32: Tile(128, 128, 8, 2),
    64: Tile(128, 128, 8, 2),
    128: Tile(128, 128, 8, 2),
    256: Tile(128, 32, 8, 2),
}
_SMALL = {  # 99 KB of shared memory
    32: Tile(128, 64, 8, 2),
    64: Tile(128, 64, 8, 2),
    128: Tile(128, 32, 8, 2),
    256: Tile(32, 32, 8, 1),
}
TILES = {90: _HOPPER, 100: _HOPPER | {256: Tile(64, 64, 8, 2)}, 120: _SMALL}
INTERPRETER_TILE = Tile(64, 64, 4, 2)


def tile_for(arch: int, head_dim: int) -> Tile:
    """The tile for a compute capability (90 is Hopper)."""
    family = max((known for known in TILES if known <= arch), default=90)
    return TILES[family][max(32, block_d(head_dim))]


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
    """As `optinfer_kernels.flash_attention.flash_attention`, for fp16 and bf16 with head_dim a multiple of 8."""
    a = check_attention(q, k, v, causal, scale, window, softcap, dtypes=(torch.float16, torch.bfloat16))
    if a.head_dim > MAX_HEAD_DIM or a.head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {a.head_dim}; use 'triton'")
    q, k, v = (tma_readable(t) for t in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel() == 0:
        return out, lse
    if a.kv_len == 0:
        return out.zero_(), lse.fill_(-torch.inf) if return_lse else None  # TMA cannot describe an empty tensor
    tile = tile or choose_tile(q)
    programs = triton.cdiv(a.q_len, tile.block_m) * a.heads * a.batch
    if not will_interpret(q.device):
        programs = min(programs, device_shape(q.device)[1])
    launch(
        flash_attention_tma_kernel, (programs,),
        *(descriptor(t, rows) for t, rows in ((q, tile.block_m), (k, tile.block_n), (v, tile.block_n))),
        descriptor(out, tile.block_m), lse if return_lse else out,
        a.batch, a.heads, a.group, a.q_len, a.kv_len, a.window or 0, *logit_scales(a),
        BLOCK_D=block_d(a.head_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        CAUSAL=a.causal, WINDOWED=a.window is not None, SOFTCAP=a.softcap is not None, STORE_LSE=return_lse,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """What the TMA unit needs to know of x [batch, heads, length, head_dim] to copy tiles of `rows` rows."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, block_d(x.shape[3])])


def tma_readable(x: torch.Tensor) -> torch.Tensor:
    """x, copied only if TMA could not read it: it wants 16-byte aligned rows, positive strides, contiguous dims."""
    item = x.element_size()
    strides_fit = all(stride > 0 and stride * item % 16 == 0 for stride in x.stride()[:3])
    return (
        x
        if x.stride(3) == 1 and strides_fit and x.data_ptr() % 16 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


def choose_tile(q: torch.Tensor) -> Tile:
    if will_interpret(q.device) and acting_capability() is None:
        return INTERPRETER_TILE
    return tile_for(device_shape(q.device)[0], q.shape[3])
