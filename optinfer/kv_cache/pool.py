"""The memory behind the pages: keys and values of all layers, in one layout for everything that reads them.

    [layers, blocks, block_size, kv_heads, head_dim]

A slot holds one token: slot = block * block_size + place in the block. Lesson 4's pictures, `PagedCache`, the serving
engine and the attention kernels all use this pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer import cpu
from optinfer.kv_cache.memory import kv_shape
from optinfer.upload import upload

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with one fp32 scale per token and head: x [..., head_dim] -> (int8 [..., head_dim], scale [...])."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    return (x / scale.clamp_min(1e-30)[..., None]).round().to(torch.int8), scale


class KVPool:
    """Keys and values in pages.

    Args:
        num_layers, kv_heads, head_dim: of the model.
        num_blocks, block_size: the pages.
        dtype: float32, float16, bfloat16, or int8 with one scale per token and head.
        device: where the pages live.

    Attributes:
        keys, values: [layers, blocks, block_size, kv_heads, head_dim].
        key_scales, value_scales: float32 [layers, blocks, block_size, kv_heads] of int8 pages, else None.
        copied_bytes: bytes of keys and values that were copied from one place of the memory to another so far: by
            copy-on-write, and by readers that want a sequence in one piece.
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        shape = (num_layers, num_blocks, block_size, kv_heads, head_dim)
        for name, size in zip(("num_layers", "num_blocks", "block_size", "kv_heads", "head_dim"), shape):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size!r}")
        self.num_layers, self.num_blocks, self.block_size, self.kv_heads, self.head_dim = shape
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.key_scales = self.value_scales = None
        if dtype == torch.int8:
            self.key_scales, self.value_scales = (torch.zeros(shape[:-1], device=device) for _ in range(2))
        self.copied_bytes = 0
        self._cpu_pages: list[cpu.Pages] | None = None

    @classmethod
    def for_config(cls, config: PreTrainedConfig, num_blocks: int, block_size: int = 16, **options: Any) -> KVPool:
        """A pool of a transformers configuration's shape; `options`: dtype, device.

        Raises ValueError: the configuration describes another kind of cache (see `kv_shape`).
        """
        return cls(*kv_shape(config), num_blocks, block_size, **options)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, scales included."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values [blocks, block_size, kv_heads, head_dim]."""
        return self.keys[index], self.values[index]

    def scales(self, index: int) -> dict[str, Tensor]:
        """One layer's scales, by the names that `paged_attention` knows; empty unless the pages are int8."""
        if self.key_scales is None or self.value_scales is None:
            return {}
        return {"k_scale": self.key_scales[index], "v_scale": self.value_scales[index]}

    def cpu_pages(self, index: int) -> cpu.Pages:
        """One layer as the C++ kernels see it."""
        if self._cpu_pages is None:
            layers = range(self.num_layers)
            self._cpu_pages = [cpu.Pages.of(*self.layer(i), *self.scales(i).values()) for i in layers]
        return self._cpu_pages[index]

    # ---- writing and copying

    def write(self, index: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [tokens, kv_heads, head_dim] into a layer's slots, int64 [tokens]."""
        expected = (len(slots), self.kv_heads, self.head_dim)
        if k.shape != expected or v.shape != expected:
            raise ValueError(
                f"keys and values must be {list(expected)} in this pool, got {list(k.shape)} and {list(v.shape)}"
            )
        scales = (self.key_scales, self.value_scales)
        for pages, scale, x in zip((self.keys, self.values), scales, (k, v)):
            rows = pages[index].flatten(0, 1)
            if scale is not None:
                x, scale[index].flatten(0, 1)[slots] = quantize_kv(x)
            rows.index_copy_(0, slots, x.to(rows.dtype))

    def gather(self, index: int, blocks: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A copy of a layer for readers that want each sequence in one piece.

        Args:
            blocks: int64 [batch, n], the block table of each sequence.
            length: tokens of each.

        Returns: keys and values [batch, kv_heads, length, head_dim] in `dtype`.
        """
        found = []
        for pages, scale in zip((self.keys, self.values), (self.key_scales, self.value_scales)):
            tokens = self._whole_blocks(pages[index], blocks, length)
            if scale is not None:
                tokens = tokens * self._whole_blocks(scale[index], blocks, length)[..., None]
            found.append(tokens.to(dtype).transpose(1, 2))
        return found[0], found[1]

    def _whole_blocks(self, pages: Tensor, blocks: Tensor, length: int) -> Tensor:
        """[batch, length, ...]. Whole blocks, one after the other: several times faster than token by token."""
        copy = pages.flatten(1).index_select(0, blocks.flatten())
        self.copied_bytes += copy.nbytes
        return copy.view(len(blocks), -1, *pages.shape[2:])[:, :length]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, all layers at once: `(source, target)` pairs (copy-on-write)."""
        if not copies:
            return
        sources, targets = (upload(side, self.device) for side in zip(*copies))
        for pages in self._tensors():
            moved = pages[:, sources]
            self.copied_bytes += moved.nbytes
            pages[:, targets] = moved

    def move_tokens(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy single tokens, all layers at once: `(source, target)` slots. All are read first: a target may be a source."""
        if not moves:
            return
        sources, targets = (upload(side, self.device) for side in zip(*moves))
        for pages in self._tensors():
            rows = pages.flatten(1, 2)
            moved = rows.index_select(1, sources)
            self.copied_bytes += moved.nbytes
            rows.index_copy_(1, targets, moved)

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.keys, self.values, self.key_scales, self.value_scales) if t is not None]
