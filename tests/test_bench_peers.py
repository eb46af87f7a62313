"""Peers in environments of their own: asked in lines of JSON, skipped by name where missing, quoted where they break off."""

import os
import sys

import pytest

from optinfer.bench.serving import LlamaCpp, TraceRequest
from optinfer.bench.worker import Worker, environment_of

ECHO = """
import json, sys
print(json.dumps({"version": "1"}), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    if question == "break":
        sys.exit("what went wrong")
    print(json.dumps({"got": question, "arguments": sys.argv[1:]}), flush=True)
open(sys.argv[1], "w").write("ended by itself")
"""


def test_a_worker_answers_and_ends(tmp_path):
    script, end = tmp_path / "echo.py", tmp_path / "end"
    script.write_text(ECHO)
    worker = Worker("echo", sys.executable, str(script), str(end))
    assert worker.version == "1"
    assert worker.ask([{"a": 1}]) == {"got": [{"a": 1}], "arguments": [str(end)]}
    worker.close()
    assert end.read_text() == "ended by itself"
    worker = Worker("echo", sys.executable, str(script), str(end))
    with pytest.raises(RuntimeError, match=r"(?s)echo broke off.*what went wrong"):
        worker.ask("break")
    worker.close()
    with pytest.raises(RuntimeError, match="No such file"):
        Worker("nobody", sys.executable, str(tmp_path / "no such.py"))


def test_who_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.delenv("OPTINFER_SOME_PYTHON", raising=False)
    assert environment_of("somebody", "OPTINFER_SOME_PYTHON") is None
    assert "somebody: skipped, OPTINFER_SOME_PYTHON" in capsys.readouterr().out
    monkeypatch.setenv("OPTINFER_SOME_PYTHON", "x")
    assert environment_of("somebody", "OPTINFER_SOME_PYTHON") == "x"


@pytest.mark.skipif("OPTINFER_LLAMA_CPP_PYTHON" not in os.environ, reason="no environment for llama.cpp named")
@pytest.mark.parametrize("weights", ["BF16", "Q8_0", ""])
def test_llama_cpp_serves_what_a_trace_asks_for(weights):
    peer = LlamaCpp(os.environ["OPTINFER_LLAMA_CPP_PYTHON"], weights, threads=1)
    try:
        for arrival in (0.0, 0.01):
            done = peer.serve([TraceRequest([504, 338], 5), TraceRequest([1, 2, 3], 9, arrival)])
            assert [d.num_tokens for d in done] == [5, 9] and all(d.tpot > 0 for d in done)
            assert all((d.ttft is None) == (arrival == 0) for d in done)
    finally:
        peer.close()
