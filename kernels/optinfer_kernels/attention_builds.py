"""The attention kernels as they would be launched, compiled for any GPU: for the compile gate, and to look at."""

from typing import Literal, get_args

import torch

from optinfer_kernels import flash_attention, flash_attention_tma, flash_attention_ws
from optinfer_kernels.compile import CompiledKernel, compile_for

Kernel = Literal["flash_attention", "flash_attention_tma", "flash_attention_ws"]
Dtype = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def compile_attention(
    kernel: Kernel, arch: int, dtype: Dtype, head_dim: int, causal: bool = True, extras: bool = False
) -> CompiledKernel:
    """The build that `flash_attention` of module `kernel` would launch on compute capability `arch` (90 is Hopper).

    kernel: "flash_attention", "flash_attention_tma" or "flash_attention_ws". dtype: "fp16", "bf16" or "fp32".
    extras: with window, soft-cap and log-sum-exp, as far as the kernel has them.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; not {dtype!r}")
    torch_dtype = DTYPES[dtype]
    if kernel == "flash_attention":
        function = flash_attention.flash_attention_kernel
        tile = flash_attention.tile_for(arch, torch_dtype, head_dim, extras)
    elif kernel == "flash_attention_tma":
        function = flash_attention_tma.flash_attention_tma_kernel
        tile = flash_attention_tma.tile_for(arch, head_dim)
    elif kernel == "flash_attention_ws":
        function = flash_attention_ws.flash_attention_ws_kernel
        tile = flash_attention_ws.tile_for(head_dim)
    else:
        raise ValueError(f"kernel must be one of {', '.join(get_args(Kernel))}; not {kernel!r}")
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CAUSAL": causal,
        "MASKED": causal,
        "WINDOWED": extras,
        "SOFTCAP": extras,
        "STORE_LSE": extras,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    rows = {"q_desc": tile.block_m, "out_desc": tile.block_m, "k_desc": tile.block_n, "v_desc": tile.block_n}
    signature = {}
    for name in function.arg_names:
        if name in rows:
            signature[name] = f"tensordesc<{dtype}[1, 1, {rows[name]}, {head_dim}]>"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name == "lse_ptr" else f"*{dtype}"
        elif name.endswith("scale"):
            signature[name] = "fp32"
        elif name not in constants:
            signature[name] = "i32"
    strides = tuple(name for name in signature if "stride" in name)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return compile_for(arch, function, signature, constants, aligned=strides, **options)
