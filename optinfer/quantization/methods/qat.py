"""Quantization-aware training: let the weights learn to live with being rounded.

The forward pass uses rounded weights, the backward pass pretends that nothing was rounded (the straight-through
estimator), and the unquantized model is the teacher, as in LLM-QAT (arXiv 2305.17888, section 2.1).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from optinfer.quantization.experts import separate_experts
from optinfer.quantization.linear import matrix_of
from optinfer.quantization.methods.calibrate import Calibration, calibrate, install
from optinfer.quantization.methods.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["fake_quantize", "qat"]


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        return grid.round(x.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def fake_quantize(
    x: Tensor, bits: int = 4, group_size: int = 64, symmetric: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """Round as `quantize_linear` does, and come back to floating point; gradients pass as if nothing had happened.

    Args:
        x: ``[out, in]``.
        bits, group_size, symmetric: see `quantize_linear`.
        dtype: the weight's dtype after conversion, in which its scales are stored; that of `x` when None.

    Returns:
        ``[out, in]`` in `x.dtype`: exactly the values that the converted weight restores.
    """
    return _Round.apply(x, Grid(bits, group_size, symmetric), dtype or x.dtype)


class _FakeQuantized(nn.Module):
    """The parametrization that a training weight is seen through; gradients reach the weight underneath."""

    def __init__(self, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid, self.dtype = grid, dtype

    def forward(self, weight: Tensor) -> Tensor:
        return _Round.apply(weight, self.grid, self.dtype)


def qat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | list[str] | None = None,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    steps: int = 60,
    batch_size: int = 2,
    length: int = 256,
    learning_rate: float = 2e-4,
    progress: bool = True,
    losses: list[float] | None = None,
) -> PreTrainedModel:
    """Train the linear layers with rounded weights to give the unquantized model's predictions, then convert, in place.

    The student is a float32 copy; the model is changed only at the end.

    Args:
        model, tokenizer, texts: as for `calibrate`; the model itself is the teacher.
        bits, group_size, symmetric: of the rounding.
        steps, batch_size, length: optimizer steps, sequences a step, tokens a sequence.
        learning_rate: of AdamW, decaying linearly to zero.
        losses: receives the divergence from the teacher of every step, in nats per token.

    Returns:
        The same model, its linears now `QuantizedLinear`, whose weights are exactly those trained with.
    """
    from tqdm.auto import tqdm

    run = calibrate(model, tokenizer, texts, num_sequences=steps * batch_size, length=length)
    grid = Grid(bits, group_size, symmetric)
    run.check_groups(grid)
    student, dtypes = _student(model, run, grid)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    device = next(model.get_input_embeddings().parameters()).device
    order = torch.Generator().manual_seed(0)
    bar = tqdm(range(steps), desc="training", unit="step", disable=not progress)
    for _ in bar:
        ids = run.sequences[torch.randperm(len(run.sequences), generator=order, device="cpu")[:batch_size]].to(device)
        loss = _divergence(student, model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay.step()
        bar.set_postfix(nats=f"{float(loss.detach()):.3f}")
        if losses is not None:
            losses.append(float(loss.detach()))
    quantized = {}
    for name, dtype in dtypes.items():
        weight = student.get_submodule(name).parametrizations.weight.original.detach()
        quantized[name] = grid.quantize(weight.to(dtype))
    return install(model, quantized)


def _student(model: PreTrainedModel, run: Calibration, grid: Grid) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """A float32 copy that computes with rounded weights and learns those underneath; and the dtype that each came in."""
    student = copy.deepcopy(model)
    separate_experts(student)
    dtypes = {name: matrix_of(student.get_submodule(name)).dtype for name in run.widths_by_name}
    student.float().train().requires_grad_(False)
    for name, dtype in dtypes.items():
        linear = student.get_submodule(name)
        linear.weight.requires_grad_(True)
        parametrize.register_parametrization(linear, "weight", _FakeQuantized(grid, dtype), unsafe=True)
    return student, dtypes


def _divergence(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    """KL of the student's predictions from the teacher's, in nats per token; products in bfloat16 where the teacher's are."""
    with torch.no_grad():
        target = teacher(ids, use_cache=False).logits.float().log_softmax(-1)
    with torch.enable_grad():
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=teacher.dtype == torch.bfloat16):
            logits = student(ids, use_cache=False).logits
        guess = logits.float().log_softmax(-1)
        return nn.functional.kl_div(guess, target, log_target=True, reduction="sum") / ids.numel()
