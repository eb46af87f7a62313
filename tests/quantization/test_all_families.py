"""Every model family of the installed transformers: quantized, saved and reloaded right, or refused."""

from pathlib import Path

import pytest
import transformers

from tests.quantization.families import KINDS, families, page, quantize_family
from tests.serving.families import try_families

PAGE = Path(__file__).parents[2] / "notebooks" / "book" / "quantized_families.md"
QUICK = [  # one of every kind of trouble: Conv1D, float32 layers, renamed paths, joined tensors, heads, experts, state
    ("text", "GPT2Config", "served"),
    ("text", "MixtralConfig", "served"),
    ("text", "MambaConfig", "served"),
    ("text", "Lfm3Config", "served"),
    ("text", "Llama4TextConfig", "served"),
    ("text", "GptOssConfig", "served"),
    ("text to text", "T5Config", "served"),
    ("text to text", "BartConfig", "served"),
    ("images and text", "LlavaConfig", "served"),
    ("images and text", "Gemma3Config", "served"),
    ("classes", "Qwen2Config", "served"),
    ("classes", "BertConfig", "served"),
    ("classes", "NomicBertConfig", "served"),
]


def outcome_of(kind, name, **options):
    known = families(kind)
    if name not in known:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    ((_, outcome),) = try_families({name: known[name]}, work=quantize_family, kind=kind, **options)
    if outcome.kind == "not built":
        pytest.skip(outcome.why)
    return outcome


@pytest.mark.parametrize(("kind", "name", "expected"), QUICK, ids=lambda value: str(value))
def test_one_of_every_kind(kind, name, expected):
    assert outcome_of(kind, name).kind == expected


def test_the_sweep_sees_wrong_results():
    assert outcome_of("text", "LlamaConfig", break_layer=True).kind == "wrong"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_every_family_is_right_or_refused(scheme):
    found = {kind: dict(try_families(families(kind), work=quantize_family, kind=kind, scheme=scheme)) for kind in KINDS}
    bad = {(kind, n): o for kind, one in found.items() for n, o in one.items() if o.kind in ("wrong", "died")}
    assert not bad
    assert sum(o.kind == "served" for one in found.values() for o in one.values()) > 150
    if scheme == "int8" and f"transformers {transformers.__version__}" in PAGE.read_text(encoding="utf-8"):
        assert page(found) == PAGE.read_text(encoding="utf-8")  # the page is of one version
