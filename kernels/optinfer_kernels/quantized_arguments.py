"""What the quantized products accept, checked in one place. Needs torch only."""

import functools
from dataclasses import dataclass, replace

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT4 = tuple(float(value) for value in range(-8, 8))  # symmetric int4, seen as a codebook


@dataclass(frozen=True)
class NestedScale:
    """Scales that are themselves 8-bit codes: ``scale[i] = table[codes[i]] * absmax[i // 256] + offset``."""

    absmax: torch.Tensor  # float32 [ceil(out * groups / 256)]
    offset: torch.Tensor  # float32 []
    table: torch.Tensor  # float32 [256]


@dataclass(frozen=True)
class QuantizedWeight:
    """The tensors of one weight [out, in] in 4 or 8 bits.

    4 bits: ``w[n, k] = (codebook[code] - zero[n, group]) * scale[n, group]``, two codes to a byte, the even column in
    the high nibble: the layout of bitsandbytes for a codebook (NF4, FP4), and of symmetric or affine int4, whose
    codebook is -8 ... 7. 8 bits: ``w[n, k] = code * scale[n, group]`` with signed codes.

    codes: uint8 [out, in / 2], or int8 [out, in].
    scale: float [out, groups] with any strides, or uint8 codes of the same shape, contiguous, with `nested`.
    group_size: columns that share a scale; the number of columns for one scale per row.
    codebook: the 16 values that codes stand for, 4 bits only.
    zero_point: uint8 [out, ceil(groups / 2)] with any strides, packed like the codes, 4 bits only: codes that mean zero.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    group_size: int
    codebook: tuple[float, ...] | None = None
    zero_point: torch.Tensor | None = None
    nested: NestedScale | None = None

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.codes.numel() == 0:
            raise ValueError(f"codes must be [out, columns] and not empty, got {list(self.codes.shape)}")
        if self.codes.dtype != (torch.int8 if self.bits == 8 else torch.uint8):
            raise TypeError(f"codes must be uint8 with a codebook (4 bits) and int8 without, got {self.codes.dtype}")
        if self.codes.numel() >= 2**31:
            raise ValueError(f"codes hold {self.codes.numel():,} bytes; the kernels index fewer than 2**31")
        if self.group_size < 1:
            raise ValueError(f"group_size must be positive, got {self.group_size}")
        if list(self.scale.shape) != [self.out_features, self.groups]:
            raise ValueError(
                f"scale must be [{self.out_features}, {self.groups}] for groups of {self.group_size}, "
                f"got {list(self.scale.shape)}"
            )
        if (self.scale.dtype == torch.uint8) != (self.nested is not None):
            raise TypeError(f"scale has dtype {self.scale.dtype}: uint8 goes with nested scales, floats without")
        if self.nested is not None and not self.scale.is_contiguous():
            raise ValueError(f"scale must be contiguous with nested scales, got strides {self.scale.stride()}")
        if self.codebook is not None and len(self.codebook) != 16:
            raise ValueError(f"codebook must hold 16 values, got {len(self.codebook)}")
        expected = [self.out_features, (self.groups + 1) // 2]
        if self.zero_point is not None and (self.bits == 8 or list(self.zero_point.shape) != expected):
            raise ValueError(f"zero_point must be {expected}, for 4 bits; got {list(self.zero_point.shape)}")

    @property
    def bits(self) -> int:
        return 8 if self.codebook is None else 4

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * (8 // self.bits)

    @property
    def groups(self) -> int:
        return -(-self.in_features // self.group_size)

    def by_group(self) -> "QuantizedWeight":
        """The same weight, scales and zero points copied so that those of one group lie side by side: strides (1, out).

        `quantized_matmul_fast` then reads whole sectors of them. Raises ValueError for nested scales.
        """
        zero_point = None if self.zero_point is None else self.zero_point.t().contiguous().t()
        return replace(self, scale=self.scale.t().contiguous().t(), zero_point=zero_point)

    @property
    def nbytes(self) -> int:
        """Bytes that a product must read at least: codes, scales and zero points."""
        tensors = [self.codes, self.scale, self.zero_point]
        if self.nested is not None:
            tensors += [self.nested.absmax]
        return sum(t.nbytes for t in tensors if t is not None)


@functools.cache
def codebook_tensor(codebook: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The codebook where kernels can read it; made once."""
    return torch.tensor(codebook, dtype=dtype, device=device)


def check_quantized_matmul(x: torch.Tensor, weight: QuantizedWeight, dtypes: tuple = DTYPES) -> None:
    """Check ``x [tokens, in]`` against the weight.

    Raises TypeError for the dtype, ValueError for shape and device.
    """
    if x.dtype not in dtypes:
        raise TypeError(f"x has dtype {x.dtype}; supported: {', '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    if x.dim() != 2 or x.shape[1] != weight.in_features or len(x) == 0:
        raise ValueError(f"x must be [tokens, {weight.in_features}] with at least one token, got {list(x.shape)}")
    if x.device != weight.codes.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.codes.device}")
