"""Products with weights of small floats: MXFP4, MXFP8 and NVFP4 by the instruction that they were made for, and FP8.

`tl.dot_scaled` takes the packed codes and the scales as they lie in memory: E8M0 for 32 columns, or E4M3 for 16 (NVFP4, whose one
scale per tensor is multiplied in at the end). On Blackwell (compute capability 10.0) tensor
cores multiply them as they are; elsewhere the compiler restores them to bfloat16 in registers first. Nothing of that is visible
here: one kernel, and what the compiler made of it can be counted (`compile_scaled`). FP8 with one float32 scale per row is
restored to bfloat16, exactly, and scaled after the sum.
"""

from typing import Any, Literal, get_args

import torch

from optinfer_kernels import acting_capability, require_triton

triton = require_triton()

import triton.language as tl  # noqa: E402

from optinfer_kernels.compile import CompiledKernel, compile_for  # noqa: E402
from optinfer_kernels.interpreter import device_shape, launch, will_interpret  # noqa: E402

SCALES = {
    torch.uint8: 32,
    torch.float8_e4m3fn: 16,
    torch.float32: 0,
}  # dtype of the scales -> columns that share one; 0: all


Form = Literal["e2m1", "e4m3"]  # of the codes


def tile_for(arch: int) -> tuple[int, int, int]:
    """Tokens, output features and columns of a program's step. Architectures whose sums lie in registers take half."""
    return (128, 128, 128) if arch in (90, 100) else (64, 64, 128)


