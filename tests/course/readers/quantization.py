"""Readers of lesson 1."""

import itertools
import math
from statistics import NormalDist

import torch

from tests.course.readers import wrong


@wrong("quantization.absmax")
def a_scale_for_each_row(x):
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / scale.clamp(min=1e-30)).round().to(torch.int8), scale.squeeze(-1)


@wrong("quantization.absmax")
def the_whole_range_of_int8(x):
    x = x.float()
    scale = (x.max() - x.min()) / 255
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


@wrong("quantization.absmax")
def the_largest_magnitude_is_the_scale(x):
    x = x.float()
    scale = x.abs().max()
    return (x / scale.clamp(min=1e-30) * 127).round().to(torch.int8), scale


@wrong("quantization.absmax")
def zeros_have_scale_one(x):
    x = x.float()
    scale = x.abs().max() / 127
    if scale == 0:
        scale = torch.tensor(1.0)
    return (x / scale).round().to(torch.int8), scale


@wrong("quantization.zero_point")
def rounded_once_from_the_lower_end(x):
    x = x.float()
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = torch.tensor(high - low) / 255
    if scale == 0:
        return torch.zeros(x.shape, dtype=torch.uint8), scale, torch.tensor(0)
    codes = ((x - low) / scale).round()
    return codes.to(torch.uint8), scale, torch.round(-low / scale).long()


@wrong("quantization.zero_point")
def the_zero_point_is_the_smallest_number(x):
    x = x.float()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    codes = (x - low) / scale if scale > 0 else x
    return codes.round().clamp(0, 255).to(torch.uint8), scale, low


@wrong("quantization.zero_point")
def a_symmetric_range_around_128(x):
    x = x.float()
    scale = 2 * x.abs().max() / 255
    if scale == 0:
        return torch.zeros(x.shape, dtype=torch.uint8), scale, torch.tensor(0)
    return ((x / scale).round() + 128).clamp(0, 255).to(torch.uint8), scale, torch.tensor(128)


@wrong("quantization.pack_nibbles", "filled at the front")
def filled_at_the_front(codes):
    if len(codes) % 2:
        codes = torch.cat([torch.zeros(1, dtype=torch.uint8), codes])
    return codes[0::2] * 16 + codes[1::2]


@wrong("quantization.pack_nibbles")
def decimal_digits(codes):
    if len(codes) % 2:
        codes = torch.cat([codes, torch.zeros(1, dtype=torch.uint8)])
    return codes[0::2] * 10 + codes[1::2]


@wrong("quantization.pack_nibbles")
def numbers_of_64_bits(codes):
    pairs = [*codes.tolist(), 0]
    return torch.tensor([pairs[i] * 16 + pairs[i + 1] for i in range(0, len(codes), 2)], dtype=torch.int64)


@wrong("quantization.pack_nibbles")
def an_odd_end_in_the_low_half(codes):
    out = [16 * a + b for a, b in zip(codes.tolist()[0::2], codes.tolist()[1::2])]
    if len(codes) % 2:
        out.append(int(codes[-1]))
    return torch.tensor(out, dtype=torch.uint8)


@wrong("quantization.unpack_nibbles")
def rounded_instead_of_shifted(packed, n):
    high = (packed / 16).round().to(torch.uint8)
    return torch.stack([high, packed % 16], 1).flatten()[:n]


@wrong("quantization.unpack_nibbles")
def signed_codes(packed, n):
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:n].to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes)


@wrong("quantization.unpack_nibbles", "keeping the filling")
def n_bytes(packed, n):
    return torch.stack([packed[:n] >> 4, packed[:n] & 15], 1).flatten()


