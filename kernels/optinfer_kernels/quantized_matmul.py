"""Products with 4-bit and 8-bit weights, the kernel to read first: one output feature, one token, one dot product.

    y[m, n] = sum over k of x[m, k] * (codebook[code[n, k]] - zero) * scale[n, k // group_size]

Decoding reads every weight of the model once per token. What the kernel reads is a quarter of what 16-bit weights
would be; whether it is four times as fast depends on how many instructions it spends to restore one weight.
This one spends many, a look-up and a load of the scale for each. `quantized_matmul_fast` gives the same answers.
"""

import torch

from optinfer_kernels import require_triton
from optinfer_kernels.quantized_arguments import QuantizedWeight, check_quantized_matmul, codebook_tensor

triton = require_triton()

import triton.language as tl  # noqa: E402

from optinfer_kernels.interpreter import launch  # noqa: E402

BLOCK_N, BLOCK_K = 16, 128  # weights that one program holds at a time


@triton.jit
def load_scale(scale_ptr, nested_ptr, table_ptr, offset_ptr, index, exists, NESTED: tl.constexpr):
    """The scale of each group, float32. A nested one is a code: look it up, scale it, add the mean."""
    if NESTED:
        code = tl.load(scale_ptr + index, mask=exists, other=0).to(tl.int32)
        absmax = tl.load(nested_ptr + index // 256, mask=exists, other=0.0)
        scale = tl.load(table_ptr + code) * absmax + tl.load(offset_ptr)
    else:
        scale = tl.load(scale_ptr + index, mask=exists, other=0.0).to(tl.float32)
    return scale


@triton.jit
def load_zero(zero_ptr, row, group, zero_row, zero_pair, exists):
    """The code that means zero in each group, as an offset from the codebook's own zero, code 8; two groups to a byte."""
    octet = tl.load(zero_ptr + row * zero_row + group // 2 * zero_pair, mask=exists, other=0).to(tl.int32)
    return (tl.where(group % 2 == 0, octet >> 4, octet & 15) - 8).to(tl.float32)


@triton.jit
def quantized_matmul_kernel(
    x_ptr, codes_ptr, codebook_ptr, scale_ptr, nested_ptr, table_ptr, offset_ptr, zero_ptr, out_ptr,
    N, K, row_bytes, scale_row, scale_group, zero_row, zero_pair, group_size,
    BITS: tl.constexpr, NESTED: tl.constexpr, ZEROS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of output features, tokens)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    token = tl.program_id(1)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        exists = (n < N) & (k < K)
        if BITS == 4:
            octet = tl.load(codes_ptr + n * row_bytes + k // 2, mask=exists, other=0).to(tl.int32)
            code = tl.where(k % 2 == 0, octet >> 4, octet & 15)  # the even column sits in the high nibble
            weight = tl.load(codebook_ptr + code)
        else:
            weight = tl.load(codes_ptr + n * row_bytes + k, mask=exists, other=0).to(tl.float32)
        group = k // group_size
        if ZEROS:
            weight -= load_zero(zero_ptr, n, group, zero_row, zero_pair, exists)
        scale_index = n * scale_row + group * scale_group
        weight *= load_scale(scale_ptr, nested_ptr, table_ptr, offset_ptr, scale_index, exists, NESTED)
        x = tl.load(x_ptr + token * K + k, mask=k < K, other=0.0).to(tl.float32)
        sums += weight * x
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.sum(sums, 1)
    tl.store(out_ptr + token * N + row, total.to(out_ptr.dtype.element_ty), mask=row < N)


def quantized_matmul(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """``x @ W.T`` for x [tokens, in] in float16, bfloat16 or float32; returns [tokens, out] in x's dtype."""
    check_quantized_matmul(x, weight)
    x = x.contiguous()
    out = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    launch(
        quantized_matmul_kernel, (triton.cdiv(weight.out_features, BLOCK_N), len(x)),
        x, *pointers(weight, torch.float32), out,
        weight.out_features, weight.in_features, weight.codes.shape[1], *strides(weight), weight.group_size,
        BITS=weight.bits, NESTED=weight.nested is not None, ZEROS=weight.zero_point is not None,
        BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return out


def pointers(weight: QuantizedWeight, codebook_dtype: torch.dtype) -> list[torch.Tensor]:
    """The weight's tensors in the order of the kernels' arguments; where there is none, any other stands in.

    All but scales and zero points, which keep their `strides`, lie row by row.
    """
    nested, codes = weight.nested, weight.codes.contiguous()
    book = codebook_tensor(weight.codebook, codebook_dtype, codes.device) if weight.codebook else codes
    rest = [nested.absmax, nested.table, nested.offset] if nested is not None else [None] * 3
    rest = [codes if t is None else t.contiguous() for t in rest]
    return [codes, book, weight.scale, *rest, codes if weight.zero_point is None else weight.zero_point]


def strides(weight: QuantizedWeight) -> tuple[int, ...]:
    """Those of the scales by row and group, then those of the zero points by row and pair of groups, which may be missing."""
    return (*weight.scale.stride(), *(weight.scale if weight.zero_point is None else weight.zero_point).stride())
