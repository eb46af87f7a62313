"""Products with 4-bit and 8-bit weights, few instructions per weight: for one token to a few dozen.

The budget: an H200 issues about 30 trillion instructions of single threads per second and reads 4.8 TB/s. At half a
byte per weight, five instructions for each and the memory waits for the kernel. What brings the number down:

- codes become 16-bit floats in registers, four bytes at a time (`decoding`);
- the multiply-adds are the tensor cores'. The weight takes the rows of the product and the tokens its columns, of
  which a tile needs only 8; a single token wastes seven of them, which costs nothing that anybody waits for;
- even and odd columns come out of the decoding apart, and stay so: two products, with x split to match;
- a scale is applied once per group, to the sums of the group, not to weights. Lanes hold neighbouring rows: with scales and
  zero points group by group (`QuantizedWeight.by_group`) they read neighbours, else each lane reads a sector of its own;
- where the output is too narrow to fill the GPU, the columns are split over programs too, and a second kernel adds up.

Scales as files hold them, row by row, cost a sector for each: 16,784 sectors for 256 x 2048 int4 weights in groups of 64, where
`by_group` asks for 8,864. It is a second copy of the scales, 6 % of the weight, and a step's 128 sectors keep the first cache
busy for 32 cycles, its instructions the schedulers for 375; so layers read them where they lie, until a GPU says otherwise.
(Several scales a load, kept in registers, was tried too: 38 % fewer sectors, and 4 to 6 % more instructions to pick one.)

With more tokens than fit one tile each tile decodes the weight again; its caller knows when to stop.

On Turing (compute capability 7.5) Triton multiplies on ordinary cores, for eight tokens or more, with both operands read from
shared memory: 246,400 wavefronts for 256 x 1024 NF4 weights and one token, 5.8 times the least, and 141,424 warp instructions.
There `row_sums` takes the place of the tensor cores for few tokens: 480 wavefronts, the least, and 71,552 instructions.
"""

from dataclasses import dataclass

import torch

from optinfer_kernels import require_triton
from optinfer_kernels.quantized_arguments import QuantizedWeight, check_quantized_matmul

triton = require_triton()

import triton.language as tl  # noqa: E402

from optinfer_kernels.decoding import BYTE_REGISTERS, NIBBLE_REGISTERS, byte_decoding, nibble_decoding  # noqa: E402
from optinfer_kernels.interpreter import device_shape, launch, will_interpret  # noqa: E402
from optinfer_kernels.quantized_matmul import load_scale, load_zero, pointers, strides  # noqa: E402

TWO_BY_TWO = tl.constexpr(NIBBLE_REGISTERS)
TWO = tl.constexpr(BYTE_REGISTERS)


@triton.jit
def decode_nibbles(octets, codebook_ptr, DECODING: tl.constexpr):
    """The values of high nibbles (even columns) and low nibbles (odd columns), in the dtype of the codebook."""
    if DECODING == "":  # the interpreter runs no machine code
        high = tl.load(codebook_ptr + (octets >> 4).to(tl.int32))
        low = tl.load(codebook_ptr + (octets & 15).to(tl.int32))
    else:
        high, low = tl.inline_asm_elementwise(
            DECODING, TWO_BY_TWO, [octets],
            dtype=(codebook_ptr.dtype.element_ty, codebook_ptr.dtype.element_ty), is_pure=True, pack=4,
        )  # fmt: skip
    return high, low


@triton.jit
def decode_bytes(octets, x_ptr, DECODING: tl.constexpr):
    """Signed bytes in the dtype of x."""
    if DECODING == "":
        values = octets.to(x_ptr.dtype.element_ty)
    else:
        values = tl.inline_asm_elementwise(
            DECODING, TWO, [octets], dtype=x_ptr.dtype.element_ty, is_pure=True, pack=4
        )  # fmt: skip
    return values


@triton.jit
def row_sums(high, even, low, odd):
    """The product for one token, [BLOCK_N, 1], without tensor cores: a weight is multiplied in the register it was decoded in."""
    products = high.to(tl.float32) * even.to(tl.float32)
    products += low.to(tl.float32) * odd.to(tl.float32)
    return tl.sum(products, 1)[:, None]


