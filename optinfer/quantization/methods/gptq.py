"""GPTQ: round one column at a time, and let the columns not yet rounded make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323.

A layer's output is ``W x``, so what matters is not how far a rounded weight is from the original but how far the
output moves over real inputs: ``sum |(W - Q) x|^2 = trace((W - Q) H (W - Q)^T)`` with ``H`` the sum of ``x x^T``.

Two grids keep that error at or below round to nearest's, always:

- The grids are those of the original weights ("static groups" in the authors' code). The paper refits each group's grid
  to the weights as compensation has left them; at 2 bits that feeds back: errors as large as the weights widen the next
  grid, whose steps make larger errors still. Measured on random matrices, 1.6 times round to nearest's error with
  refitted grids and 0.64 with static ones; at 3 and 4 bits the two are within a few percent.
- Rows of a layer do not interact, so a row that compensation did not help keeps its nearest codes.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.quantization.checks import check_weight
from optinfer.quantization.formats.grid import BITS, GridTensor, quantize_linear, resolve_group_size, scale_and_zero
from optinfer.quantization.formats.tensor import GroupSize, QuantizedTensor
from optinfer.quantization.methods.calibrate import Calibration, CalibrationLayer, calibrate, quantize_layers
from optinfer.quantization.methods.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["gptq", "gptq_quantize", "output_error"]

BLOCK = 128  # columns updated eagerly; the rest of the matrix is updated once per block (paper, section 3.3, step 2)
RETRIES = 3


def output_error(weight: Tensor, restored: Tensor | QuantizedTensor, hessian: Tensor) -> float:
    """How far a layer's output moves, over the inputs behind `hessian`: ``trace((W - Q) H (W - Q)^T)``.

    With the Hessian of `calibrate` (``2 / n * sum x x^T``) this is twice the mean squared change of the output vector.
    Evaluated in float64.
    """
    return float(row_errors(weight, restored, hessian).sum())


def row_errors(weight: Tensor, restored: Tensor | QuantizedTensor, hessian: Tensor) -> Tensor:
    """The same for each output feature, float64 ``[out]``."""
    if isinstance(restored, QuantizedTensor):
        restored = restored.dequantize(torch.float32)
    difference = weight.detach().double() - restored.double()
    return ((difference @ hessian.double()) * difference).sum(1)


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group_size: GroupSize = 64,
    damp: float = 0.01,
    act_order: bool = False,
    symmetric: bool = True,
) -> QuantizedTensor:
    """Quantize one matrix so that its output, not its weights, stays close.

    Args:
        weight: ``[out, in]``, float32, bfloat16 or float16.
        hessian: ``[in, in]``, sum or mean of ``x x^T`` over calibration inputs; any positive factor cancels.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; must divide `in`. ``"channel"``: one scale a row.
        damp: this share of the Hessian's mean diagonal is added to its diagonal.
        act_order: visit the columns with the largest inputs first, while most others can still make up for them. Groups
            stay consecutive columns, so the stored format does not change and no kernel has to gather.
        symmetric: see `scale_and_zero`.

    Returns:
        A QuantizedTensor of scheme ``int{bits}`` with the scales and zero points of `quantize_linear`. In no row is
        ``trace((W - Q) H (W - Q)^T)`` larger than for that function's codes.

    Raises:
        ValueError: shapes disagree, groups do not divide, or the Hessian stays indefinite after three times more damping.
    """
    group = _check(weight, hessian, bits, group_size, damp)
    top, bottom = (1 << bits) - 1, 1 if symmetric else 0
    groups = weight.detach().float().unflatten(1, (-1, group))
    grid = scale_and_zero(groups.amin(-1), groups.amax(-1), bits, symmetric, weight.dtype)
    scale, zero = (each.T.contiguous() for each in grid)  # [groups, out]

    def finish(codes: Tensor) -> QuantizedTensor:
        zeros = None if symmetric else zero.T.contiguous().to(torch.uint8)
        return GridTensor.from_codes(codes, scale.T.contiguous(), zeros, bits, group, dtype=weight.dtype)

    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    factor = inverse_factor(hessian if order is None else hessian[order][:, order], damp)
    compensated = finish(_compensated_codes(weight, factor, scale, zero, bottom, top, order))
    plain = quantize_linear(weight, bits, group, symmetric)
    worse = row_errors(weight, compensated, hessian) > row_errors(weight, plain, hessian)
    return finish(torch.where(worse[:, None], plain.codes(), compensated.codes())) if worse.any() else compensated


def _check(weight: Tensor, hessian: Tensor, bits: int, group_size: GroupSize, damp: float) -> int:
    """The group size as a number of columns; raises as `gptq_quantize` says."""
    check_weight(weight)
    width = weight.shape[1]
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
    group = resolve_group_size(group_size, weight.shape)
    if group == 0:
        raise ValueError('group_size "tensor" is not defined for GPTQ: a grid per row ("channel") or per group')
    if width % group:
        raise ValueError(f"group_size={group} does not divide the layer's {width} inputs")
    if hessian.shape != (width, width):
        raise ValueError(
            f"hessian must be [{width}, {width}] for a weight {tuple(weight.shape)}, got {tuple(hessian.shape)}"
        )
    if not torch.isfinite(hessian).all():
        raise ValueError("hessian has NaN or Inf values: the calibration activations overflowed")
    if not damp > 0:
        raise ValueError(f"damp must be positive, got {damp!r}")
    return group


def _compensated_codes(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bottom: int, top: int, order: Tensor | None
) -> Tensor:
    """Round one column after the other, each error made up for by the columns that are still to come.

    Args:
        factor: float64 ``[in, in]``, see `inverse_factor`, its columns as they are visited.
        scale, zero: ``[groups, out]``, of consecutive columns.
        order: which column comes when; None: as they stand.

    Returns:
        uint8 ``[out, in]``.
    """
    rows, width = weight.shape
    group = width // len(scale)
    step = torch.where(scale == 0, 1, scale).float()
    columns = weight.detach().double().T.contiguous()  # [in, out]: one row of this is one column of the weight
    if order is not None:
        columns = columns[order]
    codes = torch.empty(width, rows, dtype=torch.uint8, device=weight.device)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        local = columns[start:stop]
        errors = torch.empty_like(local)
        for i, at in enumerate(range(start, stop)):
            column = at if order is None else int(order[at])
            g = column // group
            code = (local[i].float() / step[g]).round_().add_(zero[g]).clamp_(bottom, top)
            codes[column] = code.to(torch.uint8)
            rounded = (code - zero[g]).double() * scale[g].double()
            errors[i] = (local[i] - rounded) / factor[at, at]
            local[i:].addr_(factor[at, at:stop], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse Hessian, float64 (paper, section 3.3, step 3).

    Row ``i`` holds what eliminating columns ``0 … i-1`` leaves of row ``i`` of the inverse, divided by the root of its
    diagonal: all that the column loop needs, without updating the inverse after each column.

    An input that calibration never saw has an empty row; it gets a diagonal of its own, which makes its column be
    rounded to nearest. Without success the damping is raised tenfold, three times, with a warning each.
    """
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal().clone()
    unseen = diagonal == 0
    mean = diagonal[~unseen].mean() if bool((~unseen).any()) else torch.ones((), dtype=torch.float64)
    diagonal[unseen] = mean
    tried = damp
    for attempt in range(RETRIES + 1):
        damped.diagonal().copy_(diagonal + tried * mean.abs())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor = torch.cholesky_inverse(factor)  # one name: three matrices at a time, not five
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
        if not failed:
            return factor
        if attempt < RETRIES:
            warnings.warn(
                f"the Hessian is not positive definite with damp={tried:g}; trying damp={10 * tried:g}. "
                "More, or more varied, calibration text avoids this",
                stacklevel=3,
            )
            tried *= 10
    raise ValueError(
        f"the Hessian is not positive definite even with damp={tried:g}: it is not a sum of x x^T. "
        "Look for NaN or overflow in the calibration activations"
    )


