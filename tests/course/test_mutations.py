"""Every operator, constant, comparison and statement of every solution is changed once; the checks must notice.

What they do not notice is listed here with the reason why no input could tell it from the solution.
"""

import sys
from pathlib import Path

import pytest

from optinfer.course import exercises

sys.path.insert(0, str(Path(__file__).parent))

from mutations import mutants, survivors

ANY_FINITE = "any finite number does: it stands for the maximum of a row in which every weight is 0"
ANY_DIVISOR = "a divisor of zeros: 0 divided by any number is 0"
ONE_AXIS = "the tensor has no other axis there"
NOT_IN_THE_RESULT = "it fills or bounds what a mask keeps out of the result"
CONSTANT_FACTOR = "one factor for all scales, which the rounding of a whole row does not see"
GIVEN = "this part is given"
ANOTHER_SIZE = "another test input of the same kind, which shows the same bugs"

# id -> {beginning of the change: why it is equal}
EQUAL = {
    "basics.crossover_batch": {"12: 1 -> 0": "the ceiling of a positive number is at least 1"},
    "quantization.absmax": {"9: 0": "0/0 becomes the code 0 where NaN is turned into int8"},
    "quantization.zero_point": {"14: 0": "round(x / scale) is never below -zero"},
    "quantization.groups": {"11: ": ANY_DIVISOR},
    "quantization.nf4_quantize": {"10: 1.0": ANY_DIVISOR},
    "quantization.in_the_model": {"11: 1.0": ANY_DIVISOR},
    "quantization.llm_int8": {"11: 1e-30": ANY_DIVISOR, "13: 1e-30": ANY_DIVISOR},
    "quantization.int4_inputs": dict.fromkeys(
        ("7: 17 -> 18", "7: 5 -> ", "7: 8 -> ", "8: 2 -> ", "8: 18 -> "), ANOTHER_SIZE
    ),
    "calibrated.perplexity": {"8: -1 -> 1": ONE_AXIS},
    "calibrated.awq_search": {
        "9: 0.0": "replaced by the first alpha",
        "11: 0.0001 -> 0.00015": "a channel without activity does not reach the output",
        "12: ": CONSTANT_FACTOR,
        "15: error < best[1] -> error <= best[1]": "which of two equal alphas comes back is not specified",
    },
    "attention.stable_softmax": {
        "7: -1": ONE_AXIS, "10: -1": ONE_AXIS, "8: 0.0": ANY_FINITE, "11: 1.0": ANY_DIVISOR,
    },
    "attention.online_step": {"10: 0.0": ANY_FINITE},
    "attention.merge_partials": {"9: 0.0": ANY_FINITE, "11: 1.0": ANY_DIVISOR},
    "attention.tiled": {"17: ": "the first tile holds column 0, which every row sees"},
    "attention.triton_softmax": {"11: 0 -> -1": ONE_AXIS, "12: 0 -> -1": ONE_AXIS},
    "attention.triton_flash": {
        "12: ": NOT_IN_THE_RESULT, "18: ": NOT_IN_THE_RESULT, "19: 0.0": NOT_IN_THE_RESULT, "21: ": NOT_IN_THE_RESULT,
        "13: 1e+30": "any number far below all scores",
    },
    "attention.flash_inputs": dict.fromkeys(
        ("8: 3 -> ", "8: 2 -> 3", "8: 0 -> ", "9: 20 -> ", "9: 27 -> ", "9: 1 -> 2", "9: 200 -> 199"), ANOTHER_SIZE
    ),
    "kv_cache.bytes_per_token": {"6: hidden_size // heads": "the division leaves no rest"},
    "kv_cache.prefix_hit": {"9: 0": "a prompt without tokens has no hashes"},
    "kv_cache.paged_attention": {"12: -1": ONE_AXIS, "13: -1": ONE_AXIS},
    "kv_cache.in_the_model": {"8: ": GIVEN},
    "speculative.residual": {"9: p.clone() -> p": "p is returned, not changed"},
    "speculative.prompt_lookup": {
        "8: len(tokens) - 1": "a longer suffix than the text has no earlier place",
        "8: 1 -> 0": "the whole text has no earlier place",
        "8: 0 -> -1": "the empty suffix is compared with the whole text",
        "10: 1 -> 2": "a slice that begins at the last token and ends before it is empty",
    },
    "speculative.accept_tree": {"14: 0 -> -1": "the children of a node are different tokens: at most one fits"},
    "speculative.best_length": {
        "8: 0": "replaced by plain decoding's rate", "8: 0.0": "replaced by plain decoding's rate",
        "11: rate > most": "within the tolerance for equal rates", "11: 1e-12": "within the tolerance for equal rates",
    },
    "serving.max_sequences": {"7: max(memory": "rounding down twice is rounding down once"},
    "serving.top_p": {
        "7: 1 -> 0": ONE_AXIS, "9: 1 -> 0": ONE_AXIS, "11: 0 -> -1": ONE_AXIS,
        "10: before < p": "decided by the last bit of a sum of probabilities",
    },
    "serving.continuous_batching": {"7: 0": "every entry is overwritten", "9: 0 -> -1": "nobody arrives before step 0"},
    "serving.goodput": {"9: 0.0 -> -1.0": "a promise of seconds is not negative, so both keep it"},
    "serving.ring_bytes": {"7: 2 * layers * 2 * (processes - 1) * message // ": "the division leaves no rest"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("exercise", exercises.every(), ids=lambda e: e.id)
def test_no_change_of_a_solution_passes_but_equal_ones(exercise):
    tried, accepted = survivors(exercise)
    reasons = EQUAL.get(exercise.id, {})
    assert tried >= 3
    assert not [change for change in accepted if not change.startswith(tuple(reasons))]
    assert not [begin for begin in reasons if not any(change.startswith(begin) for change in accepted)], "out of date"


def test_the_tool_changes_one_thing_at_a_time():
    source = "def f(x, n=1):\n    'doc 7'\n    if x <= n:\n        x = x + 2\n    return max(x, -n)\n"
    changes = dict(mutants(source))
    assert len(changes) == len(set(changes.values())) >= 8
    for what in ("3: x <= n -> x < n", "4: x + 2 -> x - 2", "4: x = x + 2 -> dropped", "5: max -> min", "5: -n -> n"):
        assert what in changes, changes
    assert not any("doc" in what or "n=" in what for what in changes)
