"""A weight as the kernels see it: pointers to where the model keeps it, and nothing copied but small tables."""

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from optinfer.cpu import structs

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_VALUE = 8191  # codebook values become integers of 14 bits: 64 products of one and an activation fit 32 bits


@dataclass(frozen=True)
class CpuWeight:
    """Make it with `plain`, `linear_codes` or `codebook_codes`; each returns None for what the kernels do not read.

    Attributes:
        struct: for the kernels.
        tensors: what it points to. They stay alive with it; values that change in place are seen.
    """

    struct: structs.Weight
    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), as a linear layer's weight [out, in]."""
        return self.struct.rows, self.struct.columns

    @classmethod
    def plain(cls, weight: Tensor, bias: Tensor | None = None) -> "CpuWeight | None":
        """weight [out, in] in float32, bfloat16 or float16."""
        if not _readable(weight, bias) or weight.dtype not in _FLOATS:
            return None
        struct = _struct(structs.KINDS[weight.dtype], weight.shape, weight.stride(0) * weight.element_size(), weight)
        return cls._with_bias(struct, bias, weight)

    @classmethod
    def linear_codes(
        cls,
        packed: Tensor,
        columns: int,
        bits: int,
        group_size: int,
        scale: Tensor,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        minimum: Tensor | None = None,
    ) -> "CpuWeight | None":
        """``(code - zero) * scale``, or ``code * scale + minimum``.

        Args:
            packed: 4 bits: uint8 [out, ceil(in / 2)], the first code in the high half; 8 bits: int8 [out, in], or uint8
                with zero points.
            group_size: columns that share a scale.
            scale: [out, groups] or [1, 1], float.
            zero_point: [out, ceil(groups * bits / 8)], packed as the codes are; None: symmetric.
            minimum: in place of zero points, float, the shape of `scale`.
        """
        if bits not in (4, 8) or not _readable(packed, bias) or scale.dtype not in _FLOATS:
            return None
        rows, groups = packed.shape[0], -(-columns // group_size)
        if groups > 1 and group_size % 32:
            return None
        one_scale = scale.shape == (1, 1) and rows > 1
        if one_scale and (zero_point is not None or minimum is not None):
            return None
        _check("packed", packed, (rows, -(-columns * bits // 8)))
        _check("scale", scale, (1, 1) if one_scale else (rows, groups))
        if zero_point is not None:
            _check("zero_point", zero_point, (rows, -(-groups * bits // 8)))
        kind = structs.NIBBLES if bits == 4 else structs.SIGNED8 if packed.dtype == torch.int8 else structs.UNSIGNED8
        struct = _struct(kind, (rows, columns), packed.stride(0), packed)
        scale = scale.contiguous()
        struct.group = group_size
        struct.groups = 0 if one_scale else groups
        struct.scales = structs.Numbers.of(scale)
        struct.zero = 0.0 if kind == structs.SIGNED8 else float(1 << (bits - 1))
        tensors = [packed, scale]
        if zero_point is not None:
            zero_point = zero_point.contiguous()
            struct.zeros, struct.zero_bytes = zero_point.data_ptr(), zero_point.shape[1]
            tensors.append(zero_point)
        if minimum is not None:
            _check("minimum", minimum, (rows, groups))
            minimum = minimum.contiguous()
            struct.zero, struct.minimums = 0.0, structs.Numbers.of(minimum)
            tensors.append(minimum)
        return cls._with_bias(struct, bias, *tensors)

    @classmethod
    def codebook_codes(
        cls,
        packed: Tensor,
        shape: tuple[int, int],
        group_size: int,
        values: Tensor,
        absmax: Tensor,
        nested: tuple[Tensor, Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> "CpuWeight | None":
        """``values[code] * absmax``, blocks of consecutive weights of the flattened tensor.

        Args:
            packed: uint8, one byte for two codes, the first in the high half.
            values: float32 [16].
            absmax: float32 [blocks], or uint8 with `nested`.
            nested: double quantization: (dynamic map float32 [256], absmax float32 per 256 blocks, offset float32 []).
        """
        rows, columns = shape
        if not _readable(packed, bias) or columns % group_size or group_size % 32:
            return None
        blocks = rows * columns // group_size
        _check("packed", packed.view(-1), (rows * columns // 2,))
        _check("absmax", absmax, (blocks,))
        if nested is not None:
            _check("nested absmax", nested[1], (-(-blocks // 256),))
        struct = _struct(structs.CODEBOOK, shape, columns // 2, packed)
        struct.group, struct.groups = group_size, columns // group_size
        largest = float(values.abs().max())
        steps = (values.double() * (LARGEST_VALUE / largest)).round().to(torch.int32).tolist()
        struct.values = (ctypes.c_uint8 * 32)(*(s & 255 for s in steps), *(s >> 8 & 255 for s in steps))
        struct.value_unit = largest / LARGEST_VALUE
        tensors = [packed, absmax]
        if nested is None:
            struct.scales = structs.Numbers.of(absmax)
        else:
            struct.scale_codes = absmax.data_ptr()
            struct.dynamic, struct.nested, struct.offset = (t.data_ptr() for t in nested)
            tensors += nested
        return cls._with_bias(struct, bias, *tensors)

    @classmethod
    def _with_bias(cls, struct: structs.Weight, bias: Tensor | None, *tensors: Tensor) -> "CpuWeight":
        if bias is not None:
            _check("bias", bias, (struct.rows,))
            struct.bias = structs.Numbers.of(bias)
            tensors = (*tensors, bias)
        # Detached: a parameter whose `data` is replaced lets go of its memory, and these must not.
        return cls(struct, tuple(tensor.detach() for tensor in tensors))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Pointers carry no shapes: what is wrong must be found before."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")


def _readable(weight: Tensor, bias: Tensor | None) -> bool:
    """On the CPU, in ordinary memory, and rows without gaps between their numbers."""
    given = [weight] if bias is None else [weight, bias]
    return all(t.device.type == "cpu" and _is_ordinary(type(t)) and t.stride(-1) == 1 for t in given) and (
        bias is None or bias.dtype in _FLOATS
    )


@functools.cache
def _is_ordinary(kind: type) -> bool:
    """Subclasses may hold their numbers elsewhere."""
    return kind in (Tensor, torch.nn.Parameter)


def _struct(kind: int, shape: tuple[int, int] | torch.Size, row_bytes: int, data: Tensor) -> structs.Weight:
    rows, columns = shape
    return structs.Weight(
        kind=kind,
        rows=rows,
        columns=columns,
        row_bytes=row_bytes,
        data=data.data_ptr(),
        group=columns,
        groups=1,
        value_unit=1,
    )
