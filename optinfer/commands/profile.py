"""``optinfer profile``: what a kernel does on a GPU that is not here. Counts from the emulator, never times."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from optinfer_kernels.emulator import Gpu

GPUS = {  # name -> (compute capability times ten, multiprocessors); NVIDIA's data sheets
    "t4": (75, 40),
    "a100": (80, 108),
    "a10": (86, 72),
    "l4": (89, 58),
    "rtx4090": (89, 128),
    "h100": (90, 132),
    "h200": (90, 132),
    "rtx5090": (120, 170),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _attention(module: str) -> Callable[[argparse.Namespace], Any]:
    def call(sizes: argparse.Namespace) -> Any:
        import importlib

        kernel = importlib.import_module(f"optinfer_kernels.{module}").flash_attention
        kv_len, kv_heads = sizes.kv_len or sizes.q_len, sizes.kv_heads or sizes.heads
        q = torch.randn(1, sizes.heads, sizes.q_len, sizes.head_dim).to(DTYPES[sizes.dtype])
        k, v = (torch.randn(1, kv_heads, kv_len, sizes.head_dim).to(q.dtype) for _ in range(2))
        return kernel(q, k, v, causal=sizes.causal)

    return call


def _paged_attention(sizes: argparse.Namespace) -> Any:
    from optinfer_kernels.paged_attention import paged_attention

    pages, kv_heads = -(-(sizes.kv_len or sizes.q_len) // 16), sizes.kv_heads or sizes.heads
    q = torch.randn(1, sizes.heads, sizes.head_dim).to(DTYPES[sizes.dtype])
    k, v = (torch.randn(pages, 16, kv_heads, sizes.head_dim).to(q.dtype) for _ in range(2))
    table = torch.randperm(pages)[None].int()
    return paged_attention(q, k, v, table, torch.tensor([16 * pages], dtype=torch.int32))


def _quantized_matmul(module: str) -> Callable[[argparse.Namespace], Any]:
    def call(sizes: argparse.Namespace) -> Any:
        import importlib

        from optinfer_kernels.quantized_arguments import INT4, QuantizedWeight

        codes = torch.randint(0, 256, (sizes.rows, sizes.columns // 2), dtype=torch.uint8)
        weight = QuantizedWeight(codes, torch.rand(sizes.rows, sizes.columns // 64), 64, INT4)
        x = torch.randn(sizes.tokens, sizes.columns).to(DTYPES[sizes.dtype])
        return importlib.import_module(f"optinfer_kernels.{module}").quantized_matmul(x, weight)

    return call


def _int8_matmul(sizes: argparse.Namespace) -> Any:
    from optinfer_kernels.int8_matmul import int8_matmul

    shapes = ((sizes.tokens, sizes.columns), (sizes.rows, sizes.columns))
    return int8_matmul(*(torch.randint(-128, 128, shape, dtype=torch.int8) for shape in shapes))


KERNELS: dict[str, Callable[[argparse.Namespace], Any]] = {
    **{name: _attention(name) for name in ("flash_attention", "flash_attention_tma", "flash_attention_ws")},
    "paged_attention": _paged_attention,
    **{name: _quantized_matmul(name) for name in ("quantized_matmul", "quantized_matmul_fast")},
    "int8_matmul": _int8_matmul,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``optinfer profile``."""
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="which GPU to compile for (default: h100)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    attention = parser.add_argument_group("attention")
    attention.add_argument("--q-len", type=int, default=256, help="queries; paged attention decodes one")
    attention.add_argument("--kv-len", type=int, default=None, help="keys (default: as many as queries)")
    attention.add_argument("--heads", type=int, default=1)
    attention.add_argument("--kv-heads", type=int, default=None)
    attention.add_argument("--head-dim", type=int, default=64)
    attention.add_argument("--causal", action="store_true")
    product = parser.add_argument_group("products with quantized weights (4 bits in groups of 64, or 8 bits)")
    product.add_argument("--tokens", type=int, default=1)
    product.add_argument("--rows", type=int, default=256, help="output features")
    product.add_argument("--columns", type=int, default=512, help="input features")
    parser.add_argument("--lines", type=int, default=15, help="how many lines of source to show")


def profile(sizes: argparse.Namespace) -> "Gpu":
    """Run one kernel on one imaginary GPU."""
    from optinfer_kernels.emulator import emulate

    torch.manual_seed(0)
    arch, processors = GPUS[sizes.gpu]
    with emulate(arch, processors=processors) as gpu:
        KERNELS[sizes.kernel](sizes)
    return gpu


def run(sizes: argparse.Namespace) -> int:
    """Print the counts and findings; 1 if there are findings.

    Raises:
        ValueError: the kernel does not run on such a GPU, or the emulator does not know an instruction.
    """
    from optinfer_kernels.emulator import Deadlock, Unsupported

    try:
        gpu = profile(sizes)
    except (Deadlock, Unsupported, RuntimeError) as error:
        raise ValueError(str(error)) from error
    for launched in gpu.runs:
        print(launched.report())
        print(launched.by_line(f"{sizes.kernel}.py", sizes.lines))
        print()
    print(gpu.findings)
    print("These are counts of what the compiled kernel does. How long it takes, only a GPU can tell.")
    return 1 if gpu.findings else 0
