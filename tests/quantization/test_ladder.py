"""The recorded ladder: nothing measured is lost or measured twice, and the peer is judged by what it hands over."""

import json
import stat
import sys

import pytest

from optinfer import load_model, results
from optinfer.bench import calibrated_quantization as bench
from optinfer.bench.rows import CalibratedQuantizationRow

FAKE = """#!{python}
import json, shutil, sys
order = json.load(sys.stdin)
assert len(order["sequences"]) == 32 and {{len(s) for s in order["sequences"]}} == {{256}}
if order["method"] == "awq":
    sys.exit("no such method")
shutil.copy(order["model"] + "/model.safetensors", order["out"])
print("noise before the answer")
print(json.dumps({{"version": "0", "seconds": 1.5, "cpu_seconds": 2.5}}))
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A stand-in for llm-compressor's python: it hands the model back unchanged, and fails at AWQ."""
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("OPTINFER_LLMCOMPRESSOR_PYTHON", str(path))
    monkeypatch.setattr(bench, "EVALUATION_TOKENS", 300)


def test_a_stopped_ladder_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv("OPTINFER_LLMCOMPRESSOR_PYTHON", raising=False)
    measured = []

    def stand_in(function, method, bits):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((method, bits))
        return CalibratedQuantizationRow(perplexity=1.0)

    monkeypatch.setattr(bench, "isolated", stand_in)
    arguments = ["--out", str(tmp_path), "--bits", "3", "--methods", "rtn", "gptq", "w8a8"]
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments)
    second = CalibratedQuantizationRow(perplexity=2.0)
    monkeypatch.setattr(bench, "isolated", lambda f, *case: measured.append(case) or second)
    bench.main(arguments)
    assert measured == [("none", 16), ("rtn", 3), ("gptq", 3), ("w8a8", 8)]
    (file,) = tmp_path.iterdir()
    assert [(r["method"], r["bits"], r["perplexity"]) for r in results.read(file).rows] == [
        ("none", 16, 1.0), ("rtn", 3, 1.0), ("gptq", 3, 2.0), ("w8a8", 8, 2.0),
    ]  # fmt: skip


def test_the_peer_is_judged_by_the_weights_it_hands_over(peer):
    model, tokenizer = load_model()
    row = bench.measure_llm_compressor("gptq", 3)
    assert row.seconds == 1.5 and row.cpu_seconds == 2.5
    assert row.perplexity == pytest.approx(bench.quality(model, tokenizer)["perplexity"])


def test_a_peer_that_breaks_off_says_why(peer):
    with pytest.raises(RuntimeError, match="no such method"):
        bench.measure_llm_compressor("awq", 3)


def test_rows_hold_what_the_lesson_shows(monkeypatch):
    monkeypatch.setattr(bench, "EVALUATION_TOKENS", 300)
    row = bench.measure("rtn", 3)
    assert CalibratedQuantizationRow.read(json.loads(json.dumps(row.as_dict()))) == row
    assert (
        row.peak_bytes
        >= row.peak_bytes_after_load
        > sum(p.numel() * p.element_size() for p in {p.data_ptr(): p for p in load_model()[0].parameters()}.values())
    )
    assert row.tokens == 298 and len(row.windows) == 2 and row.cpu_seconds > 0
