"""Wrong answers that readers gave, not edits of our solutions: each is rejected, and no message leads astray."""

import math
import subprocess
import sys

import pytest
import torch

from optinfer.course import checks, exercises


def straight_through_cut_early(x, scale):
    inside = (x / scale).abs() <= 7
    rounded = (x / scale).round().clamp(-7, 7) * scale
    passed = torch.where(inside, x, x.detach())
    return passed + (rounded - passed).detach()


def merge_with_one_maximum(outs, lses):
    weights = torch.exp(lses - lses[lses.isfinite()].max())
    total = weights.sum(0)
    return (weights[..., None] * outs).sum(0) / torch.where(total == 0, 1.0, total)[:, None]


def copy_the_last_block(tables, ref_count, free, seq, position, block_size):
    block = tables[seq][-1]
    if ref_count[block] == 1:
        return None
    target = free.pop(0)
    ref_count[block] -= 1
    ref_count[target] = 1
    tables[seq][-1] = target
    return block, target


def copy_the_first_shared_block(tables, ref_count, free, seq, position, block_size):
    for i, block in enumerate(tables[seq]):
        if ref_count[block] > 1:
            target = tables[seq][i] = free.pop(0)
            ref_count[block] -= 1
            ref_count[target] = 1
            return block, target
    return None


def difference_without_sign(p, q):
    left = abs(p - q)
    return left / left.sum() if left.sum() > 0 else p.clone()


def acceptance_as_difference(p, q):
    return (p - q).abs()


def nucleus_before_temperature(logits, temperature, p):
    probabilities = logits.softmax(-1)
    ordered, index = probabilities.sort(descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < p, logits[index], -math.inf)
    return torch.zeros_like(probabilities).scatter(0, index, (kept / temperature).softmax(-1))


ANSWERS = [
    ("calibrated.straight_through", straight_through_cut_early, "the end cut before rounding", ()),
    ("attention.merge_partials", merge_with_one_maximum, None, ("plain mean",)),
    ("kv_cache.copy_on_write", copy_the_last_block, "the last block instead of the written one", ()),
    ("kv_cache.copy_on_write", copy_the_first_shared_block, None, ("usually means",)),
    ("speculative.residual", difference_without_sign, None, ("came back unchanged", "usually means: not normalized")),
    ("speculative.acceptance", acceptance_as_difference, None, ("came back unchanged", "usually means")),
    ("serving.top_p", nucleus_before_temperature, "the nucleus taken before the temperature", ("multiplied by",)),
]


@pytest.mark.parametrize(("id", "answer", "misconception", "never"), ANSWERS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_readers_wrong_answer(id, answer, misconception, never):
    result = checks.evaluate(exercises.get(id), answer)
    assert not result.passed
    if misconception:
        assert result.misconception == misconception, result.message
    for words in never:
        assert words not in result.message, result.message


def test_a_plain_script_shows_what_was_found(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "from optinfer import check\n"
        "def kv_bytes_per_token(layers, hidden_size, heads, kv_heads, itemsize):\n"
        "    return layers * kv_heads * hidden_size // heads * itemsize\n"
        "check('kv_cache.bytes_per_token', kv_bytes_per_token)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert "This usually means: keys without values" in done.stdout, done.stderr
