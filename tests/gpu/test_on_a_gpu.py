"""What only a real GPU can judge, speed aside: `pytest -m gpu`. A pretended one does not count."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optinfer.bench.gpu_day import checks

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or getattr(torch, "_pretend_gpu", None) is not None, reason="no GPU here"
    ),
]


@pytest.mark.parametrize("check", ["attention", "quantized", "paged", "ragged", "engine"])
def test_what_the_day_checks(check):
    rows = list(getattr(checks, check)(tiny=False))
    assert rows and not [row for row in rows if not row["ok"]]


@pytest.mark.parametrize("scheme", ["nf4", "int8", "int4"])
def test_memory_is_what_the_formula_says(scheme):
    from transformers import LlamaConfig, LlamaForCausalLM

    from optinfer.quantization import memory_footprint, quantize

    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).half()
    expected = memory_footprint(model, scheme)
    quantize(model, scheme, progress=False)
    torch.cuda.empty_cache()
    buffers = sum(b.nbytes for b in model.buffers())
    allocated = torch.cuda.memory_allocated()
    assert expected <= allocated <= 1.02 * expected + buffers + 2**22  # the allocator rounds up


def test_two_streams_of_one_engine_each():
    """Engines on streams of their own give their own texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from optinfer.serving import Engine, SamplingParams

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    )
    model = LlamaForCausalLM(config).cuda().eval()
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7], [9] * 20]
    alone = [c.token_ids for c in Engine(model, num_blocks=32).generate(prompts, params)]
    engines, streams = [Engine(model, num_blocks=32) for _ in range(2)], [torch.cuda.Stream() for _ in range(2)]
    for engine in engines:
        for prompt in prompts:
            engine.add_request(prompt, params)
    done = [{}, {}]
    while any(engine.has_work for engine in engines):
        for engine, stream, found in zip(engines, streams, done):
            with torch.cuda.stream(stream):
                found.update({c.request_id: c.token_ids for c in engine.step()})
    assert all(sorted(found.values()) == sorted(alone) for found in done)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool, tmp_path):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    command = ["compute-sanitizer", "--error-exitcode", "9", "--tool", tool, sys.executable, "-m"]
    done = subprocess.run(
        [*command, "optinfer.bench.gpu_day.work", "check-attention", tmp_path / "rows", "--tiny"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "notebooks").rglob("0*.ipynb")))
def test_notebooks_execute(path, tmp_path):
    pytest.importorskip("nbclient")
    done = subprocess.run(
        [sys.executable, "-m", "optinfer.execute", str(ROOT / path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 or "exercises" in path, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
