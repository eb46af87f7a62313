"""The benchmark suite itself: timing in turns, comparing two runs, and the suites' rows."""

import dataclasses
import json
import random

import pytest
import torch

from optinfer import bench, cpu, data, results
from optinfer.bench import kv_cache, paged_attention, quantization, quantized_matmul, random_model, rows, timing
from optinfer.bench.compare import compare
from optinfer.bench.report import plot, show
from optinfer.bench.timing import ROTATED_BYTES, copies_past_the_cache, in_turns, one_after_another
from optinfer.cli import main
from optinfer.results import Recorded

CPU = torch.device("cpu")


def recorded(rows, suite="quantized_matmul", device="a machine") -> Recorded:
    return Recorded(suite, device, {"date": "2026-01-01T00:00:00", "versions": {}}, rows)


def row(peer, center, noise=0.01, **fields):
    samples = [center * random.uniform(1 - noise, 1 + noise) for _ in range(21)]
    return {"peer": peer, **fields, "seconds": sorted(samples)[10], "samples": samples, "read_bytes": 7}


def test_peers_take_turns_and_some_more_where_the_machine_is_busy(monkeypatch):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    for seconds, turns in ((lambda: 1.0, 4), (lambda: 1.1 ** len(order), 12)):
        monkeypatch.setattr(timing, "seconds_of", lambda call, _, seconds=seconds: [seconds(), call()][0])
        order.clear()
        samples = in_turns(calls, CPU, repeats=4, warmup=1)
        assert order == list("abc") * (turns + 1)
        assert {name: len(s) for name, s in samples.items()} == dict.fromkeys("abc", turns)


def test_buffers_outgrow_the_cache():
    for nbytes in (1, 1000, ROTATED_BYTES - 1, ROTATED_BYTES, 10 * ROTATED_BYTES):
        assert copies_past_the_cache(nbytes) * nbytes >= ROTATED_BYTES
    assert copies_past_the_cache(ROTATED_BYTES) == 1


def test_one_after_another_runs_all():
    seen = []
    one_after_another([lambda i=i: seen.append(i) for i in range(3)], CPU)()
    assert seen == [0, 1, 2]


def test_compare_tells_change_from_noise():
    before = [row("a", 1.0), row("b", 1.0), row("c", 1.0), row("d", 1.0, noise=0.5), row("e", 1.0)]
    after = [row("a", 1.5), row("b", 0.7), row("c", 1.01), row("d", 1.1, noise=0.5), row("f", 1.0)]
    verdicts = {r["peer"]: r["verdict"] for r in compare(recorded(before), recorded(after))}
    assert verdicts == {"a": "slower", "b": "faster", "c": "same", "d": "same", "e": "gone", "f": "new"}


def test_compare_matches_cases_not_results():
    """In any order of fields: sizes are part of what was measured; bytes, counts and errors are results."""
    before = [row("a", 1.0, tokens=1), row("a", 2.0, tokens=8)]
    after = [{"error": 0.1, **row("a", 2.0, tokens=8), "read_bytes": 9}, row("a", 1.0, tokens=1)]
    found = compare(recorded(before), recorded(after))
    assert [r["tokens"] for r in found] == [1, 8] and {r["verdict"] for r in found} == {"same"}
    with pytest.raises(ValueError, match="cannot compare suite"):
        compare(recorded(before), recorded(after, suite="attention"))


