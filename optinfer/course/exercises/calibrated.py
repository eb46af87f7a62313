# ruff: noqa: E501 (the hints are prose)
"""Exercises on calibrated quantization: perplexity, Hessians, GPTQ, AWQ, and training through the rounding."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optinfer.course.exercise import Case, Draw, Exercise, Wrong, case, slow_case


# --------------------------------------------------------------------------------------------------- perplexity
def perplexity(logits: Tensor, tokens: Tensor) -> float:
    """Perplexity of a text under a model.

    logits: [length, vocabulary], float32 or bfloat16; row i is computed from tokens 0 … i
    tokens: int64 [length]
    returns: exp of the mean negative log-likelihood of the tokens that were predicted
    """
    log_probabilities = logits[:-1].double().log_softmax(dim=-1)
    nll = -log_probabilities.gather(1, tokens[1:, None])
    return math.exp(nll.mean())


def _perplexity_reference(logits: Tensor, tokens: Tensor) -> float:
    total = 0.0
    for row, token in zip(logits.double()[:-1], tokens.tolist()[1:]):
        total += torch.logsumexp(row, 0).item() - row[token].item()
    return math.exp(total / (len(tokens) - 1))


def _perplexity_cases(draw: Draw) -> Iterator[Case]:
    yield case("12 tokens of a vocabulary of 7", draw.normal(12, 7), draw.integers(0, 7, 12))
    yield case("a confident model, often wrong", 6 * draw.normal(9, 5), draw.integers(0, 5, 9))
    yield case("two tokens", draw.normal(2, 30), draw.integers(0, 30, 2))
    yield case("it knows nothing: perplexity is the vocabulary's size", torch.zeros(6, 50), draw.integers(0, 50, 6))
    logits = (200 + 4 * draw.normal(40, 6)).bfloat16()
    yield case("bfloat16, logits around 200", logits, draw.integers(0, 6, 40))


PERPLEXITY = Exercise(
    id="calibrated.perplexity",
    title="How surprised is the model?",
    difficulty=2,
    minutes=10,
    spec="""\
Row `i` of the logits has seen the tokens 0 … i, so it predicts token `i + 1`. Perplexity is `exp` of the mean negative
log-likelihood (natural logarithm) over all predicted tokens.""",
    answer=perplexity,
    cases=_perplexity_cases,
    reference=_perplexity_reference,
    hints=(
        "Which row of the logits is about which token, and how many predictions are there?",
        "Drop the last row and the first token; log_softmax; pick each token's log-probability; exp of minus the mean.",
        "`logits[:-1].double().log_softmax(-1).gather(1, tokens[1:, None])`, then `math.exp(-mean)`.",
    ),
    wrong=(
        Wrong(
            "no shift",
            "Row i has already seen token i: predicting it again is not what is asked. Row i belongs to token i + 1.",
            ("logits[:-1]", "logits"),
            ("tokens[1:, None]", "tokens[:, None]"),
        ),
        Wrong(
            "logarithms in 16 bits",
            "bfloat16 has 8 bits of precision: each log-probability is off by up to 1 %. Convert the logits to float32 first.",
            ("logits[:-1].double()", "logits[:-1]"),
            ("nll.mean()", "nll.float().mean()"),
        ),
        Wrong(
            "the mean of perplexities",
            "The exponential comes after the mean: exp(mean(nll)), not mean(exp(nll)).",
            ("math.exp(nll.mean())", "nll.exp().mean().item()"),
        ),
        Wrong(
            "the exponential forgotten",
            "The mean negative log-likelihood is the cross-entropy; perplexity is its exponential.",
            ("math.exp(nll.mean())", "nll.mean().item()"),
        ),
        Wrong(
            "bits mixed with nats",
            "exp goes with the natural logarithm; 2** would need log2.",
            ("math.exp(nll.mean())", "2 ** nll.mean().item()"),
        ),
        Wrong(
            "divided by the number of tokens",
            "The first token is predicted by nothing: length tokens make length - 1 predictions.",
            ("nll.mean()", "nll.sum() / len(tokens)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- Hessian
def layer_hessian(batches: list[Tensor]) -> Tensor:
    """Hessian of a linear layer's squared output error with respect to one row of its weight.

    batches: inputs of the layer, float [tokens, in] each, of different lengths and possibly float16
    returns: float32 [in, in], 2 / n times the sum of x xᵀ over all n tokens
    """
    total, count = 0.0, 0
    for x in batches:
        x = x.float()
        total = total + x.T @ x
        count += len(x)
    return 2 / count * total


def _hessian_reference(batches: list[Tensor]) -> Tensor:
    tokens = torch.cat([x.double() for x in batches])
    return (2 * torch.einsum("ni,nj->ij", tokens, tokens) / len(tokens)).float()


def _hessian_cases(draw: Draw) -> Iterator[Case]:
    yield case("one batch", [draw.normal(10, 4)])
    yield case("batches of 3 and 17 tokens", [3 * draw.normal(3, 5), draw.normal(17, 5)])
    yield case("fewer tokens than inputs", [draw.normal(2, 6), draw.normal(1, 6)])
    yield case(
        "float16, large: its sums overflow",
        [300 * draw.normal(9, 3, dtype=torch.float16), draw.normal(4, 3, dtype=torch.float16)],
    )


HESSIAN = Exercise(
    id="calibrated.hessian",
    title="Which inputs matter?",
    difficulty=2,
    minutes=10,
    spec="""\
