"""The quantized products as they would be launched, compiled for any GPU: for the compile gate, and to count."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from optinfer_kernels.compile import CompiledKernel, compile_for
from optinfer_kernels.quantized_arguments import INT4
from optinfer_kernels.quantized_matmul import BLOCK_K, BLOCK_N, quantized_matmul_kernel
from optinfer_kernels.quantized_matmul_fast import Tile, decoding, quantized_matmul_fast_kernel, tile_for

Product = Literal["codebook", "int4", "int4 affine", "int8"]
READABLE_TILE = Tile(1, BLOCK_N, BLOCK_K, 4, 3)
Dtype = Literal["fp16", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class QuantizedBuild:
    """One build, and what its main loop spends on one weight."""

    kernel: CompiledKernel
    loop: tuple[str, ...]
    weights_per_thread: float  # restored by one thread in one turn of the loop

    @property
    def instructions_per_weight(self) -> float:
        return len(self.loop) / self.weights_per_thread

    @property
    def mix(self) -> Counter:
        """How often each kind of instruction stands in the main loop."""
        names = (text.split()[1] if text.startswith("@") else text.split()[0] for text in self.loop)
        return Counter(name.split(".")[0] for name in names)


def compile_quantized(
    scheme: Product,
    arch: int,
    dtype: Dtype = "bf16",
    tokens: int = 1,
    group_size: int = 64,
    nested: bool = False,
    codebook: tuple[float, ...] | None = None,
    readable: bool = False,
) -> QuantizedBuild:
    """The build that `quantized_matmul` would launch on compute capability `arch` (90 is Hopper), for large layers.

    scheme: "codebook" (with `codebook`, its 16 values), "int4", "int4 affine" or "int8".
    readable: the kernel of `quantized_matmul`, else the one of `quantized_matmul_fast`.
    """
    if scheme not in get_args(Product):
        raise ValueError(f"scheme must be one of {', '.join(get_args(Product))}; not {scheme!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; not {dtype!r}")
    if scheme == "codebook" and codebook is None:
        raise ValueError("codebook must be given with scheme='codebook': its 16 values")
    bits = 8 if scheme == "int8" else 4
    book = codebook if scheme == "codebook" else None if scheme == "int8" else INT4
    function: Any
    if readable:
        function, tile = quantized_matmul_kernel, READABLE_TILE
    else:
        function, tile = quantized_matmul_fast_kernel, tile_for(tokens, bits, group_size, arch)
    constants: dict[str, Any] = {
        "BITS": bits,
        "NESTED": nested,
        "ZEROS": scheme == "int4 affine",
        "DECODING": decoding(book, DTYPES[dtype]),
        "GROUP": group_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "WHOLE": True,
        "scale_group": 1,  # scales and zero points row by row, as layers store them
        "zero_pair": 1,
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    scale = "*u8" if nested else "*fp32" if scheme == "codebook" else f"*{dtype}"
    types = {"codes_ptr": "*u8" if bits == 4 else "*i8", "zero_ptr": "*u8", "scale_ptr": scale}
    types |= dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("nested_ptr", "table_ptr", "offset_ptr"), "*fp32")
    types["codebook_ptr"] = "*fp32" if readable else f"*{dtype}"
    signature = {name: types.get(name, "i32") for name in function.arg_names if name not in constants}
    kernel = compile_for(
        arch, function, signature, constants, aligned=("N", "K", "row_bytes", "group_size"),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return QuantizedBuild(kernel, tuple(kernel.main_loop()), tile.block_n * tile.block_k / (32 * tile.num_warps))
