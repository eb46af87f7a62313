"""Readers of lesson 2."""

import math

import torch

from optinfer.course.exercises.calibrated import round_to_grid, round_trip
from tests.course.readers import wrong


@wrong("calibrated.perplexity")
def shifted_the_other_way(logits, tokens):
    logp = logits[1:].double().log_softmax(-1)
    return math.exp(-sum(row[t].item() for row, t in zip(logp, tokens[:-1])) / (len(tokens) - 1))


@wrong("calibrated.perplexity")
def one_over_the_mean_probability(logits, tokens):
    p = logits[:-1].double().softmax(-1)
    return 1 / p[torch.arange(len(tokens) - 1), tokens[1:]].mean().item()


@wrong("calibrated.perplexity")
def the_entropy_of_the_prediction(logits, tokens):
    logp = logits[:-1].double().log_softmax(-1)
    return math.exp(-(logp.exp() * logp).sum(-1).mean().item())


@wrong("calibrated.perplexity")
def the_whole_texts_surprise(logits, tokens):
    logp = logits[:-1].double().log_softmax(-1)
    return math.exp(-logp[torch.arange(len(tokens) - 1), tokens[1:]].sum().item())


@wrong("calibrated.hessian")
def a_covariance(batches):
    x = torch.cat([b.float() for b in batches])
    x = x - x.mean(0)
    return 2 / len(x) * x.T @ x


@wrong("calibrated.hessian")
def divided_by_the_number_of_batches(batches):
    return 2 / len(batches) * sum(b.float().T @ b.float() for b in batches)


@wrong("calibrated.hessian")
def the_squares_alone(batches):
    x = torch.cat([b.float() for b in batches])
    return torch.diag(2 * x.square().mean(0))


@wrong("calibrated.hessian")
def divided_by_the_inputs(batches):
    x = torch.cat([b.float() for b in batches])
    return 2 * x.T @ x / x.shape[1]


@wrong("calibrated.gptq_step", "only rounding")
def the_factors_column(weight, factor, scale, i):
    new = weight.clone()
    new[:, i] = round_to_grid(weight[:, i], scale)
    error = (weight[:, i] - new[:, i]) / factor[i, i]
    new[:, i + 1 :] -= error[:, None] * factor[i + 1 :, i]
    return new


@wrong("calibrated.gptq_step")
def the_next_column_alone(weight, factor, scale, i):
    new = weight.clone()
    new[:, i] = round_to_grid(weight[:, i], scale)
    if i + 1 < weight.shape[1]:
        new[:, i + 1] -= (weight[:, i] - new[:, i]) / factor[i, i] * factor[i, i + 1]
    return new


@wrong("calibrated.gptq_step")
def shared_evenly(weight, factor, scale, i):
    new = weight.clone()
    new[:, i] = round_to_grid(weight[:, i], scale)
    rest = weight.shape[1] - i - 1
    if rest:
        new[:, i + 1 :] += ((weight[:, i] - new[:, i]) / rest)[:, None]
    return new


@wrong("calibrated.gptq_step")
def the_inverse_instead_of_its_factor(weight, factor, scale, i):
    inverse = factor.T @ factor
    new = weight.clone()
    new[:, i] = round_to_grid(weight[:, i], scale)
    error = (weight[:, i] - new[:, i]) / inverse[i, i]
    new[:, i + 1 :] -= torch.outer(error, inverse[i, i + 1 :])
    return new


@wrong("calibrated.inverse_factor")
def the_inverse_of_the_factor(hessian, damp=0.01):
    h = hessian.clone()
    for i in range(len(h)):
        if h[i, i] == 0:
            h[i, i] = 1
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    return torch.linalg.inv(torch.linalg.cholesky(h))


@wrong("calibrated.inverse_factor")
def damped_before_the_dead_inputs(hessian, damp=0.01):
    h = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    dead = hessian.diagonal() == 0
    h[dead, dead] = 1.0
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


@wrong("calibrated.inverse_factor")
def each_number_damped_by_its_own_size(hessian, damp=0.01):
    h = hessian.clone()
    d = h.diagonal()
    d[d == 0] = 1.0
    d *= 1 + damp
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


@wrong("calibrated.inverse_factor")
def dead_inputs_not_in_the_mean(hessian, damp=0.01):
    h = hessian.clone()
    d = h.diagonal()
    mean = d[d != 0].mean()
    d[d == 0] = 1.0
    d += damp * mean
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def _factor(hessian):
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


@wrong("calibrated.gptq")
def one_scale_for_the_layer(weight, hessian):
    w, u = weight.clone(), _factor(hessian)
    scale = (weight.abs().max() / 7).expand(len(weight))
    for i in range(w.shape[1]):
        q = round_to_grid(w[:, i], scale)
        w[:, i + 1 :] -= ((w[:, i] - q) / u[i, i])[:, None] * u[i, i + 1 :]
        w[:, i] = q
    return w