Change a weight row by δ, and the squared output error over n calibration tokens is δᵀ X ᵀX δ. Its Hessian is what GPTQ
works with. The tokens arrive in batches:

```python
H = 2 / n * sum(outer(x, x) for each of the n tokens)       # [in, in]
```""",
    answer=layer_hessian,
    cases=_hessian_cases,
    reference=_hessian_reference,
    hints=(
        "What does X.T @ X add up?",
        "Sum x.T @ x over the batches in float32, count the tokens, divide once at the end.",
        "`total += x.float().T @ x.float()`; `count += len(x)`; `return 2 / count * total`",
    ),
    wrong=(
        Wrong(
            "the mean of the batches' means",
            "A batch of 3 tokens would weigh as much as one of 17: divide once, by all tokens.",
            ("total = total + x.T @ x", "total = total + x.T @ x / len(x)"),
            ("count += len(x)", "count += 1"),
        ),
        Wrong(
            "tokens by tokens",
            "x @ x.T compares tokens with each other; the weights' Hessian is [in, in].",
            ("x.T @ x", "x @ x.T"),
        ),
        Wrong("the factor 2 forgotten", "The second derivative of a square is 2.", ("2 / count", "1 / count")),
        Wrong(
            "summed in half precision",
            "float16 ends at 65,504: squares of activations overflow. Convert before multiplying.",
            ("x = x.float()", "x = x"),
            ("2 / count * total", "(2 / count * total).float()"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- GPTQ
def round_to_grid(column: Tensor, scale: Tensor) -> Tensor:
    """Round each number of a column [out] to a multiple, from -7 to 7, of its row's scale [out]."""
    return (column / scale).round().clamp(-7, 7) * scale


def gptq_step(weight: Tensor, factor: Tensor, scale: Tensor, i: int) -> Tensor:
    """Quantize column i, and let the columns to its right make up for the error.

    weight: float64 [out, in], columns before i are already quantized
    factor: float64 [in, in], upper triangular, factor.T @ factor is the inverse Hessian
    scale: float64 [out], of each row
    returns: the new weight [out, in]
    """
    weight = weight.clone()
    rounded = round_to_grid(weight[:, i], scale)
    error = (weight[:, i] - rounded) / factor[i, i]
    weight[:, i] = rounded
    weight[:, i + 1 :] -= torch.outer(error, factor[i, i + 1 :])
    return weight


def _gptq_step_reference(weight: Tensor, factor: Tensor, scale: Tensor, i: int) -> Tensor:
    new = weight.clone()
    for r in range(len(weight)):
        q = min(7, max(-7, round((weight[r, i] / scale[r]).item()))) * scale[r].item()
        for j in range(i, weight.shape[1]):
            new[r, j] = weight[r, j] - (weight[r, i] - q) * factor[i, j] / factor[i, i]
    return new


