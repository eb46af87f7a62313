"""Readers of lesson 0."""

import math

from tests.course.readers import wrong


@wrong("basics.weight_bytes")
def scale_bits_are_bytes(parameters, bits, group_size=0, scale_bits=16):
    scales = parameters / group_size if group_size else 0
    return parameters * bits / 8 + scales * scale_bits


@wrong("basics.weight_bytes")
def scales_always_in_fp16(parameters, bits, group_size=0, scale_bits=16):
    size = parameters * bits / 8
    return size + 2 * parameters / group_size if group_size else size


@wrong("basics.weight_bytes")
def gigabytes(parameters, bits, group_size=0, scale_bits=16):
    per_weight = bits + scale_bits / group_size if group_size else bits
    return parameters * per_weight / 8 / 1e9


@wrong("basics.weight_bytes")
def a_scale_for_the_whole_group_of_bits(parameters, bits, group_size=0, scale_bits=16):
    return parameters * bits / 8 + group_size * scale_bits / 8


@wrong("basics.roofline")
def bandwidth_below_the_ridge(intensity, peak, bandwidth):
    ridge = peak / bandwidth
    return peak if intensity >= ridge else bandwidth


@wrong("basics.roofline")
def bytes_per_flop(intensity, peak, bandwidth):
    return min(peak, bandwidth / intensity)


@wrong("basics.roofline")
def the_mean_of_both(intensity, peak, bandwidth):
    return (peak + intensity * bandwidth) / 2


@wrong("basics.roofline")
def share_of_the_peak(intensity, peak, bandwidth):
    return min(1, intensity * bandwidth / peak)


@wrong("basics.linear_intensity")
def output_as_large_as_input(batch, inputs, outputs, itemsize):
    flops = 2 * batch * inputs * outputs
    return flops / (itemsize * (inputs * outputs + 2 * batch * inputs))


@wrong("basics.linear_intensity")
def one_add_fewer_than_multiplies(batch, inputs, outputs, itemsize):
    flops = batch * outputs * (inputs + inputs - 1)
    return flops / (itemsize * (inputs * outputs + batch * (inputs + outputs)))


@wrong("basics.linear_intensity")
def output_never_written(batch, inputs, outputs, itemsize):
    return 2 * batch * inputs * outputs / ((inputs * outputs + batch * inputs) * itemsize)


@wrong("basics.linear_intensity", "only the weights' bytes")
def two_flop_for_each_weight_and_token(batch, inputs, outputs, itemsize):
    return 2 * batch / itemsize


@wrong("basics.decode_seconds", "the weights read for every sequence")
def each_sequence_waits_for_the_one_before(batch, weight_bytes, kv_bytes, flops_per_token, bandwidth, peak):
    one = max((weight_bytes + kv_bytes) / bandwidth, flops_per_token / peak)
    return batch * one


@wrong("basics.decode_seconds", "the arithmetic of one sequence")
def arithmetic_of_one_sequence(batch, weight_bytes, kv_bytes, flops_per_token, bandwidth, peak):
    return max((weight_bytes + batch * kv_bytes) / bandwidth, flops_per_token / peak)


@wrong("basics.decode_seconds")
def seconds_for_each_token(batch, weight_bytes, kv_bytes, flops_per_token, bandwidth, peak):
    step = max((weight_bytes + batch * kv_bytes) / bandwidth, batch * flops_per_token / peak)
    return step / batch


@wrong("basics.decode_seconds", "the faster of the two")
def the_faster_one_decides(batch, weight_bytes, kv_bytes, flops_per_token, bandwidth, peak):
    return min((weight_bytes + batch * kv_bytes) / bandwidth, batch * flops_per_token / peak)


def _intensity(batch, inputs, outputs, itemsize):
    return 2 * batch * inputs * outputs / itemsize / (inputs * outputs + batch * (inputs + outputs))


@wrong("basics.crossover_batch", "one token more than the ridge asks for")
def more_than_the_ridge(inputs, outputs, itemsize, peak, bandwidth):
    ridge = peak / bandwidth
    if 2 / itemsize / (1 / inputs + 1 / outputs) <= ridge:
        return None
    batch = 1
    while _intensity(batch, inputs, outputs, itemsize) <= ridge:
        batch += 1
    return batch


@wrong("basics.crossover_batch")
def a_fraction_of_a_token(inputs, outputs, itemsize, peak, bandwidth):
    ridge = peak / bandwidth
    room = 2 / (ridge * itemsize) - 1 / inputs - 1 / outputs
    return 1 / room if room > 0 else None


@wrong("basics.crossover_batch")
def never_is_zero(inputs, outputs, itemsize, peak, bandwidth):
    ridge = peak / bandwidth
    if 2 / itemsize / (1 / inputs + 1 / outputs) <= ridge:
        return 0
    return math.ceil(1 / (2 / (ridge * itemsize) - 1 / inputs - 1 / outputs))


@wrong("basics.crossover_batch")
def powers_of_two_only(inputs, outputs, itemsize, peak, bandwidth):
    for batch in (2**n for n in range(24)):
        if _intensity(batch, inputs, outputs, itemsize) >= peak / bandwidth:
            return batch
    return None
