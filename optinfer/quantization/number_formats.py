"""Number formats: which values a handful of bits can say.

A format is the list of its values. Everything else here (range, gaps, rounding) follows from that list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CODEBOOKS",
    "DYNAMIC_INT8",
    "FORMATS",
    "NumberFormat",
    "codebook",
    "dynamic_int8",
    "nf4_from_quantiles",
]

# NF4 (QLoRA, arXiv 2305.14314, appendix E): 16 quantiles of a normal distribution, scaled to [-1, 1], with
# an exact 0. Stored rather than computed: `nf4_from_quantiles` agrees to 2e-7, but packed bytes must agree
# to the last bit.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# FP4 as in bitsandbytes: sign, two exponent bits, one mantissa bit, by code (not sorted), scaled so that
# the largest is 1.
_FP4_HALF = tuple(v / 12 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = _FP4_HALF + tuple(-v for v in _FP4_HALF)

CodebookName = Literal["nf4", "fp4"]
CODEBOOKS: dict[str, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4}


@cache
def codebook(name: CodebookName, device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of a 4-bit codebook, float32 ``[16]``, indexed by code."""
    return torch.tensor(CODEBOOKS[name], dtype=torch.float32, device=device)


def nf4_from_quantiles(offset: float = 0.9677083) -> np.ndarray:
    """Derive NF4's 16 values from the quantiles of the standard normal distribution.

    Eight positive levels, seven negative ones and an exact zero, each side at equally spaced probabilities
    between 1/2 and `offset`, divided by the largest. `offset` keeps the outermost quantile finite: it is
    the mean of 1 - 1/30 and 1 - 1/32, the middles of the last of 15 and of 16 equal parts.
    """
    from statistics import NormalDist

    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(np.linspace(offset, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative]))
    return values / values.max()


def dynamic_int8() -> tuple[float, ...]:
    """The 256 values of the signed dynamic 8-bit map (Dettmers, arXiv 1511.04561) that hold double-quantized scales.

    A sign bit, then a run of zeros that says the power of ten, then a linear fraction: seven decades with
    1, 2, 4 … 64 values each, so that small scales keep their relative precision.
    """
    values: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        magnitude = (10 ** (-6 + decade)) * means
        values += magnitude.tolist() + (-magnitude).tolist()
    values += [0.0, 1.0]
    return tuple(torch.tensor(sorted(values), dtype=torch.float32).tolist())


DYNAMIC_INT8 = dynamic_int8()


