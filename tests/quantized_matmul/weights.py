"""Weights of every packed format for the kernels' tests, with their exact values."""

import torch

from optinfer.quantization.number_formats import CODEBOOKS, DYNAMIC_INT8
from optinfer_kernels.quantized_arguments import INT4, NestedScale, QuantizedWeight

FORMATS = ("nf4", "nf4 nested", "fp4", "int4", "int4 affine", "int8")


def make_weight(name: str, n: int, k: int, group_size: int, scale_dtype=torch.float32) -> QuantizedWeight:
    """Random codes, scales and zero points: any pattern of bits is a legal weight."""
    groups = -(-k // group_size)
    scale = (torch.rand(n, groups) + 0.1).to(scale_dtype)
    if name == "int8":
        return QuantizedWeight(torch.randint(-128, 128, (n, k), dtype=torch.int8), scale, group_size)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    zero_point = nested = None
    if name == "int4 affine":
        zero_point = torch.randint(0, 256, (n, (groups + 1) // 2), dtype=torch.uint8)
    if name == "nf4 nested":
        scale = torch.randint(0, 256, (n, groups), dtype=torch.uint8)
        absmax = torch.rand(-(-scale.numel() // 256)) * 0.1
        nested = NestedScale(absmax, torch.tensor(0.3), torch.tensor(DYNAMIC_INT8))
    codebook = INT4 if name.startswith("int4") else tuple(CODEBOOKS[name.split()[0]])
    return QuantizedWeight(codes, scale, group_size, codebook, zero_point, nested)


def nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)[:, :columns].long()


def restore(w: QuantizedWeight, codebook_dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The weight in float64, its codebook rounded to `codebook_dtype` first."""
    columns = w.in_features
    spread = torch.arange(columns) // w.group_size
    scale = w.scale.double()
    if w.nested is not None:
        absmax = w.nested.absmax.repeat_interleave(256)[: scale.numel()].view(scale.shape)
        scale = w.nested.table.double()[w.scale.long()] * absmax.double() + w.nested.offset.double()
    if w.codebook is None:
        return w.codes.double() * scale[:, spread]
    values = torch.tensor(w.codebook).to(codebook_dtype).double()[nibbles(w.codes, columns)]
    if w.zero_point is not None:
        values = values - (nibbles(w.zero_point, w.groups).double() - 8)[:, spread]
    return values * scale[:, spread]
