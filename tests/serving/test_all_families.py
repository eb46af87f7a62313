"""Every causal language model family of the installed transformers: the tokens of `generate`, or a refusal, and nothing else."""

import re
from pathlib import Path

import pytest
import transformers

from optinfer.attention.needs import UnsupportedModel
from optinfer.serving import Engine
from tests.serving.families import Outcome, causal_families, table, tiny_model, try_families

PAGE = Path(__file__).parents[2] / "notebooks" / "book" / "families.md"
QUICK = {  # one of every kind
    "LlamaConfig": "served", "Qwen3Config": "served", "GPT2Config": "served", "Gemma2Config": "served",
    "GptOssConfig": "served", "DeepseekV3Config": "served", "OlmoeConfig": "served", "PhimoeConfig": "served",
    "Gemma3TextConfig": "served", "DeepseekV32Config": "refused",
    "Llama4TextConfig": "refused", "MambaConfig": "refused", "RecurrentGemmaConfig": "refused", "BertConfig": "refused",
    "Lfm2Config": "refused", "GraniteMoeHybridConfig": "refused",
}  # fmt: skip


def of(name):
    known = causal_families()
    if name not in known:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return {name: known[name]}


@pytest.mark.parametrize("name", QUICK)
def test_one_of_every_kind(name):
    ((_, outcome),) = try_families(of(name))
    if outcome.kind == "not built":
        pytest.skip(outcome.why)
    assert outcome.kind == QUICK[name], outcome


@pytest.mark.slow
def test_every_family_is_served_right_or_refused():
    found = dict(try_families(causal_families()))
    assert not {name: o for name, o in found.items() if o.kind in ("wrong", "died")}
    assert sum(o.kind == "served" for o in found.values()) > 50
    if f"transformers {transformers.__version__}" in PAGE.read_text(encoding="utf-8"):  # the page is of one version
        assert table(found) == PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.slow), "sdpa", "reference"])
def test_sinks_windows_and_latents_in_every_backend(backend):
    for name in ("GptOssConfig", "Gemma2Config", "DeepseekV3Config"):
        ((_, outcome),) = try_families(of(name), attention_backend=backend)
        assert outcome.kind == "served", (name, outcome)


def test_values_narrower_than_keys_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match="multi-head latent attention"):
        Engine(tiny_model(of("DeepseekV3Config")["DeepseekV3Config"], v_head_dim=24), num_blocks=8)


def test_the_sweep_sees_wrong_texts_and_dead_processes():
    """A backend that answers nonsense, and one that takes its process with it."""
    family = of("LlamaConfig")
    ((_, outcome),) = try_families(family, work=_crash)
    assert outcome.kind == "died" and "exit code" in outcome.why
    ((_, outcome),) = try_families(family, work=_raise)
    assert outcome == Outcome("died", "RuntimeError: nonsense")
    ((_, outcome),) = try_families(family, break_pages=True)
    assert outcome.kind == "wrong"


def _crash(config_class):
    import os

    os._exit(3)


def _raise(config_class):
    raise RuntimeError("nonsense")


def test_the_page_counts_its_own_rows():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (served|refused|not built)", text, re.M)
    for kind in ("served", "refused"):
        assert f"{sum(k == kind for _, k in rows)} {kind}" in text
