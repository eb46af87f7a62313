"""Products of int8 with int8 and exact int32 sums (W8A8), for the few tokens that cuBLAS does not take.

Tensor cores multiply bytes at twice the rate of 16-bit floats and nothing needs restoring. The sums are integers, so
the columns may be split over programs and added up in any order, with the same result to the last bit.
"""

import torch

from optinfer_kernels import require_triton

triton = require_triton()

import triton.language as tl  # noqa: E402

from optinfer_kernels.interpreter import device_shape, launch  # noqa: E402
from optinfer_kernels.quantized_matmul_fast import Tile  # noqa: E402


@triton.jit
def int8_matmul_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """Adds to `out`, int32 [M, N]. Grid (blocks of N, splits, blocks of M).

    Without INTEGER (Triton has no products of bytes for Turing) a tile is multiplied in floats: at most
    BLOCK_K * 128 * 128 < 2**24, so its sums are exact in float32.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    begin = tl.program_id(1) * per_split
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for start in tl.range(begin, tl.minimum(K, begin + per_split), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b = tl.load(b_ptr + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        if INTEGER:
            total = tl.dot(b, tl.trans(a), total, out_dtype=tl.int32)
        else:
            total += tl.dot(b.to(tl.float16), tl.trans(a.to(tl.float16))).to(tl.int32)
    tl.atomic_add(out_ptr + m[None, :] * N + n[:, None], total, mask=(n < N)[:, None] & (m < M)[None, :])


def tile_for(arch: int, tokens: int) -> Tile:
    """The tile for a compute capability (75 is Turing, whose products run on the ordinary cores)."""
    block_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    return Tile(block_m, 128, 128, 4, 3) if arch >= 80 else Tile(min(block_m, 32), 64, 32, 4, 1)


def int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` for int8 [tokens, in] and [out, in]; returns int32 [tokens, out], exact.

    Raises TypeError or ValueError where dtypes, shapes or devices do not fit.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"a and b must be int8, got {a.dtype} and {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"a and b must be [tokens, in] and [out, in], not empty; got {list(a.shape)}, {list(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"a is on {a.device}, b on {b.device}")
    tokens, columns = a.shape
    out_features = len(b)
    out = torch.zeros(tokens, out_features, dtype=torch.int32, device=a.device)
    arch, processors = device_shape(a.device)
    tile = tile_for(arch, tokens)
    programs = triton.cdiv(out_features, tile.block_n) * triton.cdiv(tokens, tile.block_m)
    splits = max(1, min(columns // 512, 4 * processors // programs))
    launch(
        int8_matmul_kernel,
        (triton.cdiv(out_features, tile.block_n), splits, triton.cdiv(tokens, tile.block_m)),
        a.contiguous(), b.contiguous(), out, tokens, out_features, columns, splits,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, INTEGER=arch >= 80,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
