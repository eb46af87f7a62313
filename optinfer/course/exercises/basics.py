# ruff: noqa: E501 (the hints are prose)
"""Exercises of the first notebook: bytes, rooflines, and how long a token takes."""

import math
from collections.abc import Iterator

from optinfer.course.exercise import Case, Draw, Exercise, Wrong, case


# --------------------------------------------------------------------------------------------------- bytes
def weight_bytes(parameters: int, bits: float, group_size: int = 0, scale_bits: int = 16) -> float:
    """Memory of a model's weights.

    parameters: how many
    bits: of one weight
    group_size: weights that share a scale; 0: there are no scales
    scale_bits: of one scale
    returns: bytes
    """
    total_bits = parameters * bits
    if group_size:
        total_bits += parameters / group_size * scale_bits
    return total_bits / 8


def _weight_bytes_reference(parameters: int, bits: float, group_size: int = 0, scale_bits: int = 16) -> float:
    per_weight = bits + (scale_bits / group_size if group_size else 0)
    return per_weight / 8 * parameters


def _weight_bytes_cases(draw: Draw) -> Iterator[Case]:
    yield case("70B in FP16", 70_000_000_000, 16)
    yield case("70B in int4, a 16-bit scale for 128", 70_000_000_000, 4, 128)
    yield case("7B in NF4, a 32-bit absmax for 64", 7_000_000_000, 4, 64, 32)
    yield case("a small model in int8", draw.random.randrange(10**6, 10**9), 8)
    yield case("1.58 bits", 1_000_000_000, 1.58)
    yield case("groups of 32, 8-bit scales", 135_000_000, 3, 32, 8)