@wrong("quantization.unpack_nibbles")
def a_list_of_numbers(packed, n):
    out = []
    for byte in packed.tolist():
        out += [byte // 16, byte % 16]
    return out[:n]


@wrong("quantization.groups")
def groups_as_equal_as_possible(weight, group_size):
    pieces = weight.tensor_split(-(-weight.shape[1] // group_size), dim=1)
    scales = torch.stack([p.abs().amax(1) / 7 for p in pieces], 1)
    codes = [(p / s.clamp(min=1e-30)[:, None]).round() for p, s in zip(pieces, scales.T)]
    return torch.cat(codes, 1).to(torch.int8), scales


@wrong("quantization.groups")
def zeros_have_scale_one_here(weight, group_size):
    pieces = weight.split(group_size, dim=1)
    scales = torch.stack([p.abs().amax(1) / 7 for p in pieces], 1)
    scales = torch.where(scales == 0, 1.0, scales)
    codes = [(p / s[:, None]).round() for p, s in zip(pieces, scales.T)]
    return torch.cat(codes, 1).to(torch.int8), scales


@wrong("quantization.groups")
def all_sixteen_codes(weight, group_size):
    pieces = weight.split(group_size, dim=1)
    scales = torch.stack([p.abs().amax(1) / 7.5 for p in pieces], 1)
    codes = [(p / s.clamp(min=1e-30)[:, None]).round().clamp(-8, 7) for p, s in zip(pieces, scales.T)]
    return torch.cat(codes, 1).to(torch.int8), scales


@wrong("quantization.groups")
def the_number_of_groups(weight, group_size):
    pieces = weight.chunk(group_size, dim=1)
    scales = torch.stack([p.abs().amax(1) / 7 for p in pieces], 1)
    codes = [(p / s.clamp(min=1e-30)[:, None]).round() for p, s in zip(pieces, scales.T)]
    return torch.cat(codes, 1).to(torch.int8), scales


@wrong("quantization.nf4_levels")
def both_sides_at_once(offset=0.9677083):
    probabilities = torch.linspace(1 - offset, offset, 16, dtype=torch.float64).tolist()
    levels = torch.tensor([NormalDist().inv_cdf(p) for p in probabilities], dtype=torch.float64)
    return levels / levels.max()


@wrong("quantization.nf4_levels")
def means_between_neighboring_quantiles(offset=0.9677083):
    q = NormalDist().inv_cdf
    edges = [q(p) for p in torch.linspace(1 - offset, offset, 17, dtype=torch.float64).tolist()]
    levels = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(edges)], dtype=torch.float64)
    return levels / levels.max()


@wrong("quantization.nf4_levels")
def probabilities_short_of_one_half(offset=0.9677083):
    q = NormalDist().inv_cdf
    positive = [q(offset - i * (offset - 0.5) / 9) for i in range(8)]
    negative = [-q(offset - i * (offset - 0.5) / 8) for i in range(7)]
    levels = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64)
    return levels / levels.max()


@wrong("quantization.nf4_levels")
def from_the_largest_down(offset=0.9677083):
    q = NormalDist().inv_cdf
    step8, step7 = (offset - 0.5) / 8, (offset - 0.5) / 7
    up, down = [q(offset - i * step8) for i in range(8)], [-q(0.5 + i * step7) for i in range(1, 8)]
    levels = torch.tensor([*up, 0.0, *down], dtype=torch.float64)
    return levels / levels[0]


@wrong("quantization.nf4_quantize")
def the_levels_themselves(weight, block_size, levels):
    blocks = weight.view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp(min=1e-38)[:, None]
    return levels[(scaled[..., None] - levels).abs().argmin(-1)].flatten(), absmax


@wrong("quantization.nf4_quantize")
def the_level_above(weight, block_size, levels):
    blocks = weight.view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp(min=1e-38)[:, None]
    return torch.searchsorted(levels, scaled).to(torch.uint8).flatten(), absmax


@wrong("quantization.nf4_quantize")
def the_blocks_standard_deviation(weight, block_size, levels):
    blocks = weight.view(-1, block_size)
    size = blocks.square().mean(1).sqrt()
    scaled = blocks / size.clamp(min=1e-38)[:, None]
    return (scaled[..., None] - levels).abs().argmin(-1).to(torch.uint8).flatten(), size


@wrong("quantization.nf4_quantize")
def zeros_kept_finite_by_a_small_number(weight, block_size, levels):
    blocks = weight.view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks / (absmax + 1e-8)[:, None]
    return (scaled[..., None] - levels).abs().argmin(-1).to(torch.uint8).flatten(), absmax


def _codes(x, dim):
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-30) / 127 if x.numel() else x.new_ones(len(x), 1)
    return (x / scale).round(), scale


@wrong("quantization.llm_int8")
def tokens_with_outliers_apart(x, weight, threshold=6.0):
    hot = (x.abs() >= threshold).any(1)
    cx, sx = _codes(x, 1)
    cw, sw = _codes(weight, 1)
    return torch.where(hot[:, None], x @ weight.T, (cx @ cw.T) * sx * sw.T)


@wrong("quantization.llm_int8")
def single_numbers_apart(x, weight, threshold=6.0):
    hot = x.abs() >= threshold
    cx, sx = _codes(torch.where(hot, 0.0, x), 1)
    cw, sw = _codes(weight, 1)
    return (cx @ cw.T) * sx * sw.T + torch.where(hot, x, 0.0) @ weight.T


@wrong("quantization.llm_int8")
def outlier_columns_of_the_weight_too(x, weight, threshold=6.0):
    hot = (x.abs() >= threshold).any(0) | (weight.abs() >= threshold).any(0)
    cx, sx = _codes(x[:, ~hot], 1)
    _, sw = _codes(weight, 1)
    return (cx @ (weight[:, ~hot] / sw).round().T) * sx * sw.T + x[:, hot] @ weight[:, hot].T