@triton.jit
def scaled_matmul_kernel(
    x_ptr, x_scale_ptr, codes_ptr, scale_ptr, out_ptr, M, N, K,
    alpha_ptr, X_FORMAT: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, ALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [M, K] bfloat16, or microscaled like the weights; W [N, K] in FORMAT; out [M, N] bfloat16. Grid (M tiles, N tiles)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    X_PACK: tl.constexpr = 2 if X_FORMAT == "e2m1" else 1
    PACK: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    kx, kw = tl.arange(0, BLOCK_K // X_PACK), tl.arange(0, BLOCK_K // PACK)
    ks = tl.arange(0, BLOCK_K // GROUP if GROUP > 0 else 1)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        x_exists = (m[:, None] < M) & (start // X_PACK + kx[None, :] < K // X_PACK)
        x = tl.load(x_ptr + m[:, None] * (K // X_PACK) + start // X_PACK + kx[None, :], mask=x_exists, other=0.0)
        w_exists = (n[None, :] < N) & (start // PACK + kw[:, None] < K // PACK)
        w = tl.load(codes_ptr + n[None, :] * (K // PACK) + start // PACK + kw[:, None], mask=w_exists, other=0)
        if GROUP == 0:
            sums = tl.dot(x, w.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16), sums)
        else:
            s_exists = start // GROUP + ks[None, :] < K // GROUP
            scale = tl.load(
                scale_ptr + n[:, None] * (K // GROUP) + start // GROUP + ks[None, :],
                mask=(n[:, None] < N) & s_exists,
                other=0,
            )
            if GROUP == 16:
                scale = scale.to(tl.float8e4nv, bitcast=True)
            if X_FORMAT == "bf16":
                sums = tl.dot_scaled(x, None, X_FORMAT, w, scale, FORMAT, sums)
            else:
                x_scale = tl.load(
                    x_scale_ptr + m[:, None] * (K // GROUP) + start // GROUP + ks[None, :],
                    mask=(m[:, None] < M) & s_exists,
                    other=0,
                )
                if GROUP == 16:
                    x_scale = x_scale.to(tl.float8e4nv, bitcast=True)
                sums = tl.dot_scaled(x, x_scale, X_FORMAT, w, scale, FORMAT, sums)
    if GROUP == 0:
        sums *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if ALPHA:
        sums *= tl.load(alpha_ptr)
    exists = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out_ptr + m[:, None] * N + n[None, :], sums.to(tl.bfloat16), mask=exists)


def scaled_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ W.T``; interpreted for tensors on a CPU.

    Args:
        x: bfloat16 [tokens, in]; or, with `x_scale`, codes like the weights'.
        codes: uint8 [out, in / 2], the first of two codes in the low half (E2M1); or float8_e4m3fn [out, in].
        scale: uint8 [out, in / 32] (E8M0) or float8_e4m3fn [out, in / 16]; `x_scale`: [tokens, ...] of the same dtype. Or, for
            codes of eight bits and x in bfloat16, float32 [out, 1].
        alpha: float32 [1], what the product is multiplied by: of NVFP4, one over the tensors' scales.

    Returns: bfloat16 [tokens, out].

    Raises:
        ValueError: shapes that do not fit.
        TypeError: other dtypes.
    """
    form, columns = _format(codes)
    x_form, x_columns = ("bf16", x.shape[1]) if x_scale is None else _format(x)
    if x_scale is None and x.dtype != torch.bfloat16:
        raise TypeError(f"x must be bfloat16, got {x.dtype}")
    if scale.dtype not in SCALES:
        raise TypeError(f"scale must be uint8 (E8M0), float8_e4m3fn or float32, got {scale.dtype}")
    group = SCALES[scale.dtype]
    if group == 0 and (form, x_form) != ("e4m3", "bf16"):
        raise TypeError(
            f"float32 scales go with float8_e4m3fn codes and x in bfloat16, got {codes.dtype} and {x.dtype}"
        )
    if columns % (group or 1) or x_columns != columns:
        raise ValueError(
            f"x has {x_columns} columns and the weight {columns}; both must be one multiple of {group or 1}"
        )
    groups = columns // group if group else 1
    for name, given, rows in (("scale", scale, len(codes)), ("x_scale", x_scale, len(x))):
        if given is not None and (given.dtype != scale.dtype or given.shape != (rows, groups)):
            raise ValueError(f"{name} must be {scale.dtype} [{rows}, {groups}], got {given.dtype} {list(given.shape)}")
    out = torch.empty(len(x), len(codes), dtype=torch.bfloat16, device=x.device)
    arch, _ = device_shape(x.device)
    if not will_interpret(x.device) or acting_capability() is not None:
        check_architecture(arch, {form, x_form}, group)
    block_m, block_n, block_k = tile_for(arch)
    grid = (triton.cdiv(len(x), block_m), triton.cdiv(len(codes), block_n))
    tensors = (x, scale if x_scale is None else x_scale, codes, scale)
    octets = [t.contiguous().view(torch.uint8) if t.element_size() == 1 else t.contiguous() for t in tensors]
    launch(
        scaled_matmul_kernel, grid, *octets, out, len(x), len(codes), columns,
        scale if alpha is None else alpha, X_FORMAT=x_form, FORMAT=form, GROUP=group, ALPHA=alpha is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=8,
    )  # fmt: skip
    return out


def check_architecture(arch: int, formats: set[str], group: int) -> None:
    """Raise ValueError for what Triton cannot compile for compute capability `arch`."""
    if unknown := formats - {*get_args(Form), "bf16"}:
        raise ValueError(f"formats are {', '.join(get_args(Form))} and bf16, not {', '.join(sorted(unknown))}")
    if group == 16 and (arch < 100 or formats != {"e2m1"}):
        raise ValueError(
            f"E4M3 scales (NVFP4) are multiplied by hardware alone, 4 bits by 4 bits: not on {arch} of {formats}"
        )
    if "e4m3" in formats and arch < 89:
        raise ValueError(f"E4M3 needs compute capability 8.9, this is {arch / 10}; use the kernels for codebooks")


def _format(codes: torch.Tensor) -> tuple[str, int]:
    """The format of codes, and their number in a row."""
    if codes.dtype == torch.uint8:
        return "e2m1", 2 * codes.shape[1]
    if codes.dtype == torch.float8_e4m3fn:
        return "e4m3", codes.shape[1]
    raise TypeError(f"codes must be uint8 (E2M1) or float8_e4m3fn, got {codes.dtype}")


def compile_scaled(
    arch: int, form: Form = "e2m1", x_form: Form | Literal["bf16"] = "bf16", group: int = 32
) -> CompiledKernel:
    """The kernel as it would run on compute capability `arch`.

    Args:
        form, x_form: of weights and activations: "e2m1", "e4m3"; activations also "bf16".
        group: 32 for E8M0 scales, 16 for E4M3 ones (NVFP4), 0 for float32 ones of whole rows.
    """
    check_architecture(arch, {form, x_form}, group)
    block_m, block_n, block_k = tile_for(arch)
    constants: dict[str, Any] = {
        "X_FORMAT": x_form, "FORMAT": form, "GROUP": group, "ALPHA": group == 16,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip
    signature = {"x_ptr": "*bf16" if x_form == "bf16" else "*u8", "x_scale_ptr": "*u8", "codes_ptr": "*u8"}
    signature |= {
        "scale_ptr": "*u8" if group else "*fp32",
        "out_ptr": "*bf16",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "alpha_ptr": "*fp32",
    }
    return compile_for(arch, scaled_matmul_kernel, signature, constants, aligned=("N", "K"), num_warps=8)
