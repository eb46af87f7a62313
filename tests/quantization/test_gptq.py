"""GPTQ against its own objective: brute force, identities that must hold, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optinfer.quantization.formats.grid import quantize_linear, scale_and_zero
from optinfer.quantization.methods.gptq import gptq_quantize, inverse_factor, output_error, row_errors


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return 2 / len(inputs) * inputs.T @ inputs


def correlated_inputs(tokens: int, features: int, generator: torch.Generator) -> torch.Tensor:
    mixing = torch.randn(features, features, generator=generator) / math.sqrt(features)
    scales = torch.exp(torch.randn(features, generator=generator))
    return torch.randn(tokens, features, generator=generator) @ mixing * scales


def brute_force(weight, hessian, bits, group_size, symmetric, damp, order):
    """Column by column in float64: after each rounding, solve for the best values of all columns not yet rounded.

    Knows nothing of Cholesky factors or lazy blocks: ``W_rest = W0_rest + (W0 - Q)_done H_done,rest H_rest,rest^-1``.
    """
    original = weight.double()
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    width = weight.shape[1]
    visit = list(range(width)) if order is None else order.tolist()
    current, restored = original.clone(), torch.zeros_like(original)
    scale, zero = scale_and_zero(*weight.unflatten(1, (-1, group_size)).aminmax(dim=-1), bits, symmetric, torch.float32)
    for i, c in enumerate(visit):
        g = c // group_size
        code = (current[:, c].float() / scale[:, g]).round() + zero[:, g]
        code = code.clamp(1 if symmetric else 0, 2**bits - 1)
        restored[:, c] = (code - zero[:, g]).double() * scale[:, g].double()
        done, rest = visit[: i + 1], visit[i + 1 :]
        if rest:
            moved = (original - restored)[:, done] @ h[done][:, rest]
            current[:, rest] = original[:, rest] + torch.linalg.solve(h[rest][:, rest], moved, left=False)
    nearest = quantize_linear(weight, bits, group_size, symmetric).dequantize().double()
    for r in range(len(weight)):  # rows that compensation did not help
        moved, plain = original[r] - restored[r], original[r] - nearest[r]
        if moved @ hessian.double() @ moved > plain @ hessian.double() @ plain:
            restored[r] = nearest[r]
    return restored


def assert_equal_weights(q, expected):
    """To 1e-6 of the largest weight: the two find the same codes, and scales that differ by float32 rounding."""
    assert (q.dequantize(torch.float32).double() - expected).abs().max() < 1e-6 * expected.abs().max().clamp(min=1)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.sampled_from([(8, 4), (16, 2), (12, 1), (4, 9), (3, 5)]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    rows=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(bits, groups, symmetric, act_order, rows, seed):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    group_size, width = groups[0], groups[0] * groups[1]
    weight = torch.randn(rows, width, generator=generator)
    hessian = hessian_of(correlated_inputs(4 * width, width, generator))
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    q = gptq_quantize(weight, hessian, bits, group_size, act_order=act_order, symmetric=symmetric)
    expected = brute_force(weight, hessian, bits, group_size, symmetric, 0.01, order)
    assert_equal_weights(q, expected)


@pytest.mark.parametrize("group_size", [64, 96, 192, "channel"])
def test_lazy_blocks_equal_brute_force(group_size):
    """More columns than one block, so that the update of the rest of the matrix is used."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    weight = torch.randn(5, 384, generator=generator)
    hessian = hessian_of(correlated_inputs(1000, 384, generator))
    q = gptq_quantize(weight, hessian, 3, group_size)
    expected = brute_force(weight, hessian, 3, 384 if group_size == "channel" else group_size, True, 0.01, None)
    assert_equal_weights(q, expected)