@wrong("quantization.llm_int8")
def a_column_by_its_mean_magnitude(x, weight, threshold=6.0):
    hot = x.abs().mean(0) >= threshold
    cx, sx = _codes(x[:, ~hot], 1)
    _, sw = _codes(weight, 1)
    return (cx @ (weight[:, ~hot] / sw).round().T) * sx * sw.T + x[:, hot] @ weight[:, hot].T


def _nearest(scaled, levels):
    return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


@wrong("quantization.in_the_model")
def absmax_in_16_bits(weight, block_size, levels):
    blocks = weight.reshape(-1, block_size)
    absmax = blocks.abs().amax(1).half()
    codes = _nearest(blocks / absmax.float().clamp(min=1e-30)[:, None], levels).flatten()
    return codes[0::2] * 16 + codes[1::2], absmax


@wrong("quantization.in_the_model")
def one_absmax_for_the_layer(weight, block_size, levels):
    flat = weight.reshape(-1)
    absmax = flat.abs().max()
    codes = _nearest(flat / absmax, levels)
    return codes[0::2] * 16 + codes[1::2], absmax.expand(len(flat) // block_size)


@wrong("quantization.in_the_model")
def pairs_a_block_apart(weight, block_size, levels):
    blocks = weight.reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    codes = _nearest(blocks / absmax.clamp(min=1e-30)[:, None], levels)
    half = block_size // 2
    return (codes[:, :half] * 16 + codes[:, half:]).flatten(), absmax


@wrong("quantization.mx_scale", "the power of two above")
def the_power_of_two_above(block):
    return 127 + math.ceil(math.log2(block.abs().max())) - 2


@wrong("quantization.mx_scale", "the nearest power of two")
def the_nearest_power_of_two(block):
    return 127 + round(math.log2(block.abs().max())) - 2


@wrong("quantization.mx_scale")
def the_exponent_of_the_quotient(block):
    return 127 + math.floor(math.log2(block.abs().max() / 6))


@wrong("quantization.mx_scale")
def the_mean_magnitude(block):
    return 127 + math.floor(math.log2(block.abs().mean())) - 2


@wrong("quantization.nvfp4_scales")
def a_second_scale_for_each_row(weight):
    top = 448 * 6 / weight.abs().amax(1)
    blocks = weight.view(len(weight), -1, 16).abs().amax(2)
    return (blocks / 6 * top[:, None]).to(torch.float8_e4m3fn).float(), top


@wrong("quantization.nvfp4_scales")
def rounded_before_the_multiplication(weight):
    top = 448 * 6 / weight.abs().max()
    blocks = weight.view(len(weight), -1, 16).abs().amax(2)
    return (blocks / 6).to(torch.float8_e4m3fn).float() * top, top


@wrong("quantization.nvfp4_scales")
def the_block_scales_as_they_are_used(weight):
    top = 448 * 6 / weight.abs().max()
    blocks = weight.view(len(weight), -1, 16).abs().amax(2)
    return (blocks / 6 * top).to(torch.float8_e4m3fn).float() / top, top


@wrong("quantization.nvfp4_scales")
def the_inverse_of_the_tensors_number(weight):
    top = weight.abs().max() / (448 * 6)
    blocks = weight.view(len(weight), -1, 16).abs().amax(2)
    return (blocks / 6 / top).to(torch.float8_e4m3fn).float(), top


def _products(*sizes):
    return [dict(zip(("tokens", "rows", "columns", "group", "zero_points"), size)) for size in sizes]


@wrong("quantization.int4_inputs")
def the_sizes_of_models():
    return _products((1, 16, 32, 32, True), (16, 32, 32, 16, False), (32, 16, 48, 16, True))


@wrong("quantization.int4_inputs", "only whole tiles")
def powers_of_two_and_a_ragged_batch():
    return _products((5, 32, 16, 16, True), (20, 16, 32, 8, False))


@wrong("quantization.int4_inputs", "only what leaves a rest")
def prime_numbers():
    return _products((17, 3, 19, 7, True), (5, 19, 23, 13, False), (2, 3, 5, 11, True))


@wrong("quantization.int4_inputs", "only square weights")
def a_square_matrix_of_every_kind():
    return _products((3, 16, 16, 16, True), (20, 17, 17, 8, False), (7, 32, 32, 8, True))


@wrong("quantization.int4_inputs", "everything in one tile")
def small_is_quick():
    return _products((1, 1, 1, 1, True), (2, 3, 5, 2, False), (4, 6, 8, 4, True), (3, 5, 16, 5, False))


@wrong("quantization.int4_inputs")
def scales_without_zero_points():
    return _products((17, 5, 17, 8, False), (2, 18, 32, 16, False))