@wrong("calibrated.gptq", "round to nearest")
def the_original_column_rounded(weight, hessian):
    w, u, scale = weight.clone(), _factor(hessian), weight.abs().amax(1) / 7
    out = torch.empty_like(w)
    for i in range(w.shape[1]):
        out[:, i] = round_to_grid(weight[:, i], scale)
        w[:, i + 1 :] -= ((weight[:, i] - out[:, i]) / u[i, i])[:, None] * u[i, i + 1 :]
    return out


@wrong("calibrated.gptq")
def the_important_columns_first(weight, hessian):
    order = hessian.diagonal().argsort(descending=True)
    w, u, scale = weight[:, order].clone(), _factor(hessian[order][:, order]), weight.abs().amax(1) / 7
    for i in range(w.shape[1]):
        q = round_to_grid(w[:, i], scale)
        w[:, i + 1 :] -= ((w[:, i] - q) / u[i, i])[:, None] * u[i, i + 1 :]
        w[:, i] = q
    return w[:, order.argsort()]


@wrong("calibrated.gptq")
def the_last_correction_not_rounded_again(weight, hessian):
    w, u, scale = weight.clone(), _factor(hessian), weight.abs().amax(1) / 7
    q = torch.stack([round_to_grid(column, scale) for column in w.T], 1)
    for i in range(w.shape[1]):
        q[:, i + 1 :] -= ((w[:, i] - q[:, i]) / u[i, i])[:, None] * u[i, i + 1 :]
    return q


@wrong("calibrated.awq_scales")
def the_power_before_the_mean(x, alpha):
    s = (x.abs() ** alpha).mean(0).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


@wrong("calibrated.awq_scales")
def normalized_by_the_mean(x, alpha):
    s = (x.abs().mean(0) ** alpha).clamp(min=1e-4)
    return s / s.mean()


@wrong("calibrated.awq_scales")
def the_root_of_the_mean_square(x, alpha):
    s = (x.square().mean(0).sqrt() ** alpha).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


@wrong("calibrated.awq_scales")
def the_floor_before_the_power(x, alpha):
    s = x.abs().mean(0).clamp(min=1e-4) ** alpha
    return s / (s.max() * s.min()).sqrt()


def _scales(x, alpha):
    s = (x.abs().mean(0) ** alpha).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


@wrong("calibrated.awq_search")
def the_sum_of_the_squares(weight, x, alphas):
    found = []
    for alpha in alphas:
        s = _scales(x, alpha)
        found.append((((x @ (round_trip(weight * s) / s).T - x @ weight.T) ** 2).sum().item(), alpha))
    error, alpha = min(found)
    return alpha, error


@wrong("calibrated.awq_search")
def the_place_in_the_grid(weight, x, alphas):
    errors = []
    for alpha in alphas:
        s = _scales(x, alpha)
        errors.append(((x @ (round_trip(weight * s) / s).T - x @ weight.T) ** 2).mean().item())
    return errors.index(min(errors)), min(errors)


@wrong("calibrated.awq_search", "multiplied a second time")
def inputs_multiplied_instead_of_divided(weight, x, alphas):
    found = []
    for alpha in alphas:
        s = _scales(x, alpha)
        found.append((((x * s) @ round_trip(weight * s).T - x @ weight.T).square().mean().item(), alpha))
    return min(found)[1], min(found)[0]


@wrong("calibrated.awq_search")
def the_error_alone(weight, x, alphas):
    best = math.inf
    for alpha in alphas:
        s = _scales(x, alpha)
        best = min(best, ((x @ (round_trip(weight * s) / s).T - x @ weight.T) ** 2).mean().item())
    return best


@wrong("calibrated.straight_through", "the end cut before rounding")
def cut_before_rounding(x, scale):
    inside = (x / scale).abs() <= 7
    rounded = (x / scale).round().clamp(-7, 7) * scale
    passed = torch.where(inside, x, x.detach())
    return passed + (rounded - passed).detach()


@wrong("calibrated.straight_through")
def the_codes_themselves(x, scale):
    inside = ((x / scale).round().abs() <= 7).float()
    codes = (x / scale).round().clamp(-7, 7)
    passed = x * inside
    return passed + (codes - passed).detach()


@wrong("calibrated.straight_through", "a gradient of zero")
def detached_altogether(x, scale):
    return ((x.detach() / scale).round().clamp(-7, 7)) * scale


@wrong("calibrated.straight_through")
def the_end_left_out(x, scale):
    codes = (x / scale).round()
    passed = torch.where(codes.abs() < 7, x, x.detach())
    return passed + (codes.clamp(-7, 7) * scale - passed).detach()


@wrong("calibrated.straight_through")
def eight_below_zero(x, scale):
    codes = (x / scale).round()
    passed = torch.where((codes >= -8) & (codes <= 7), x, x.detach())
    return passed + (codes.clamp(-8, 7) * scale - passed).detach()