WEIGHT_BYTES = Exercise(
    id="basics.weight_bytes",
    title="How big is a model?",
    difficulty=1,
    minutes=5,
    spec="""\
A weight of 16 bits takes 2 bytes: 70 billion take 140 GB. Below 8 bits the scales count too: one scale for each group of
weights.

```python
bytes = (parameters * bits + parameters / group_size * scale_bits) / 8
```""",
    answer=weight_bytes,
    cases=_weight_bytes_cases,
    reference=_weight_bytes_reference,
    rtol=1e-9,
    hints=(
        "How many bits does one weight cost, its share of the scale included?",
        "Weights: parameters × bits. Scales: one per group_size weights, if there are groups. Eight bits are a byte.",
        "`total_bits = parameters * bits`, plus `parameters / group_size * scale_bits` if group_size; return `total_bits / 8`.",
    ),
    wrong=(
        Wrong(
            "bits taken for bytes",
            "A byte has 8 bits: 70B weights of 16 bits are 140 GB, not 1120.",
            ("return total_bits / 8", "return total_bits"),
        ),
        Wrong(
            "scales forgotten",
            "A 16-bit scale for 64 weights is a quarter bit each: 6 % of a 4-bit model.",
            ("if group_size:", "if False:"),
        ),
        Wrong(
            "one scale for every weight",
            "A group shares its scale: divide by group_size.",
            ("parameters / group_size * scale_bits", "parameters * scale_bits"),
        ),
        Wrong(
            "whole bytes for a weight",
            "Codes narrower than a byte are packed: do not round up to bytes.",
            ("parameters * bits\n", "parameters * 8 * -(-bits // 8)\n"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- roofline
def attainable(intensity: float, peak: float, bandwidth: float) -> float:
    """Read a roofline.

    intensity: FLOP per byte moved
    peak: FLOP/s that the cores can do
    bandwidth: bytes/s that memory can move
    returns: FLOP/s that can be reached at best
    """
    return min(peak, intensity * bandwidth)


def _attainable_reference(intensity: float, peak: float, bandwidth: float) -> float:
    seconds_for_one_byte = max(1 / bandwidth, intensity / peak)
    return intensity / seconds_for_one_byte


def _attainable_cases(draw: Draw) -> Iterator[Case]:
    yield case("one token on an H200: memory decides", 1.0, 989e12, 4.8e12)
    yield case("a large batch: the cores decide", 1000.0, 989e12, 4.8e12)
    yield case("a laptop, near the ridge", 9.0, 200e9, 20e9)
    yield case("a laptop, past the ridge", 11.0, 200e9, 20e9)
    yield case("random", 10 ** draw.random.uniform(-1, 3), 1e14, 1e12)


ATTAINABLE = Exercise(
    id="basics.roofline",
    title="Read a roofline",
    difficulty=1,
    minutes=5,
    spec="""\
Two things can hold a computation up: moving its bytes, and doing its arithmetic. Both go on at the same time, so the
slower one decides. At `intensity` FLOP per byte, what is the highest rate in FLOP/s?""",
    answer=attainable,
    cases=_attainable_cases,
    reference=_attainable_reference,
    rtol=1e-9,
    hints=(
        "If memory delivers `bandwidth` bytes each second, how many FLOP can be done with them?",
        "Memory allows intensity × bandwidth, the cores allow peak. You get the smaller.",
        "`return min(peak, intensity * bandwidth)`",
    ),
    wrong=(
        Wrong(
            "only the slope",
            "intensity × bandwidth grows without end; the cores cannot do more than their peak.",
            ("min(peak, intensity * bandwidth)", "intensity * bandwidth"),
        ),
        Wrong(
            "only the roof",
            "At low intensity the cores wait for memory: the peak is out of reach.",
            ("min(peak, intensity * bandwidth)", "peak"),
        ),
        Wrong(
            "the larger of the two",
            "The slower of two things that must both happen decides: min, not max.",
            ("min(", "max("),
        ),
        Wrong(
            "adding both times",
            "Moving and computing overlap; adding them would mean that one waits for the other to end.",
            ("min(peak, intensity * bandwidth)", "1 / (1 / peak + 1 / (intensity * bandwidth))"),
        ),
    ),
)


def linear_intensity(batch: int, inputs: int, outputs: int, itemsize: float) -> float:
    """Arithmetic intensity of a linear layer: x [batch, inputs] @ weight.T [inputs, outputs].

    itemsize: bytes of one number, the same for input, weight and output
    returns: FLOP per byte moved, each tensor moved once; a multiply and an add are two FLOP
    """
    flops = 2 * batch * inputs * outputs
    moved = (inputs * outputs + batch * inputs + batch * outputs) * itemsize
    return flops / moved


def _intensity_reference(batch: int, inputs: int, outputs: int, itemsize: float) -> float:
    return 2 / itemsize / (1 / batch + 1 / outputs + 1 / inputs)


def _intensity_cases(draw: Draw) -> Iterator[Case]:
    yield case("one token, 4096 x 4096, 16 bits", 1, 4096, 4096, 2)
    yield case("256 tokens", 256, 4096, 14336, 2)
    yield case("int4 weights and activations", 16, 576, 1536, 0.5)
    yield case("a narrow layer", 64, 8, 4096, 4)
    yield case("random", *(draw.random.randrange(1, 3000) for _ in range(3)), 2)


INTENSITY = Exercise(
    id="basics.linear_intensity",
    title="Work per byte",
    difficulty=2,
    minutes=10,
    prerequisites=("basics.roofline",),
    spec="""\
A linear layer multiplies `x [batch, inputs]` with a weight `[outputs, inputs]`. Count its FLOP (a multiply and an add for
each pair) and its bytes (input, weight and output, each moved once), and divide.""",
    answer=linear_intensity,
    cases=_intensity_cases,
    reference=_intensity_reference,
    rtol=1e-9,
    hints=(
        "How often is one weight used when the batch has `batch` tokens, and how often is it moved?",
        "FLOP: 2 × batch × inputs × outputs. Bytes: itemsize × (weight + input + output).",
        "`2 * batch * inputs * outputs / ((inputs * outputs + batch * inputs + batch * outputs) * itemsize)`",
    ),
    wrong=(
        Wrong(
            "the weight moved for every token",
            "The batch shares one trip of the weights: that is why batching helps at all.",
            ("(inputs * outputs + batch", "(batch * inputs * outputs + batch"),
        ),
        Wrong(
            "a multiply-add counted once",
            "By convention a multiply and an add are two FLOP; vendors' peaks count that way too.",
            ("2 * batch", "batch"),
        ),
        Wrong(
            "only the weights' bytes",
            "At large batches the activations weigh as much as the weights.",
            (" + batch * inputs + batch * outputs", ""),
        ),
        Wrong(
            "numbers taken for bytes",
            "Each number takes itemsize bytes: fewer bits mean more FLOP per byte.",
            (" * itemsize", ""),
        ),
    ),
)


def decode_seconds(
    batch: int, weight_bytes: float, kv_bytes: float, flops_per_token: float, bandwidth: float, peak: float
) -> float:
    """Time of one decoding step, by the roofline.

    batch: sequences, one new token each
    weight_bytes: read once in a step
    kv_bytes: KV cache of one sequence, read once in a step
    flops_per_token: arithmetic for one token of one sequence
    bandwidth: bytes/s; peak: FLOP/s
    returns: seconds
    """
    moving = (weight_bytes + batch * kv_bytes) / bandwidth
    computing = batch * flops_per_token / peak
    return max(moving, computing)


def _decode_cases(draw: Draw) -> Iterator[Case]:
    yield case("one sequence, 7B on an H200", 1, 14e9, 0.1e9, 14e9, 4.8e12, 989e12)
    yield case("64 sequences", 64, 14e9, 0.1e9, 14e9, 4.8e12, 989e12)
    yield case("2048 short sequences: the cores decide", 2048, 14e9, 1e5, 14e9, 4.8e12, 989e12)
    yield case("a long context", 4, 14e9, 17e9, 14e9, 4.8e12, 989e12)
    yield case("slow cores: a single sequence keeps them busy", 3, 2e6, 1e4, 4e9, 20e9, 50e9)
    yield case("our model on a laptop", draw.random.randrange(1, 9), 269e6, 2.3e6, 0.27e9, 20e9, 100e9)


DECODE = Exercise(
    id="basics.decode_seconds",
    title="How long does a token take?",
    difficulty=2,
    minutes=10,
    prerequisites=("basics.roofline", "basics.linear_intensity"),
    spec="""\
One step gives every sequence of the batch one token. All weights travel once, each sequence's KV cache travels once, and
the arithmetic is done for each sequence. Moving and computing overlap. How long does the step take?""",
    answer=decode_seconds,
    cases=_decode_cases,
    rtol=1e-9,
    hints=(
        "What does the batch share, and what has each sequence for itself?",
        "Bytes: weights once, the cache once per sequence. FLOP: per sequence. The slower one decides.",
        "`max((weight_bytes + batch * kv_bytes) / bandwidth, batch * flops_per_token / peak)`",
    ),
    wrong=(
        Wrong(
            "the weights read for every sequence",
            "The batch shares one trip of the weights; that is what makes batching nearly free.",
            ("(weight_bytes + batch * kv_bytes)", "batch * (weight_bytes + kv_bytes)"),
        ),
        Wrong(
            "one KV cache for the whole batch",
            "Every sequence has its own cache; at long contexts it outweighs the weights.",
            ("batch * kv_bytes", "kv_bytes"),
        ),
        Wrong(
            "moving and computing one after the other",
            "They overlap: the longer one decides, the other hides behind it.",
            ("max(moving, computing)", "moving + computing"),
        ),
        Wrong(
            "counting arithmetic only",
            "At small batches the cores wait: a token takes as long as its bytes.",
            ("max(moving, computing)", "computing"),
        ),
        Wrong(
            "counting bytes only",
            "A large enough batch makes the cores the bottleneck.",
            ("max(moving, computing)", "moving"),
        ),
        Wrong(
            "the faster of the two",
            "A step ends when both are done: the slower one decides.",
            ("max(moving, computing)", "min(moving, computing)"),
        ),
        Wrong(
            "the arithmetic of one sequence",
            "Each sequence of the batch has its own token to compute; only the weights are shared.",
            ("batch * flops_per_token", "flops_per_token"),
        ),
    ),
)


def crossover_batch(inputs: int, outputs: int, itemsize: float, peak: float, bandwidth: float) -> int | None:
    """The smallest batch at which a linear layer keeps the cores busy.

    inputs, outputs, itemsize: of the layer, as in linear_intensity
    peak: FLOP/s; bandwidth: bytes/s
    returns: the batch, or None if no batch is large enough
    """
    ridge = peak / bandwidth
    gain = 2 * inputs * outputs - ridge * itemsize * (inputs + outputs)
    if gain <= 0:
        return None
    return max(1, math.ceil(ridge * itemsize * inputs * outputs / gain))


def _crossover_reference(inputs: int, outputs: int, itemsize: float, peak: float, bandwidth: float) -> int | None:
    def busy(batch: int) -> bool:
        return _intensity_reference(batch, inputs, outputs, itemsize) >= peak / bandwidth

    if not busy(10**9):
        return None
    low, high = 0, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if busy(middle) else (middle, high)
    return high


def _crossover_cases(draw: Draw) -> Iterator[Case]:
    yield case("4096 x 4096 on an H200", 4096, 4096, 2, 989e12, 4.8e12)
    yield case("the same in int8", 4096, 4096, 1, 989e12, 4.8e12)
    yield case("a laptop", 576, 1536, 2, 113e9, 19e9)
    yield case("too narrow: never", 64, 64, 2, 989e12, 4.8e12)
    yield case("the cores are always busy", 4096, 4096, 2, 1e9, 7e9)
    yield case("just never: each request brings as many bytes as the cores can use", 64, 64, 2, 32e9, 1e9)
    yield case("a layer of one weight", 1, 1, 2, 0.25e9, 1e9)
    yield case("a layer of one weight, never", 1, 1, 2, 0.625e9, 1e9)
    yield case("a batch of two meets the ridge exactly", 4, 4, 2, 1e9, 1e9)
    yield case("random", draw.random.randrange(500, 9000), draw.random.randrange(500, 9000), 2, 3.1e14, 2.03e12)


CROSSOVER = Exercise(
    id="basics.crossover_batch",
    title="When do the cores stop waiting?",
    difficulty=3,
    minutes=15,
    prerequisites=("basics.linear_intensity",),
    spec="""\
The ridge of the roofline is the intensity `peak / bandwidth` where slope and roof meet. A linear layer gets there at some
batch, or never: its intensity cannot exceed `2 / itemsize / (1/inputs + 1/outputs)`. Find the smallest batch whose
intensity (as in `linear_intensity`) is at least the ridge's.""",
    answer=crossover_batch,
    cases=_crossover_cases,
    reference=_crossover_reference,
    hints=(
        "Write the intensity as a function of the batch b, set it equal to the ridge, and solve for b.",
        "2·b·i·o = ridge·itemsize·(i·o + b·i + b·o). Collect b. If its factor is not positive, no batch is enough.",
        "`gain = 2 * inputs * outputs - ridge * itemsize * (inputs + outputs)`; None if gain <= 0; else `ceil(ridge * itemsize * inputs * outputs / gain)`.",
    ),
    wrong=(
        Wrong(
            "activations forgotten",
            "With weights only, the batch is ridge × itemsize / 2. The activations' bytes grow with the batch and push it up.",
            ("- ridge * itemsize * (inputs + outputs)", ""),
        ),
        Wrong(
            "no batch is too much to ask for",
            "A narrow layer's activations weigh as much as its work: its intensity stays below the ridge for ever.",
            ("if gain <= 0:\n        return None", ""),
        ),
        Wrong(
            "rounded down",
            "One token fewer than the crossover is still memory-bound: round up.",
            ("math.ceil(", "math.floor("),
        ),
        Wrong(
            "the ridge upside down",
            "The ridge is peak / bandwidth: FLOP per byte.",
            ("peak / bandwidth", "bandwidth / peak"),
        ),
        Wrong(
            "one token more than the ridge asks for",
            "A batch that meets the ridge exactly is large enough: at least the ridge's intensity, not more.",
            (
                "math.ceil(ridge * itemsize * inputs * outputs / gain)",
                "int(ridge * itemsize * inputs * outputs / gain) + 1",
            ),
        ),
    ),
)

EXERCISES = (WEIGHT_BYTES, ATTAINABLE, INTENSITY, DECODE, CROSSOVER)