def test_the_comparison_can_fail():
    """Reusing the inverse instead of its factor, a bug seen in the wild, is told apart."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    weight = torch.randn(4, 16, generator=generator)
    hessian = hessian_of(correlated_inputs(64, 16, generator))
    expected = brute_force(weight, hessian, 3, 8, True, 0.01, None)
    assert (quantize_linear(weight, 3, 8).dequantize().double() - expected).abs().max() > 1e-3
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    wrong, right = torch.linalg.inv(damped), inverse_factor(hessian, 0.01)
    assert (wrong[0] / wrong[0, 0] - right[0] / right[0, 0]).abs().max() < 1e-6  # the first row agrees …
    assert (wrong[5, 5:] / wrong[5, 5] - right[5, 5:] / right[5, 5]).abs().max() > 1e-3  # … later ones do not


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uncorrelated_inputs_give_round_to_nearest(bits, symmetric, dtype):
    """With a diagonal Hessian no column can make up for another: GPTQ is round to nearest, bit for bit."""
    weight = torch.randn(24, 128, generator=torch.Generator(torch.get_default_device()).manual_seed(bits)).to(dtype)
    hessian = torch.diag(torch.rand(128, generator=torch.Generator(torch.get_default_device()).manual_seed(7)) + 0.1)
    ours = gptq_quantize(weight, hessian, bits, 32, symmetric=symmetric)
    nearest = quantize_linear(weight, bits, 32, symmetric)
    assert torch.equal(ours.packed, nearest.packed)
    assert torch.equal(ours.scale, nearest.scale)
    assert symmetric or torch.equal(ours.zero_point, nearest.zero_point)
    assert ours.nbytes == nearest.nbytes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_below_round_to_nearest(bits, act_order):
    generator = torch.Generator(torch.get_default_device()).manual_seed(bits)
    weight = torch.randn(64, 256, generator=generator)
    inputs = correlated_inputs(2048, 256, generator)
    hessian = hessian_of(inputs)
    nearest = quantize_linear(weight, bits, 64)
    ours = gptq_quantize(weight, hessian, bits, 64, act_order=act_order)
    assert output_error(weight, ours, hessian) < 0.7 * output_error(weight, nearest, hessian)
    measured = (inputs.double() @ (weight - ours.dequantize()).double().T).square().sum(1).mean()
    assert output_error(weight, ours, hessian) == pytest.approx(2 * float(measured), rel=1e-5)


@given(
    bits=st.sampled_from([2, 3, 4]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    tokens=st.integers(1, 100),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_never_worse_than_round_to_nearest_in_any_row(bits, symmetric, act_order, tokens, seed):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    weight = torch.randn(9, 48, generator=generator) * torch.rand(48, generator=generator).pow(4)
    hessian = hessian_of(correlated_inputs(tokens, 48, generator))
    ours = gptq_quantize(weight, hessian, bits, 16, act_order=act_order, symmetric=symmetric)
    nearest = quantize_linear(weight, bits, 16, symmetric)
    assert (row_errors(weight, ours, hessian) <= row_errors(weight, nearest, hessian)).all()


def test_a_row_that_compensation_hurts_keeps_its_nearest_codes():
    """Such rows exist: damping so heavy makes the compensation serve another objective."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(8)
    weight = torch.randn(400, 16, generator=generator)
    hessian = hessian_of(correlated_inputs(64, 16, generator))
    ours, nearest = gptq_quantize(weight, hessian, 2, 8, damp=3.0), quantize_linear(weight, 2, 8)
    same = (ours.codes() == nearest.codes()).all(1)
    assert 0 < same.sum() < 400
    assert (row_errors(weight, ours, hessian) <= row_errors(weight, nearest, hessian)).all()


def test_scale_of_the_hessian_does_not_matter():
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    weight = torch.randn(8, 64, generator=generator)
    hessian = hessian_of(correlated_inputs(512, 64, generator))
    a, b = gptq_quantize(weight, hessian, 4, 32), gptq_quantize(weight, 1024 * hessian, 4, 32)
    assert torch.equal(a.packed, b.packed)


def test_inputs_never_seen_are_rounded_to_nearest():
    generator = torch.Generator(torch.get_default_device()).manual_seed(4)
    weight = torch.randn(8, 64, generator=generator)
    inputs = correlated_inputs(512, 64, generator)
    inputs[:, 32:] = 0
    q = gptq_quantize(weight, hessian_of(inputs), 4, 32)
    assert torch.equal(q.dequantize()[:, 32:], quantize_linear(weight, 4, 32).dequantize()[:, 32:])


def test_all_zero_weights_stay_zero():
    q = gptq_quantize(torch.zeros(4, 32), torch.eye(32), 4, 16, symmetric=False)
    assert torch.equal(q.dequantize(), torch.zeros(4, 32))


def test_rank_deficient_hessian_works_with_damping():
    inputs = torch.randn(5, 64, generator=torch.Generator(torch.get_default_device()).manual_seed(5))
    weight = torch.randn(3, 64, generator=torch.Generator(torch.get_default_device()).manual_seed(6))
    q = gptq_quantize(weight, hessian_of(inputs), 4, 32)
    assert torch.isfinite(q.dequantize()).all()


def test_indefinite_hessian_retries_then_says_so():
    hessian = torch.eye(32)
    hessian[0, 0] = -0.5  # enough damping heals this one
    weight = torch.randn(2, 32)
    with pytest.warns(UserWarning, match="not positive definite with damp=0.01; trying damp=0.1"):
        gptq_quantize(weight, hessian, 4, 16)
    hessian[0, 0] = -1e6
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="not positive definite even with damp=10"):
        gptq_quantize(weight, hessian, 4, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 5}, "bits must be one of"),
        ({"group_size": 24}, "group_size=24 does not divide the layer's 64 inputs"),
        ({"group_size": "tensor"}, "not defined for GPTQ"),
        ({"hessian": torch.eye(32)}, r"hessian must be \[64, 64\]"),
        ({"hessian": torch.full((64, 64), float("nan"))}, "hessian has NaN"),
        ({"weight": torch.full((4, 64), float("inf"))}, "NaN or Inf"),
        ({"damp": 0.0}, "damp must be positive"),
    ],
)
def test_bad_input(change, message):
    arguments = {"weight": torch.randn(4, 64), "hessian": torch.eye(64), "bits": 4, "group_size": 32} | change
    with pytest.raises(ValueError, match=message):
        gptq_quantize(**arguments)
