"""Flash attention for Hopper with specialized warps: some only fetch, the others only compute.

One warp group runs ahead and issues TMA copies; two others run tensor cores and softmax on what has arrived. Registers
move from the fetchers, who need few, to the workers (`setmaxnreg`). We write an ordinary loop with
`warp_specialize=True`; Triton's compiler splits it.

The compiler is particular about that loop on sm_90. What it accepts, and silently or loudly does not:
 - one loop holding both products; two loops, masked and unmasked, do not compile;
 - a mask on every tile or on none; under a run-time `if` it compiles but nothing is specialized;
 - descriptors made inside the kernel, two-dimensional; four warps, from which it makes twelve.
So causal attention pays for a mask on every tile here: less work elsewhere has to make up for it. The compile tests
check that specialization really happened.

Source: FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), section 3.1.
"""

import torch

from optinfer_kernels import require_triton
from optinfer_kernels.attention_arguments import check_attention

triton = require_triton()

import triton.language as tl  # noqa: E402

from optinfer_kernels.flash_attention import (  # noqa: E402
    Tile,
    block_d,
    is_visible,
    logit_scales,
    online_softmax_step,
    store_lse,
)
from optinfer_kernels.flash_attention_tma import tma_readable  # noqa: E402
from optinfer_kernels.interpreter import launch, will_interpret  # noqa: E402
from optinfer_kernels.scratch import scratch_memory  # noqa: E402

MAX_HEAD_DIM = 128


@triton.jit
def flash_attention_ws_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, out_stride_b, out_stride_h, out_stride_n,
    heads, group, q_len, kv_len, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, STORE_LSE: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads, row blocks): heads fastest, so that all heads' longest causal blocks start first."""
    block = tl.program_id(1)
    if CAUSAL:
        block = tl.num_programs(1) - 1 - block
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    kv_head = (head // group).to(tl.int64)
    q_base = q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h
    out_base = out_ptr + batch * out_stride_b + head.to(tl.int64) * out_stride_h
    q_desc = tl.make_tensor_descriptor(q_base, [q_len, HEAD_DIM], [q_stride_n, 1], [BLOCK_M, BLOCK_D])
    out_desc = tl.make_tensor_descriptor(out_base, [q_len, HEAD_DIM], [out_stride_n, 1], [BLOCK_M, BLOCK_D])
    k_base = k_ptr + batch * k_stride_b + kv_head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + kv_head * v_stride_h
    k_desc = tl.make_tensor_descriptor(k_base, [kv_len, HEAD_DIM], [k_stride_n, 1], [BLOCK_N, BLOCK_D])
    v_desc = tl.make_tensor_descriptor(v_base, [kv_len, HEAD_DIM], [v_stride_n, 1], [BLOCK_N, BLOCK_D])

    first_row = block * BLOCK_M
    # The minimum changes nothing. Without it Triton 3.6 to 3.9 split `first_row + arange` over the two computing groups
    # wrongly: rows 64 to 127 of a tile counted as 128 to 191. The emulator saw it, and its tests watch over it.
    rows = tl.minimum(first_row, q_len) + tl.arange(0, BLOCK_M)
    shift = kv_len - q_len
    end = kv_len
    if CAUSAL:
        end = tl.minimum(kv_len, first_row + BLOCK_M + shift)
    q = q_desc.load([first_row, 0])
    m = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, end, BLOCK_N, warp_specialize=True):
        k = k_desc.load([start, 0])
        scores = tl.dot(q, k.T)
        if MASKED:
            cols = start + tl.arange(0, BLOCK_N)
            scores = tl.where(is_visible(rows, cols, kv_len, shift, 0, CAUSAL, False), scores, -float("inf"))
        p, m, l, acc = online_softmax_step(scores, m, l, acc, scale)
        v = v_desc.load([start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc)

    out = acc / tl.where(l > 0, l, 1.0)[:, None]
    out_desc.store([first_row, 0], out.to(out_ptr.dtype.element_ty))
    if STORE_LSE:
        store_lse(lse_ptr, m, l, rows, q_len, head, batch, heads)


TILES = {64: Tile(128, 128, 4, 2), 128: Tile(128, 128, 4, 2)}
INTERPRETER_TILE = Tile(64, 64, 4, 2)


def tile_for(head_dim: int) -> Tile:
    return TILES[max(64, block_d(head_dim))]


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
    """As `optinfer_kernels.flash_attention.flash_attention`: fp16 and bf16, head_dim a multiple of 8 up to 128.

    Neither window nor softcap: passing one raises ValueError.
    """
    a = check_attention(q, k, v, causal, scale, window, softcap, dtypes=(torch.float16, torch.bfloat16))
    if a.window is not None or a.softcap is not None:
        raise ValueError("the specialized kernel has neither window nor softcap; use 'triton' or 'triton_tma'")
    if a.head_dim > MAX_HEAD_DIM or a.head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {a.head_dim}; use 'triton'")
    q, k, v = (tma_readable(t) for t in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel() == 0:
        return out, lse
    if a.kv_len == 0:
        return out.zero_(), lse.fill_(-torch.inf) if return_lse else None
    tile = tile or (INTERPRETER_TILE if will_interpret(q.device) else tile_for(a.head_dim))
    with scratch_memory(q.device):  # for the descriptors
        launch(
            flash_attention_ws_kernel,
            (a.batch * a.heads, triton.cdiv(a.q_len, tile.block_m)),
            q, k, v, out, lse if return_lse else out,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            a.heads, a.group, a.q_len, a.kv_len, logit_scales(a)[0],
            HEAD_DIM=a.head_dim, BLOCK_D=block_d(a.head_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            CAUSAL=a.causal, MASKED=a.causal or a.kv_len % tile.block_n != 0, STORE_LSE=return_lse,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