def _spd(draw: Draw, size: int) -> Tensor:
    x = draw.normal(3 * size, size, dtype=torch.float64) @ draw.normal(size, size, dtype=torch.float64)
    return x.T @ x / len(x) + 0.1 * torch.eye(size, dtype=torch.float64)


def _factor(hessian: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def _gptq_step_cases(draw: Draw) -> Iterator[Case]:
    for label, rows, columns, i in (
        ("the first of 5 columns", 3, 5, 0),
        ("a middle column", 4, 7, 3),
        ("the last column", 2, 4, 3),
        ("one row of 12", 1, 12, 5),
    ):
        weight = draw.normal(rows, columns, dtype=torch.float64)
        yield case(label, weight, _factor(_spd(draw, columns)), weight.abs().amax(1) / 5, i)


GPTQ_STEP = Exercise(
    id="calibrated.gptq_step",
    title="Pass the error on",
    difficulty=3,
    minutes=15,
    prerequisites=("calibrated.hessian",),
    spec="""\
GPTQ quantizes a weight column by column. After column `i` is rounded, its error is passed on to the columns that are still
free, so that the layer's output changes least. With `U` the upper Cholesky factor of the inverse Hessian:

```python
error = (w[:, i] - rounded) / U[i, i]
w[:, j] -= error * U[i, j]              # for every j > i
```""",
    answer=gptq_step,
    cases=_gptq_step_cases,
    reference=_gptq_step_reference,
    given=(round_to_grid,),
    rtol=1e-7,
    atol=1e-9,
    hints=(
        "What is the shape of the correction of the columns to the right?",
        "Rows have errors, columns have factors: the correction is the outer product of error [out] and U[i, i+1:].",
        "`error = (w[:, i] - rounded) / factor[i, i]`\n`w[:, i + 1 :] -= torch.outer(error, factor[i, i + 1 :])`, on a clone of weight.",
    ),
    wrong=(
        Wrong(
            "the error is not divided by U[i, i]",
            "The factor's row holds U[i, i]² times what is needed: divide once by its diagonal.",
            (" / factor[i, i]", ""),
        ),
        Wrong(
            "the correction with the wrong sign",
            "If rounding took too much away, its neighbors must add it: subtract error × U.",
            ("] -= torch.outer", "] += torch.outer"),
        ),
        Wrong(
            "only rounding",
            "Without passing the error on, this is round to nearest: GPTQ's gain is the correction.",
            ("weight[:, i + 1 :] -= torch.outer(error, factor[i, i + 1 :])", "pass"),
        ),
        Wrong(
            "the error counted in steps of the scale",
            "The correction is added to weights, so the error must be in their unit, not in codes.",
            ("error = (weight[:, i] - rounded) / factor", "error = (weight[:, i] - rounded) / scale / factor"),
        ),
        Wrong(
            "changing the quantized column again",
            "Column i is finished; start the correction at i + 1.",
            (
                "weight[:, i + 1 :] -= torch.outer(error, factor[i, i + 1 :])",
                "weight[:, i:] -= torch.outer(error, factor[i, i:])",
            ),
        ),
    ),
)


def inverse_factor(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """Upper Cholesky factor of the inverse of a damped Hessian.

    hessian: float64 [in, in], symmetric; inputs that never occurred have a row and a column of zeros
    damp: share of the mean of the diagonal that is added to the diagonal
    returns: float64 [in, in], upper triangular U with U.T @ U = inverse of the damped Hessian
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damp * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _inverse_factor_reference(hessian: Tensor, damp: float = 0.01) -> Tensor:
    dead = torch.diag((hessian.diagonal() == 0).double())
    hessian = hessian + dead
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    flipped = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # hessian = flipped @ flipped.T, flipped upper
    return torch.linalg.inv(flipped)


def _inverse_factor_cases(draw: Draw) -> Iterator[Case]:
    yield case("5 inputs", _spd(draw, 5))
    yield case("strong damping", _spd(draw, 4), 0.3)
    x = draw.normal(3, 6, dtype=torch.float64)
    yield case("fewer tokens than inputs: singular without damping", x.T @ x)
    alive = torch.tensor([1.0, 1, 0, 1, 1], dtype=torch.float64)
    yield case("an input that never occurred", _spd(draw, 5) * alive[:, None] * alive)


INVERSE_FACTOR = Exercise(
    id="calibrated.inverse_factor",
    title="An inverse that does not blow up",
    difficulty=3,
    minutes=15,
    prerequisites=("calibrated.hessian",),
    spec="""\
"Not positive-definite" is the commonest error of GPTQ users. Prepare the Hessian before inverting it:

1. an input that never occurred (diagonal 0) gets a 1 on the diagonal;
2. then add `damp` times the mean of the diagonal to the diagonal;
3. return the upper Cholesky factor of the inverse.""",
    answer=inverse_factor,
    cases=_inverse_factor_cases,
    reference=_inverse_factor_reference,
    rtol=1e-7,
    atol=1e-9,
    hints=(
        "`H.diagonal()` is a view: writing to it writes to H. Work on a clone.",
        "Fix zeros, add damping, invert (cholesky, then cholesky_inverse), and factor the inverse with upper=True.",
        "`torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)` after both repairs of the diagonal.",
    ),
    wrong=(
        Wrong(
            "the factor of the Hessian, not of its inverse",
            "GPTQ's corrections come from the inverse: invert first, then factor.",
            ("inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))", "inverse = hessian"),
        ),
        Wrong(
            "the inverse without its factor",
            "The rows of the inverse are right only for the first column; the Cholesky factor holds what remains after each step.",
            ("return torch.linalg.cholesky(inverse, upper=True)", "return inverse"),
        ),
        Wrong(
            "lower instead of upper",
            "Column i corrects the columns to its right: the factor must be upper triangular.",
            ("torch.linalg.cholesky(inverse, upper=True)", "torch.linalg.cholesky(inverse)"),
        ),
        Wrong(
            "a fixed amount of damping",
            "Activations of size 100 and of size 0.01 need different damping: it is relative to the mean of the diagonal.",
            ("damp * diagonal.mean()", "damp"),
        ),
        Wrong(
            "dead inputs forgotten",
            "A zero on the diagonal means that the input never occurred; give it a 1, so that it influences nothing.",
            ("diagonal[diagonal == 0] = 1.0", "pass"),
        ),
    ),
)


def gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    """Quantize a weight to 4 bits so that the layer's output changes least.

    weight: float64 [out, in]
    hessian: float64 [in, in], positive definite
    returns: the dequantized weight, float64 [out, in]: every number a multiple, from -7 to 7, of its row's scale,
        which is the row's largest magnitude / 7 (before any correction)
    """
    weight = weight.clone()
    scale = weight.abs().amax(dim=1) / 7
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for i in range(weight.shape[1]):
        rounded = round_to_grid(weight[:, i], scale)
        error = (weight[:, i] - rounded) / factor[i, i]
        weight[:, i] = rounded
        weight[:, i + 1 :] -= torch.outer(error, factor[i, i + 1 :])
    return weight


def _gptq_reference(weight: Tensor, hessian: Tensor) -> Tensor:
    """Optimal brain quantization, inverting the rest of the Hessian anew for each column."""
    weight, scale = weight.clone(), weight.abs().amax(1) / 7
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:])
        rounded = round_to_grid(weight[:, i], scale)
        weight[:, i:] -= torch.outer((weight[:, i] - rounded) / inverse[0, 0], inverse[0])
        weight[:, i] = rounded
    return weight


def _run_gptq(answer: Callable[..., Tensor], *args: Any) -> Any:
    """The answer on a weight and a Hessian; or what the model says to a prompt with the answer's weights in it."""
    return _gptq_text(answer, *args) if isinstance(args[0], str) else answer(*args)


def _run_gptq_reference(*args: Any) -> Any:
    return _expected_gptq_text(*args) if isinstance(args[0], str) else _gptq_reference(*args)


@cache
def _expected_gptq_text(prompt: str, new_tokens: int) -> dict[str, str]:
    return _gptq_text(gptq, prompt, new_tokens)


def _gptq_text(answer: Callable[..., Tensor], prompt: str, new_tokens: int) -> dict[str, str]:
    """Quantize the key projection of every layer with the answer; put the old weights back afterwards."""
    from optinfer.course.exercises.real_model import default_model, greedy

    model, tokenizer = default_model()
    hessians = _key_hessians()
    projections = [layer.self_attn.k_proj for layer in model.model.layers]
    weights = [projection.weight.data for projection in projections]
    try:
        for projection, weight, hessian in zip(projections, weights, hessians):
            projection.weight.data = answer(weight.double(), hessian.clone()).float()
        return {"text": greedy(model, tokenizer, prompt, new_tokens)}
    finally:
        for projection, weight in zip(projections, weights):
            projection.weight.data = weight


@cache
def _key_hessians(tokens: int = 256) -> list[Tensor]:
    """Damped Hessians of the key projections, from the first tokens of the calibration text."""
    from optinfer import data
    from optinfer.course.exercises.real_model import default_model

    model, tokenizer = default_model()
    hessians: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0][0].double()
        hessian = 2 / len(x) * x.T @ x
        hessians.append(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64))

    hooks = [layer.self_attn.k_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
    try:
        with torch.inference_mode():
            model(tokenizer(data.text("calibration")[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens])
    finally:
        for hook in hooks:
            hook.remove()
    return hessians


def _gptq_cases(draw: Draw) -> Iterator[Case]:
    for label, rows, columns in (("3 x 4", 3, 4), ("8 x 16", 8, 16), ("one row of 31", 1, 31), ("32 x 24", 32, 24)):
        yield case(label, draw.normal(rows, columns, dtype=torch.float64), _spd(draw, columns))
    yield case(
        "inputs that are not correlated: round to nearest",
        draw.normal(4, 6, dtype=torch.float64),
        torch.eye(6, dtype=torch.float64),
    )
    yield slow_case("the real model, its key projections in 4 bits", "What is a GPU?", 12)


GPTQ = Exercise(
    id="calibrated.gptq",
    title="GPTQ",
    difficulty=5,
    minutes=30,
    prerequisites=("calibrated.gptq_step", "calibrated.inverse_factor"),
    spec="""\
Put the two together: one scale per row, fixed at the start; then column by column from left to right: round, divide the
error by the factor's diagonal, correct all columns to the right with the factor's row.

The measure of success is not the weights' error but the output's: `trace((W - Q) H (W - Q)ᵀ)`.

At the end the check quantizes the key projections of all 30 layers of the real model with your function, with Hessians of a
calibration text, and lets it talk.""",
    answer=gptq,
    cases=_gptq_cases,
    reference=_run_gptq_reference,
    run=_run_gptq,
    model=True,
    limit=60,
    given=(round_to_grid,),
    rtol=1e-7,
    atol=1e-9,
    hints=(
        "It is a loop over gptq_step, with a factor that is computed once.",
        "Scale from the original rows. Factor: upper Cholesky of the inverse Hessian. Each step uses the already corrected column.",
        "`factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)`; for each i: round, error / factor[i, i], "
        "write, subtract the outer product from the columns after i.",
    ),
    wrong=(
        Wrong(
            "round to nearest",
            "The columns are rounded, but the errors are not passed on.",
            ("weight[:, i + 1 :] -= torch.outer(error, factor[i, i + 1 :])", "pass"),
        ),
        Wrong(
            "the inverse itself instead of its factor",
            "After a column is fixed, the inverse of what remains changes; the Cholesky factor has that built in, the inverse does not.",
            ("torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)", "torch.linalg.inv(hessian)"),
        ),
        Wrong(
            "the factor of the Hessian",
            "Corrections come from the inverse Hessian: invert before factoring.",
            ("torch.linalg.inv(hessian), upper", "hessian, upper"),
        ),
        Wrong(
            "a new scale for every column",
            "The scale belongs to the row and is fixed before the first correction.",
            (
                "rounded = round_to_grid(weight[:, i], scale)",
                "rounded = round_to_grid(weight[:, i], weight.abs().amax(dim=1) / 7)",
            ),
        ),
        Wrong(
            "the last column left as it was",
            "The loop must reach the last column too.",
            ("range(weight.shape[1])", "range(weight.shape[1] - 1)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- AWQ
def awq_scales(x: Tensor, alpha: float) -> Tensor:
    """Scales of the input channels in AWQ.

    x: float32 [tokens, in], calibration inputs
    alpha: 0 protects nothing, 1 scales with the full mean magnitude
    returns: float32 [in], (mean |x| of the channel) ** alpha, at least 1e-4, normalized so that max * min = 1
    """
    scales = x.abs().mean(dim=0).pow(alpha).clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def _awq_scales_reference(x: Tensor, alpha: float) -> Tensor:
    means = [sum(abs(v) for v in column) / len(column) for column in x.double().T.tolist()]
    scales = [max(mean**alpha, 1e-4) for mean in means]
    return torch.tensor([s / math.sqrt(max(scales) * min(scales)) for s in scales])


def _awq_scales_cases(draw: Draw) -> Iterator[Case]:
    loud = torch.tensor([1.0, 30, 0.2, 1, 0.05])
    yield case("alpha 0.5, one loud channel", draw.normal(20, 5) * loud, 0.5)
    yield case("alpha 1", draw.normal(7, 5) * loud, 1.0)
    yield case("alpha 0: all ones", draw.normal(9, 4), 0.0)
    yield case("a silent channel", draw.normal(6, 3) * torch.tensor([1.0, 0.0, 5.0]), 0.8)
    yield case("one token", draw.normal(1, 8), 0.35)


AWQ_SCALES = Exercise(
    id="calibrated.awq_scales",
    title="Protect what meets large activations",
    difficulty=2,
    minutes=10,
    spec="""\
Weights that meet large activations matter most. AWQ multiplies them up before rounding (so that rounding hurts them less)
and divides the activations by the same number. The scales come from the activations alone:

```python
s = (mean |x| over the tokens) ** alpha         # at least 1e-4
s = s / sqrt(max(s) * min(s))                   # so that they spread evenly around 1
```""",
    answer=awq_scales,
    cases=_awq_scales_cases,
    reference=_awq_scales_reference,
    hints=(
        "Which dimension of x are the tokens?",
        "Mean magnitude over dim 0, power, clamp, then divide by the geometric mean of the largest and the smallest.",
        "`s = x.abs().mean(0).pow(alpha).clamp(min=1e-4)`\n`s / (s.max() * s.min()).sqrt()`",
    ),
    wrong=(
        Wrong(
            "the mean without magnitudes",
            "Positive and negative activations cancel: take abs() before the mean.",
            ("x.abs().mean(dim=0)", "x.mean(dim=0).abs()"),
        ),
        Wrong(
            "one scale per token",
            "The scales belong to the input channels: average over the tokens, dim 0.",
            ("mean(dim=0)", "mean(dim=1)"),
        ),
        Wrong(
            "not normalized",
            "Without the normalization large activations shift the scales of the whole layer, and float16 may overflow.",
            ("return scales / (scales.max() * scales.min()).sqrt()", "return scales"),
        ),
        Wrong(
            "the largest magnitude instead of the mean",
            "AWQ uses the mean; SmoothQuant uses the maximum.",
            ("x.abs().mean(dim=0)", "x.abs().amax(dim=0)"),
        ),
    ),
)


def round_trip(weight: Tensor) -> Tensor:
    """Quantize a weight [out, in] to 3 bits with one scale per row, and back."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 3
    return (weight / scale).round() * scale


def awq_search(weight: Tensor, x: Tensor, alphas: list[float]) -> tuple[float, float]:
    """Find the strength of protection that changes the layer's output least.

    weight: float32 [out, in]; x: float32 [tokens, in]
    alphas: to try
    returns: the best alpha, and its mean squared error of the output x @ weight.T
    """
    wanted = x @ weight.T
    best = (0.0, math.inf)
    for alpha in alphas:
        scales = x.abs().mean(dim=0).pow(alpha).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        quantized = round_trip(weight * scales) / scales
        error = (x @ quantized.T - wanted).square().mean().item()
        if error < best[1]:
            best = (alpha, error)
    return best


def _awq_search_reference(weight: Tensor, x: Tensor, alphas: list[float]) -> tuple[float, float]:
    errors = {}
    for alpha in alphas:
        s = _awq_scales_reference(x, alpha)
        errors[alpha] = (
            (((x / s) @ round_trip(weight * s).T).double() - x.double() @ weight.double().T).square().mean().item()
        )
    best = min(errors, key=errors.get)
    return best, errors[best]


def _awq_search_cases(draw: Draw) -> Iterator[Case]:
    grid = [i / 10 for i in range(10)]

    def loud(width: int, *channels: int) -> Tensor:
        size = torch.ones(width)
        size[list(channels)] = 12.0
        return size

    yield case("two loud channels of 16", draw.normal(8, 16), draw.normal(40, 16) * loud(16, 3, 9), grid)
    yield case(
        "one of 48, small weights there", draw.normal(16, 48) / loud(48, 5), draw.normal(32, 48) * loud(48, 5), grid
    )
    yield case("a grid in another order", draw.normal(6, 12), draw.normal(20, 12) * loud(12, 0), [0.9, 0.0, 0.6, 0.3])
    yield case("all channels alike", draw.normal(8, 20), draw.normal(64, 20), grid)
    silent = torch.ones(10).index_fill(0, torch.tensor([4]), 0.0)
    yield case("a channel that is always zero", draw.normal(6, 10), draw.normal(30, 10) * silent, grid)


AWQ_SEARCH = Exercise(
    id="calibrated.awq_search",
    title="AWQ's search",
    difficulty=4,
    minutes=20,
    prerequisites=("calibrated.awq_scales",),
    spec="""\
How strongly should the loud channels be protected? Too little, and they are rounded badly; too much, and they eat up the
range of everything else. AWQ tries a grid:

```python
for alpha in alphas:
    s = the scales of awq_scales(x, alpha)
    quantized = round_trip(weight * s) / s
    error = mean((x @ quantized.T - x @ weight.T) ** 2)
```

Return the alpha with the smallest error, and that error. You may call your `awq_scales` from above.""",
    answer=awq_search,
    cases=_awq_search_cases,
    reference=_awq_search_reference,
    given=(round_trip,),
    rtol=1e-3,
    hints=(
        "What is compared: the weights before and after, or what the layer computes with them?",
        "For each alpha: scales, quantize the scaled weight, undo the scaling, compare outputs. Keep the best.",
        "`quantized = round_trip(weight * s) / s`\n`error = (x @ quantized.T - x @ weight.T).square().mean().item()`",
    ),
    wrong=(
        Wrong(
            "measured on the weights instead of the output",
            "Unweighted weight error does not know which inputs are loud. Compare x @ quantized.T with x @ weight.T.",
            ("(x @ quantized.T - wanted)", "(quantized - weight)"),
        ),
        Wrong(
            "the scaling is not undone",
            "Dividing by s again is what keeps the layer's function the same.",
            ("round_trip(weight * scales) / scales", "round_trip(weight * scales)"),
        ),
        Wrong(
            "multiplied a second time",
            "What the weights were multiplied with, the activations must be divided by: dividing by s again stands for that.",
            ("round_trip(weight * scales) / scales", "round_trip(weight * scales) * scales"),
        ),
        Wrong(
            "scaled the wrong way round",
            "Loud channels must be multiplied up before rounding, not down.",
            ("round_trip(weight * scales) / scales", "round_trip(weight / scales) * scales"),
        ),
        Wrong(
            "the last instead of the best",
            "Keep the alpha with the smallest error, not the last one tried.",
            ("if error < best[1]:", "if True:"),
        ),
        Wrong(
            "rows scaled instead of columns",
            "The scales belong to input channels, the columns of weight [out, in].",
            ("x.abs().mean(dim=0).pow(alpha)", "weight.abs().mean(dim=0).pow(alpha)"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- QAT
def fake_quantize(x: Tensor, scale: float) -> Tensor:
    """Round to multiples of scale from -7 to 7, but let gradients through (the straight-through estimator).

    x: float32, any shape, may require a gradient
    returns: shape of x; its gradient with respect to x is 1 where round(x / scale) lies from -7 to 7, and 0 outside
    """
    inside = (x / scale).round().abs() <= 7
    rounded = ((x / scale).round().clamp(-7, 7) * scale).detach()
    passed = torch.where(inside, x, x.detach())
    return passed + (rounded - passed).detach()


def _with_gradient(answer: Callable[..., Tensor], x: Tensor, scale: float, upstream: Tensor) -> dict[str, Tensor]:
    """The result, and the gradient that reaches x when `upstream` comes back."""
    leaf = x.clone().requires_grad_()
    out = answer(leaf, scale)
    if out.requires_grad:
        (out * upstream).sum().backward()
    return {"result": out.detach(), "gradient": leaf.grad if leaf.grad is not None else torch.zeros_like(x)}


def _fake_quantize_reference(x: Tensor, scale: float, upstream: Tensor) -> dict[str, Tensor]:
    codes = torch.tensor([round(v) for v in (x / scale).flatten().tolist()], dtype=torch.float32).view(x.shape)
    return {"result": codes.clamp(-7, 7) * scale, "gradient": upstream * (codes.abs() <= 7)}


def _fake_quantize_cases(draw: Draw) -> Iterator[Case]:
    yield case("all inside", torch.tensor([0.12, -0.31, 0.58]), 0.1, torch.tensor([1.0, 2.0, -3.0]))
    yield case("some outside", torch.tensor([0.9, -0.2, -1.4, 0.33]), 0.1, torch.tensor([1.0, -1.0, 2.0, 0.5]))
    ends = torch.tensor([6.4, 6.6, 7.0, 7.2, 7.4, 7.6, 8.4, -6.6, -7.3, -7.4, -7.6, -9.0])
    yield case("around both ends of the range", ends * 0.25, 0.25, draw.normal(12))
    yield case("5 x 6", draw.normal(5, 6), 0.2, draw.normal(5, 6))
    yield case("a large scale", 50 * draw.normal(9), 3.0, draw.normal(9))


FAKE_QUANTIZE = Exercise(
    id="calibrated.straight_through",
    title="Train through the rounding",
    difficulty=3,
    minutes=20,
    spec="""\
Rounding is flat almost everywhere: its gradient is 0 and nothing learns. The straight-through estimator rounds on the way
forward and pretends on the way back that it did not. Where a number was clipped, the gradient is 0: there, moving it
changes nothing.

```python
forward:   clamp(round(x / scale), -7, 7) * scale
backward:  1 where round(x / scale) is from -7 to 7, else 0
```""",
    answer=fake_quantize,
    cases=_fake_quantize_cases,
    reference=_fake_quantize_reference,
    run=_with_gradient,
    hints=(
        "`y.detach()` has y's value and no gradient. How do you make something with the value of y and the gradient of x?",
        "x + (y - x).detach() has the value y and gradient 1. Cut the gradient where the code is out of range.",
        "`inside = (x / scale).round().abs() <= 7`\n`passed = torch.where(inside, x, x.detach())`\n`passed + (rounded - passed).detach()`",
    ),
    wrong=(
        Wrong(
            "a gradient of zero",
            "round() has gradient 0 everywhere: nothing before it can learn.",
            ("return passed + (rounded - passed).detach()", "return (x / scale).round().clamp(-7, 7) * scale"),
        ),
        Wrong(
            "a gradient where the number was clipped",
            "A clipped number does not change the output: its gradient is 0.",
            ("torch.where(inside, x, x.detach())", "x"),
        ),
        Wrong(
            "the end cut before rounding",
            "7.3 rounds to 7, which is in range: what counts is the code, not the number before rounding.",
            ("(x / scale).round().abs() <= 7", "(x / scale).abs() <= 7"),
        ),
        Wrong("no clamp", "Four bits end at ±7: what lies outside is clipped.", (".clamp(-7, 7)", "")),
        Wrong(
            "not rounded on the way forward",
            "The forward value must be what the quantized model would compute.",
            ("return passed + (rounded - passed).detach()", "return passed"),
        ),
        Wrong(
            "the gradient divided by the scale",
            "The division and the multiplication cancel: the gradient is 1, not 1/scale.",
            ("passed = torch.where(inside, x, x.detach())", "passed = torch.where(inside, x, x.detach()) / scale"),
        ),
    ),
)

EXERCISES = (PERPLEXITY, HESSIAN, GPTQ_STEP, INVERSE_FACTOR, GPTQ, AWQ_SCALES, AWQ_SEARCH, FAKE_QUANTIZE)