@triton.jit
def quantized_matmul_fast_kernel(
    x_ptr, codes_ptr, codebook_ptr, scale_ptr, nested_ptr, table_ptr, offset_ptr, zero_ptr, out_ptr,
    M, N, K, row_bytes, scale_row, scale_group, zero_row, zero_pair, splits,
    BITS: tl.constexpr, NESTED: tl.constexpr, ZEROS: tl.constexpr, DECODING: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of output features, splits, blocks of tokens). BLOCK_K divides GROUP; WHOLE: it divides K too.

    scale_row, scale_group, zero_row, zero_pair: strides of scales and zero points. Writes [M, N], or with several splits
    each its own sums, float32 [splits, M, N].
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    end = tl.minimum(K, (split + 1) * per_split)
    octet = tl.arange(0, BLOCK_K * BITS // 8)
    codes_ptrs = codes_ptr + n[:, None] * row_bytes + octet[None, :]

    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    group = tl.minimum(split * per_split, K - 1) // GROUP  # the last splits may have no columns at all
    scale_index = n * scale_row + group * scale_group
    scale = load_scale(scale_ptr, nested_ptr, table_ptr, offset_ptr, scale_index, n < N, NESTED)
    for start in tl.range(split * per_split, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_exists = (m < M)[:, None] if WHOLE else (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=x_exists, other=0.0)
        offset = start * BITS // 8
        inside = (n < N)[:, None] if WHOLE else (n < N)[:, None] & (offset + octet < row_bytes)[None, :]
        codes = tl.load(codes_ptrs + offset, mask=inside, other=0, eviction_policy="evict_first")
        if BITS == 4:
            high, low = decode_nibbles(codes, codebook_ptr, DECODING)
            even, odd = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_K // 2, 2]))
            if BLOCK_M == 1:
                sums = row_sums(high, even, low, odd)
            else:
                sums = tl.dot(high, tl.trans(even))
                sums = tl.dot(low, tl.trans(odd), sums)
        elif BLOCK_M == 1:
            sums = tl.sum(decode_bytes(codes, x_ptr, DECODING).to(tl.float32) * x.to(tl.float32), 1)[:, None]
        else:
            sums = tl.dot(decode_bytes(codes, x_ptr, DECODING), tl.trans(x))
        if ZEROS:  # sum of x * (code - zero) = sum of x * code - zero * sum of x
            zero = load_zero(zero_ptr, n, start // GROUP, zero_row, zero_pair, n < N)
            sums -= zero[:, None] * tl.sum(x.to(tl.float32), 1)[None, :]
        total += sums * scale[:, None]
        next_group = tl.minimum(start + BLOCK_K, K - 1) // GROUP  # asked for one step ahead: its way is long
        scale_index = n * scale_row + next_group * scale_group
        scale = load_scale(scale_ptr, nested_ptr, table_ptr, offset_ptr, scale_index, n < N, NESTED)

    out_ptrs = out_ptr + split.to(tl.int64) * M * N + m[None, :] * N + n[:, None]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def add_splits_kernel(part_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum float32 [SPLITS, size] over the splits, always in the same order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(part_ptr + split * size + index, mask=index < size, other=0.0)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=index < size)


@dataclass(frozen=True)
class Tile:
    """How much of the product one program holds, and with how many warps and tiles in flight."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


FEW_TOKENS = 4  # without tensor cores: more of them are multiplied together
MAX_TOKENS = 64  # more tokens take several tiles, and the weight is decoded for each


def tile_for(tokens: int, bits: int, group_size: int, arch: int) -> Tile:
    """Wide in the weight, so that one load of x serves many rows; 64 columns at a time, or the group's power of two.

    On compute capability 7.5 Triton's `tl.dot` uses no tensor cores and takes its operands through shared memory, for eight
    tokens at least. For few tokens each has programs of its own there, which keep the weight in registers.
    """
    if arch < 80 and tokens <= FEW_TOKENS:
        return Tile(1, 128, min(64, largest_power_of_2(group_size)), 4, 2)
    block_m = 8 if tokens <= 8 else 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    block_k = min(64, largest_power_of_2(group_size))
    block_n = 256 if block_m == 8 and bits == 4 else 128
    return Tile(block_m, block_n, block_k, 8 if block_m == 64 else 4, 4)


def decoding(codebook: tuple[float, ...] | None, dtype: torch.dtype) -> str:
    """The assembly for 4-bit codes of `codebook`, or for signed bytes."""
    return byte_decoding(dtype) if codebook is None else nibble_decoding(codebook, dtype)


def largest_power_of_2(size: int) -> int:
    """The largest power of two that divides `size`."""
    return size & -size


def supports(weight: QuantizedWeight) -> bool:
    """Whether the group size leaves a tile of columns that a tensor core can multiply: at least 32 (16 pairs)."""
    return weight.groups == 1 or largest_power_of_2(weight.group_size) >= 32


def choose_splits(weight: QuantizedWeight, tile: Tile, tokens: int, processors: int) -> int:
    """Enough programs for four per processor, but at least four steps of columns for each; a power of two."""
    programs = triton.cdiv(weight.out_features, tile.block_n) * triton.cdiv(tokens, tile.block_m)
    most = min(weight.in_features // (4 * tile.block_k), 4 * processors // programs)
    return 1 << max(0, most.bit_length() - 1)


def quantized_matmul(
    x: torch.Tensor, weight: QuantizedWeight, *, splits: int | None = None, tile: Tile | None = None
) -> torch.Tensor:
    """``x @ W.T`` for x [tokens, in] in float16 or bfloat16; returns [tokens, out] in x's dtype.

    Codes are restored in x's dtype, sums and scales are float32.
    Raises ValueError where `supports` is false.
    """
    check_quantized_matmul(x, weight, (torch.float16, torch.bfloat16))
    if not supports(weight):
        raise ValueError(f"group_size must be a multiple of 32, or one group per row; got {weight.group_size}")
    x = x.contiguous()
    tokens, out_features = len(x), weight.out_features
    group = weight.group_size if weight.groups > 1 else 1 << 30
    arch, processors = device_shape(x.device)
    tile = tile or tile_for(tokens, weight.bits, group, arch)
    splits = splits or choose_splits(weight, tile, tokens, processors)
    out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    part = torch.empty(splits, tokens, out_features, device=x.device) if splits > 1 else out
    launch(
        quantized_matmul_fast_kernel,
        (triton.cdiv(out_features, tile.block_n), splits, triton.cdiv(tokens, tile.block_m)),
        x, *pointers(weight, x.dtype), part,
        tokens, out_features, weight.in_features, weight.codes.shape[1], *strides(weight), splits,
        BITS=weight.bits, NESTED=weight.nested is not None, ZEROS=weight.zero_point is not None,
        DECODING="" if will_interpret(x.device) else decoding(weight.codebook, x.dtype), GROUP=group,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        WHOLE=weight.in_features % tile.block_k == 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        block = 512  # four numbers per thread, one load of 16 bytes: whole sectors
        launch(
            add_splits_kernel, (triton.cdiv(out.numel(), block),), part, out, out.numel(), SPLITS=splits, BLOCK=block
        )
    return out