@cache
def dynamic_table(device: torch.device | str = "cpu") -> Tensor:
    """`DYNAMIC_INT8` as float32 ``[256]``. Kept for each device: a copy in every call would break the capture of a graph."""
    with torch.inference_mode(False):  # whoever asks first must not decide that it cannot be used in training
        return torch.tensor(DYNAMIC_INT8, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class NumberFormat:
    """One way to spend `bits` bits on a number.

    Attributes:
        name: as in the literature.
        bits: of one number.
        kind: ``"float"`` (sign, exponent, mantissa), ``"integer"`` (two's complement, needs a scale) or
            ``"codebook"`` (an index into 16 values in [-1, 1], needs an absmax).
        exponent_bits, mantissa_bits: floats only.
        dtype: torch's type of the same bits, where there is one.
        scaled: True if its numbers mean something only together with a scale shared by a block.
    """

    name: str
    bits: int
    kind: str
    exponent_bits: int = 0
    mantissa_bits: int = 0
    dtype: torch.dtype | None = None

    @property
    def scaled(self) -> bool:
        return self.kind != "float"

    def values(self) -> np.ndarray:
        """All finite values, float64, sorted, without repeats (FP32 has too many: ValueError)."""
        table = self.table()
        return np.unique(table[np.isfinite(table)] + 0.0)  # + 0.0 turns -0.0 into 0.0

    def table(self) -> np.ndarray:
        """The value of every bit pattern ``0 … 2**bits - 1``, float64."""
        if self.bits > 16:
            raise ValueError(f"{self.name} has 2**{self.bits} values: too many to list")
        patterns = np.arange(1 << self.bits)
        if self.kind == "codebook":
            return np.array(CODEBOOKS[self.name.lower()], dtype=np.float32).astype(np.float64)
        if self.kind == "integer":
            half = 1 << (self.bits - 1)
            return np.where(patterns < half, patterns, patterns - 2 * half).astype(np.float64)
        return np.array([self.decode(int(p)) for p in patterns])

    def decode(self, pattern: int) -> float:
        """The number that a bit pattern stands for."""
        if self.kind != "float":
            return float(self.table()[pattern])
        e, m = self.exponent_bits, self.mantissa_bits
        sign = -1.0 if pattern >> (e + m) else 1.0
        exponent, mantissa = pattern >> m & (1 << e) - 1, pattern & (1 << m) - 1
        bias = (1 << (e - 1)) - 1
        if exponent == 0:  # subnormal: no hidden one
            return sign * mantissa * 2.0 ** (1 - bias - m)
        if exponent == (1 << e) - 1:
            if self.name == "FP8 E4M3":  # no infinity: only the very last pattern is not a number
                if mantissa == (1 << m) - 1:
                    return float("nan")
            else:
                return float("nan") if mantissa else sign * float("inf")
        return sign * (1 + mantissa / (1 << m)) * 2.0 ** (exponent - bias)

    def encode(self, value: float) -> int:
        """The bit pattern of the nearest value, ties to the even pattern; out of range: the largest there is.

        For scaled formats, `value` is already divided by its scale.
        """
        if self.kind == "float":
            if self.bits == 32:
                return int(np.float32(np.clip(value, -self.max, self.max)).view(np.uint32))
            as_float = torch.tensor(np.clip(value, -self.max, self.max), dtype=torch.float64).to(self.dtype)
            return int(as_float.view(torch.uint8 if self.bits == 8 else torch.uint16).item())
        table = self.table()
        if self.kind == "integer":
            limit = (1 << (self.bits - 1)) - 1
            return int(np.clip(np.rint(value), -limit, limit)) & ((1 << self.bits) - 1)
        return int(np.abs(table - value).argmin())

    def round(self, value: float) -> float:
        """The nearest value of the format."""
        return self.decode(self.encode(value))

    def fields(self, pattern: int) -> list[tuple[str, str]]:
        """A pattern's bits, cut into named fields: ``[("sign", "0"), ("exponent", "01111"), ("mantissa", "10…")]``."""
        digits = format(pattern, f"0{self.bits}b")
        if self.kind == "codebook":
            return [("index", digits)]
        if self.kind == "integer":
            return [("sign", digits[0]), ("integer", digits[1:])]
        return [
            ("sign", digits[0]),
            ("exponent", digits[1 : 1 + self.exponent_bits]),
            ("mantissa", digits[1 + self.exponent_bits :]),
        ]

    @property
    def max(self) -> float:
        """Largest finite value."""
        if self.kind == "codebook":
            return 1.0
        if self.kind == "integer":
            return float((1 << (self.bits - 1)) - 1)
        top = (1 << self.exponent_bits) - (1 if self.name == "FP8 E4M3" else 2)
        last = (1 << self.mantissa_bits) - (2 if self.name == "FP8 E4M3" else 1)
        return self.decode(top << self.mantissa_bits | last)

    @property
    def smallest(self) -> float:
        """Smallest positive value."""
        if self.kind == "codebook":
            return min(v for v in CODEBOOKS[self.name.lower()] if v > 0)
        return 1.0 if self.kind == "integer" else self.decode(1)


FORMATS: dict[str, NumberFormat] = {
    f.name: f
    for f in (
        NumberFormat("FP32", 32, "float", 8, 23, torch.float32),
        NumberFormat("FP16", 16, "float", 5, 10, torch.float16),
        NumberFormat("BF16", 16, "float", 8, 7, torch.bfloat16),
        NumberFormat("FP8 E4M3", 8, "float", 4, 3, torch.float8_e4m3fn),
        NumberFormat("FP8 E5M2", 8, "float", 5, 2, torch.float8_e5m2),
        NumberFormat("INT8", 8, "integer", dtype=torch.int8),
        NumberFormat("INT4", 4, "integer"),
        NumberFormat("NF4", 4, "codebook"),
        NumberFormat("FP4", 4, "codebook"),
    )
}
