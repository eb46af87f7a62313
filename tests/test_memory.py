"""Memory arithmetic: against real models, against the published figures, and Python against the widget's JavaScript."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from optinfer import memory
from optinfer.kv_cache import kv_bytes
from optinfer.widgets.memory_calculator import MemoryCalculator
from optinfer.widgets.modules import inlined
from tests.javascript import NODE, needs_node

SCRIPT = Path(memory.__file__).parent / "widgets" / "memory_calculator.js"


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.sampled_from([(4, 1), (4, 2), (6, 3), (5, 5)]), st.integers(9, 70), st.booleans())
def test_parameters_equal_the_real_model(layers: int, heads: tuple[int, int], vocabulary: int, tied: bool) -> None:
    config = LlamaConfig(hidden_size=heads[0] * 8, intermediate_size=37, num_hidden_layers=layers, head_dim=8,
                         num_attention_heads=heads[0], num_key_value_heads=heads[1], vocab_size=vocabulary,
                         tie_word_embeddings=tied)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shape = memory.ModelShape.of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    counted = memory.ModelShape.llama("llama", layers, heads[0] * 8, 37, *heads, 8, vocabulary, tied)
    assert shape == counted
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert shape.linear_parameters == sum(m.weight.numel() for m in linear)


def test_published_figures() -> None:
    """Parameter counts of the model cards; KV bytes per token of kv_heads x head_dim, not of hidden_size."""
    assert memory.MODELS["SmolLM2-135M"].parameters == 134_515_008
    assert memory.MODELS["Mistral-7B"].parameters == 7_241_732_096
    assert memory.MODELS["Llama-3-8B"].parameters == 8_030_261_248
    assert memory.MODELS["Llama-3-70B"].parameters == 70_553_706_496
    assert memory.MODELS["Llama-3-70B"].kv_bytes_per_token() == 320 * 1024
    assert memory.MODELS["Llama-2-13B"].kv_bytes_per_token() == 800 * 1024


def published(name: str) -> Any:
    """The configuration that the model was published with; what is not given here is the class's default."""
    wanted = {
        "Gemma-3-27B": ("Gemma3TextConfig", {"hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
                        "num_hidden_layers": 62, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024}),
        "GPT-OSS-20B": ("GptOssConfig", {"num_hidden_layers": 24, "num_local_experts": 32}),
        "GPT-OSS-120B": ("GptOssConfig", {}),
        "Llama-4-Scout": ("Llama4TextConfig", {}),
        "Kimi-Linear-48B": ("KimiLinearConfig", {"layer_types": [
            "full_attention" if i % 4 == 0 or i == 27 else "linear_attention" for i in range(1, 28)]}),
        "Qwen3-Next-80B": ("Qwen3NextConfig", {}),
        "DeepSeek-V3": ("DeepseekV3Config", {}),
    }  # fmt: skip
    kind, changed = wanted[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    return getattr(transformers, kind)(**changed)


TODAY = [
    "Gemma-3-27B",
    "GPT-OSS-20B",
    "GPT-OSS-120B",
    "Llama-4-Scout",
    "Kimi-Linear-48B",
    "Qwen3-Next-80B",
    "DeepSeek-V3",
]


@pytest.mark.parametrize("name", TODAY)
def test_presets_are_counted_from_their_configurations(name: str) -> None:
    assert memory.ModelShape.of(published(name), name) == memory.MODELS[name]


def test_published_figures_of_today() -> None:
    """Model cards and reports, in billions: GPT-OSS (2508.10925, table 1), DeepSeek-V3 (2412.19437), Kimi Linear (2510.26692),
    Gemma 3 without its vision tower (2503.19786, table 1: the decoder's layers)."""
    billions = {name: (shape.parameters / 1e9, shape.active_parameters / 1e9) for name, shape in memory.MODELS.items()}
    assert billions["GPT-OSS-120B"] == pytest.approx((116.83, 5.13), abs=0.005)
    assert billions["GPT-OSS-20B"] == pytest.approx((20.91, 3.61), abs=0.005)
    assert billions["DeepSeek-V3"][0] == pytest.approx(671, abs=0.5)
    embedding = 129_280 * 7168 / 1e9
    assert billions["DeepSeek-V3"][1] + embedding == pytest.approx(37, abs=0.6)  # the report counts the embedding
    assert billions["Kimi-Linear-48B"] == pytest.approx((49, 3.1), abs=0.15)
    assert memory.MODELS["Gemma-3-27B"].linear_parameters / 1e6 == pytest.approx(25_600, abs=5)
    assert memory.MODELS["DeepSeek-V3"].kv_bytes_per_token() == 70_272
    assert memory.MODELS["Qwen3-Next-80B"].kv_bytes_per_token() == 24_576


@pytest.mark.parametrize("name", TODAY)
def test_the_plan_and_the_cache_chapter_count_alike(name: str) -> None:
    for tokens in (1, 100, 5000, 100_000):
        assert memory.MODELS[name].kv_bytes(tokens) == sum(kv_bytes(published(name), tokens).values())


def test_cache_of_a_real_model() -> None:
    """The cache a forward pass leaves behind is as large as the plan says."""
    config = LlamaConfig(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, vocab_size=50)  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float16)
    with torch.no_grad():
        cache = model(torch.randint(0, 50, (5, 7))).past_key_values
    actual = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert memory.plan(memory.ModelShape.of(config), context=7, requests=5).kv_cache == actual


def test_fits() -> None:
    plan = memory.plan(memory.MODELS["Llama-3-70B"])
    assert not plan.fits("A100 or H100") and plan.fits("A100 or H100", count=2)


def test_errors() -> None:
    with pytest.raises(ValueError, match="context must be positive, not 0"):
        memory.plan(memory.MODELS["Mistral-7B"], context=0)
    with pytest.raises(ValueError, match="does not describe an attention model"):
        memory.ModelShape.of(object())
    with pytest.raises(ValueError, match="model must be one of"):
        MemoryCalculator(model="GPT-5")


@needs_node
def test_widget_counts_as_python_does(tmp_path: Path) -> None:
    cases = [
        {"weight_bits": w, "kv_bits": k, "context": c, "requests": r}
        for w, k, c, r in [(16, 16, 4096, 1), (4.5, 8, 128, 256), (3.25, 4, 131072, 7), (8, 16, 1, 1)]
    ]
    program = tmp_path / "run.mjs"
    (tmp_path / "calculator.mjs").write_text(inlined(SCRIPT), encoding="utf-8")
    program.write_text(
        'import widget from "./calculator.mjs";\n'
        f"const [models, cases] = [{json.dumps(memory.presets())}, {json.dumps(cases)}];\n"
        "console.log(JSON.stringify(models.map((m) => cases.map((c) => widget.plan(m, c)))));\n"
    )
    done = subprocess.run([NODE, str(program)], capture_output=True, text=True, timeout=600, check=True)
    for shape, answers in zip(memory.MODELS.values(), json.loads(done.stdout), strict=True):
        for case, answer in zip(cases, answers, strict=True):
            expected = memory.plan(shape, **case)
            assert answer == pytest.approx(
                {"weights": expected.weights, "kv_cache": expected.kv_cache, "activations": expected.activations}
            )


def test_widget_summary_names_its_numbers() -> None:
    widget = MemoryCalculator(model="Mistral-7B", requests=2)
    assert f"{widget.plan().total / 1e9:.1f} GB" in widget.summary()
    state = widget.static_state()
    assert state["model"] == "Mistral-7B" and len(state["models"]) == len(memory.MODELS)
    assert "</script>" not in widget.static_html().split("<script", 1)[1].rsplit("</script>", 1)[0]
