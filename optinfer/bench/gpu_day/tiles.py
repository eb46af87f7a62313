"""Tiles tried on this GPU, and the changes to the kernels' tables that the measurements propose."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from optinfer import hardware
from optinfer.attention import attention_reference
from optinfer.attention.dispatch import KERNELS, Problem, obstacle
from optinfer.bench.rows import TileRow

GAIN = 1.03  # a tile must be so much faster than the one in use to be proposed
Seconds = Callable[[Callable[[], Any], bool], float]


def attention(tiny: bool, seconds_of: Seconds) -> Iterator[TileRow]:
    """Each tile of each attention kernel, or why it cannot run."""
    device = hardware.default_device()
    capability = hardware.capability(device)
    arch = 10 * capability[0] + capability[1] if capability else 80
    dtype = torch.float16 if capability and capability < (8, 0) else torch.bfloat16
    heads, length = (2, 64) if tiny else (16, 8192)
    for (backend, name), dim in itertools.product(KERNELS.items(), (64,) if tiny else (128, 64)):
        if obstacle(backend, Problem(device.type, capability, dtype, dim, length, length, True)) is not None:
            continue
        module = importlib.import_module(f"optinfer_kernels.{name}")
        q, k, v = (torch.randn(1, heads, length, dim, device=device).to(dtype) for _ in range(3))
        current = tile_in_use(module, arch, dtype, dim)
        expected: Any = attention_reference(q[:, :1], k[:, :1], v[:, :1], True)
        for tile in dict.fromkeys((current, *_attention_tiles(module, tiny))):
            row = TileRow(kernel=name, arch=arch, head_dim=dim, tile=_numbers(tile), in_use=tile == current)

            def call(module: Any = module, q=q, k=k, v=v, tile=tile) -> torch.Tensor:
                return module.flash_attention(q, k, v, True, tile=tile)[0]

            yield _measured(row, call, lambda out: out[:, :1], expected, seconds_of, tiny)


def quantized(tiny: bool, seconds_of: Seconds) -> Iterator[TileRow]:
    """The same for the fast quantized product, whose tile is a rule and no table: figures for whoever changes the rule."""
    from optinfer.quantization.formats.gpu import as_kernel_weight
    from optinfer.quantization.schemes import resolve_scheme
    from optinfer_kernels import quantized_matmul_fast as fast
    from optinfer_kernels.interpreter import device_shape

    device = hardware.default_device()
    dtype = hardware.default_dtype(device)
    dtype = dtype if dtype != torch.float32 else torch.bfloat16
    rows, columns = (128, 256) if tiny else (14336, 4096)
    packed = resolve_scheme("nf4").quantize(torch.randn(rows, columns, device=device).to(dtype))
    weight = as_kernel_weight(packed)
    for tokens in (1,) if tiny else (1, 16, 64):
        x = torch.randn(tokens, columns, device=device).to(dtype)
        expected = x @ packed.dequantize(dtype).T
        current = fast.tile_for(tokens, 4, packed.group_size, device_shape(device)[0])
        block_ns, warps, stages = ((128,), (4,), (2,)) if tiny else ((64, 128, 256), (4, 8), (2, 4, 6))
        found = [fast.Tile(current.block_m, n, current.block_k, w, s) for n in block_ns for w in warps for s in stages]
        for tile in dict.fromkeys((current, *found)):
            row = TileRow(kernel="quantized_matmul_fast", tokens=tokens, tile=_numbers(tile), in_use=tile == current)

            def call(x=x, tile=tile) -> torch.Tensor:
                return fast.quantized_matmul(x, weight, tile=tile)  # type: ignore[arg-type]

            yield _measured(row, call, lambda out: out, expected, seconds_of, tiny)


def tile_in_use(module: ModuleType, arch: int, dtype: torch.dtype, head_dim: int) -> Any:
    arguments = {"flash_attention": (arch, dtype, head_dim), "flash_attention_tma": (arch, head_dim)}
    return module.tile_for(*arguments.get(module.__name__.split(".")[-1], (head_dim,)))


def _attention_tiles(module: Any, tiny: bool) -> list[Any]:
    if tiny:
        return [module.Tile(32, 32, 4, 1)]
    sizes = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    return [module.Tile(*numbers) for numbers in sizes]


def _measured(
    row: TileRow,
    call: Callable[[], torch.Tensor],
    part: Callable[[torch.Tensor], torch.Tensor],
    expected: torch.Tensor,
    seconds_of: Seconds,
    tiny: bool,
) -> TileRow:
    """The row, with its seconds if the tile runs and is right."""
    try:
        out = part(call())
        scale = expected.float().abs().max().item()
        if not (out.float() - expected.float()).abs().max().item() <= 0.03 * scale:
            row.skipped = "wrong"
        else:
            row.seconds = seconds_of(call, tiny)
    except Exception as error:  # too much shared memory, too many registers, a shape the kernel refuses
        if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
            raise
        row.skipped = f"{type(error).__name__}: {error}".split("\n")[0][:80]
    return row


def _numbers(tile: Any) -> tuple[int, ...]:
    return tuple(vars(tile).values())


def best(rows: Iterable[TileRow]) -> dict[tuple[str, int], dict[int, tuple[int, ...]]]:
    """(attention kernel, architecture) -> head_dim -> the fastest tile, where it beats the one in use by `GAIN`."""
    found: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {}
    tried: dict[tuple[str, int, int], list[tuple[float, bool, tuple[int, ...]]]] = {}
    for row in rows:
        if row.seconds and row.kernel and row.arch and row.head_dim and row.tile:
            same = tried.setdefault((row.kernel, row.arch, row.head_dim), [])
            same.append((row.seconds, bool(row.in_use), row.tile))
    for (kernel, arch, dim), timed in tried.items():
        fastest, _, tile = min(timed)
        in_use = [seconds for seconds, used, _ in timed if used]
        if not in_use or in_use[0] > GAIN * fastest:
            found.setdefault((kernel, arch), {})[dim] = tile
    return found


def proposals(rows: Iterable[TileRow]) -> list[tuple[str, str, str]]:
    """(path, source, changed source) of each kernel whose table should change; entries follow the table's own line."""
    changed = []
    for (kernel, arch), entries in best(rows).items():
        module = importlib.import_module(f"optinfer_kernels.{kernel}")
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        table = ", ".join(
            f"{f'(2, {dim})' if kernel == 'flash_attention' else dim}: Tile({', '.join(map(str, tile))})"
            for dim, tile in entries.items()
        )
        line = f"TILES |= {{{table}}}\n"
        if kernel != "flash_attention_ws":
            family = max(known for known in module.TILES if known <= arch)
            line = f"TILES[{arch}] = TILES[{family}] | {{{table}}}\n"
        lines = source.splitlines(keepends=True)
        at = next(i for i, text in enumerate(lines) if text.startswith("TILES = "))
        changed.append(
            (f"kernels/optinfer_kernels/{kernel}.py", source, "".join([*lines[: at + 1], line, *lines[at + 1 :]]))
        )
    return changed