RECORDINGS = sorted(data.path("results").glob("*.json"))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_every_row_of_a_recording_finds_itself(path, capsys):
    one = results.read(path)
    shuffled = random.Random(0).sample(one.rows, len(one.rows))
    found = compare(one, Recorded(one.suite, one.device, one.provenance, shuffled))
    assert len(found) == len(one.rows) and {r["verdict"] for r in found} == {"same"}
    assert all(r["ratio"] == 1 for r in found if "ratio" in r) and any("ratio" in r for r in found)
    assert main(["bench", "compare", str(path), str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(one.rows)} same"


@pytest.mark.parametrize("suite", rows.ROWS)
def test_rows_of_every_suite_can_be_told_apart(suite):
    """Each name by itself; and no measure makes two of one."""
    kind = rows.ROWS[suite]
    for field in dataclasses.fields(kind):
        one, other = kind.read({}), kind.read({field.name: 1})
        named = "name" in field.metadata
        assert (one.names != other.names) == named, field.name
        assert [
            r["verdict"] for r in compare(recorded([one.as_dict()], suite), recorded([other.as_dict()], suite))
        ] == (["gone", "new"] if named else ["gone"] if field.name == "skipped" else ["same"])
    with pytest.raises(ValueError, match=f"{kind.__name__} has no field no_such; it has peer, "):
        kind.read({"no_such": 1})


def test_every_suite_has_its_rows():
    assert set(bench.SUITES + bench.LONG) == set(rows.ROWS) - {"tiles"}
    assert {results.read(path).suite for path in RECORDINGS} <= set(rows.ROWS)


def test_suites_make_their_rows():
    """The small ones; `tests/test_gpu_day.py` runs the parts of the others."""
    made = [*kv_cache.operation_costs([200], 2), *kv_cache.waste(8), *kv_cache.sharing(8)]
    assert {row.kind for row in made} == {"operation", "waste", "sharing"}
    assert len({tuple(row.names.items()) for row in made}) == len(made)
    assert rows.read("kv_cache", [row.as_dict() for row in made]) == made
    timed = quantization.row("nf4", "optinfer", "token, batch 1", [1.0, 3.0, 2.0])
    assert timed.as_dict().items() >= {"seconds": 2.0, "fastest": 1.0, "variant": "nf4"}.items()


def test_memory_skipped_peers_and_repeated_rows_are_compared():
    def memory(nbytes, **more):
        return {"peer": "a", "what": "memory", "q_len": 8, "peak_bytes": nbytes, **more}

    def verdicts(before, after):
        return [r["verdict"] for r in compare(recorded(before, "attention"), recorded(after, "attention"))]

    skipped = {"peer": "a", "seconds": None, "skipped": "too old"}
    assert verdicts([memory(100)], [memory(120)]) == ["larger"]
    assert verdicts([skipped], [skipped]) == ["same"]
    assert verdicts([skipped], [{"peer": "a", "seconds": 1.0}]) == ["new"]
    assert verdicts([{"peer": "a", "seconds": 1.0}], [skipped]) == ["gone"]
    twice = [{"peer": "copy", "seconds": 1.0}, {"peer": "copy", "seconds": 2.0}]
    assert verdicts(twice, twice) == ["same", "same"]
    assert verdicts(twice, [*twice[:1], {"peer": "copy", "seconds": 4.0}]) == ["same", "slower"]


def test_compare_on_the_command_line(tmp_path, capsys):
    paths = [results.save("quantized_matmul", [row("a", center)], tmp_path / str(center)) for center in (1.0, 2.0)]
    assert main(["bench", "compare", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert "slower" in printed and "1 slower" in printed
    assert main(["bench", "compare", str(paths[0])]) == 1
    assert main(["bench", "attention", "extra.json"]) == 1
    assert main(["bench", "no such suite"]) == 1


def test_quantized_matmul_suite(tmp_path):
    typed = bench.run("quantized_matmul", quick=True)
    flat = [r.as_dict() for r in typed]
    peers = {r.peer for r in typed if r.seconds}
    assert {"copy", "torch bf16", "optinfer nf4", "optinfer int4", "optinfer int8"} <= peers
    for r in flat:
        assert r.get("skipped") or r["seconds"] > 0
        if r["peer"].startswith("optinfer") and "tokens" in r:
            assert r["error"] < 0.01
    path = results.save("quantized_matmul", flat, tmp_path)
    assert results.read(path).rows == json.loads(json.dumps(flat))
    plot(typed, tmp_path / "plot.svg")
    assert "torch bf16" in (tmp_path / "plot.svg").read_text() and "torch bf16" in repr(show(flat))


def test_a_wrong_peer_is_not_timed():
    """The check before timing sees one wrong weight in a thousand."""
    weight = torch.randn(32, 64).bfloat16()
    wrong = weight.clone()
    wrong[3, 5] += 10
    prepared = quantized_matmul.Prepared(lambda x: x @ wrong.T, 1, lambda: weight)
    with pytest.raises(AssertionError, match="some peer is off"):
        quantized_matmul.check("some peer", prepared, weight, torch.randn(4, 64).bfloat16())


@pytest.mark.parametrize("variant", random_model.VARIANTS)
def test_random_models_weigh_what_they_should(variant):
    model = random_model.random_model("small", variant, CPU)
    figures = random_model.measure(model, CPU, repeats=2)
    assert figures.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert figures.seconds > 0
    if variant != "bf16":
        full = random_model.random_model("small", "bf16", CPU)
        linear = sum(
            m.weight.nbytes for n, m in full.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
        )
        other = sum(p.nbytes for p in full.parameters()) - linear
        assert figures.weight_bytes < other + linear * 0.3


def test_paged_attention_suite_counts_and_checks(monkeypatch):
    """A context that does not fill its last page; the figures count the keys and values of whole pages, once."""
    rows = paged_attention.measure(2, 50, torch.float32, CPU)
    ours = ["paged: loops"] if cpu.kernels() is not None else []
    assert [r.peer for r in rows] == ["contiguous", "paged: gather, then sdpa", *ours, "copy"]
    for r in rows[:-1]:
        assert r.kv_bytes == 2 * 2 * 64 * 8 * 128 * 4
        assert r.bytes_per_second == pytest.approx(r.kv_bytes / r.seconds)
    assert rows[0].over_contiguous == 1
    monkeypatch.setattr(paged_attention, "paged_attention", lambda q, *_, **__: q)
    with pytest.raises(AssertionError, match="paged: gather, then sdpa differs"):
        paged_attention.measure(1, 50, torch.float32, CPU)


def test_the_calls_of_a_token_are_counted():
    from transformers import LlamaConfig, LlamaForCausalLM

    from optinfer.bench.decode import count_calls

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 20}
    found = {n: count_calls(LlamaForCausalLM(LlamaConfig(num_hidden_layers=n, **sizes)).eval()) for n in (1, 3)}
    for layers, calls in found.items():
        assert sum(count for name, count in calls.items() if "mm" in name) == 7 * layers + 1  # and the head
        assert calls["silu"] == layers and calls["rsqrt"] == 2 * layers + 1
    assert found[3].total() > found[1].total()