def gptq(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | Calibration,
    texts: str | list[str] | None = None,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    damp: float = 0.01,
    act_order: bool = True,
    report: list[dict[str, Any]] | None = None,
    **calibration: Any,
) -> PreTrainedModel:
    """Quantize every linear layer of a decoder with GPTQ, in place; embeddings and the output head stay.

    Layer by layer: each is calibrated on what the layers before it, already quantized, now produce. The model is
    changed only when the last layer is done; an error or an interruption leaves it as it was.

    Args:
        model: any causal language model of transformers whose decoder is a list of layers.
        tokenizer, texts: see `calibrate`; a ready `Calibration` may stand in for the tokenizer.
        bits, group_size, symmetric, damp, act_order: see `gptq_quantize`.
        report: a list that receives one dict per linear layer: ``name``, ``error`` and ``rtn_error`` (see `output_error`).
        **calibration: passed on to `calibrate`.

    Returns:
        The same model, its linears now `QuantizedLinear`.
    """
    grid = Grid(bits, group_size, symmetric)
    run = calibrate(model, tokenizer, texts, **calibration)
    run.check_groups(grid)

    def rounded(layer: CalibrationLayer, name: str) -> QuantizedTensor:
        weight, hessian = layer.linears[name].weight, layer.statistics[name].hessian
        q = gptq_quantize(weight, hessian, bits, group_size, damp, act_order, symmetric)
        if report is not None:
            errors = [output_error(weight, one, hessian) for one in (q, grid.quantize(weight))]
            report.append({"name": f"{layer.name}.{name}", "error": errors[0], "rtn_error": errors[1]})
        return q

    return quantize_layers(model, run, rounded)
