"""The format workshop: sixteen values and a rule for their scale, yours to choose, and where they end up.

A format is judged by what it does to the model (KL divergence), what it weighs (bits), and what its decoder costs on a GPU
(machine instructions per weight, counted in the compiled kernel; no GPU is needed for that).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from optinfer.quantization.checks import check_choice, check_weight
from optinfer.quantization.formats.small_floats import E2M1
from optinfer.quantization.layers import linear_layers
from optinfer.quantization.number_formats import FP4, NF4
from optinfer.quantization.quality import Agreement, Reference

__all__ = ["DESIGNS", "Design"]

SCALE_BITS = {"float32": 32, "bfloat16": 16, "e4m3": 8, "e8m0": 8}


@dataclass(frozen=True)
class Design:
    """A 4-bit format.

    Attributes:
        name: yours.
        values: sixteen numbers, in any order; the largest magnitude is where a block's largest weight goes.
        block: weights of a row that share a scale.
        scale: "float32", "bfloat16", "e4m3" (times one float32 per tensor) or "e8m0" (a power of two, at least the exact one).

    Raises:
        ValueError: not sixteen different finite values, none but zero, a block below one, or another scale.
    """

    name: str
    values: tuple[float, ...]
    block: int = 32
    scale: str = "bfloat16"

    def __post_init__(self) -> None:
        found = torch.tensor(self.values, dtype=torch.float64)
        if len(self.values) != 16 or not found.isfinite().all() or not found.any():
            raise ValueError(f"values must be sixteen finite numbers, not all zero, got {self.values!r}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        check_choice(self.scale, tuple(SCALE_BITS), "scale")

    @property
    def bits_per_weight(self) -> float:
        """Codes and scales; one number for a whole tensor does not count."""
        return 4 + SCALE_BITS[self.scale] / self.block

    def restore(self, weight: Tensor) -> Tensor:
        """The weight ``[out, in]`` after a round trip through the format, in its dtype."""
        check_weight(weight)
        x = weight.detach().float()
        blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % self.block)).unflatten(1, (-1, self.block))
        levels = torch.tensor(sorted(self.values), device=x.device)
        scale = self._stored(blocks.abs().amax(-1, keepdim=True) / levels.abs().max())
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(blocks / scale.clamp_min(1e-30), middles)
        return (levels[codes] * scale).flatten(1)[:, : x.shape[1]].to(weight.dtype)

    def _stored(self, scale: Tensor) -> Tensor:
        if self.scale == "float32":
            return scale
        if self.scale == "bfloat16":
            return scale.bfloat16().float()
        if self.scale == "e8m0":
            return torch.exp2(scale.clamp_min(2.0**-126).log2().ceil())
        whole = scale.max().clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
        return (scale / whole).to(torch.float8_e4m3fn).float() * whole

    def error(self, weight: Tensor) -> float:
        """Relative error of a weight: the root of its mean square over the weight's."""
        return float((self.restore(weight).float() - weight.float()).norm() / weight.float().norm())

    def judge(self, reference: Reference) -> Agreement:
        """How far the model's words move when its linear layers hold this format. The model stays as it is."""
        other = copy.deepcopy(reference.model)
        for linear in linear_layers(other).values():
            linear.weight.data = self.restore(linear.weight)
        return reference.compare(other)[1]

    def instructions(self, arch: int = 80) -> float:
        """Machine instructions per weight in the main loop of the product for one token, on compute capability `arch`.

        Raises TritonMissing; RuntimeError while Triton interprets (``TRITON_INTERPRET``).
        """
        from optinfer_kernels.quantized_builds import compile_quantized

        levels = torch.tensor(self.values, dtype=torch.float64)
        steps = levels.sort().values.diff()
        if torch.allclose(steps, steps[0], rtol=1e-6):  # evenly spaced: arithmetic will do
            return compile_quantized("int4", arch, group_size=max(32, self.block)).instructions_per_weight
        book = tuple((levels / levels.abs().max()).tolist())
        return compile_quantized(
            "codebook", arch, group_size=max(32, self.block), codebook=book
        ).instructions_per_weight


DESIGNS = {
    design.name: design
    for design in (
        Design("int4", tuple(float(i) for i in range(-8, 8)), 64, "bfloat16"),
        Design("NF4", NF4, 64, "float32"),
        Design("FP4", FP4, 64, "float32"),
        Design("MXFP4", E2M1, 32, "e8m0"),
        Design("E2M1, E8M0 for 16", E2M1, 16, "e8m0"),
        Design("NVFP4", E2M1, 16, "e4m3"),
    )
}
