"""The widget of traffic: its numbers are the rehearsals', and its picture adds up in node."""

import json
import subprocess
from pathlib import Path

import pytest

from optinfer.serving import Arrival, Promise, Rehearsal, Service, StepCost, arrival_times, serve
from optinfer.widgets import traffic
from optinfer.widgets.modules import inlined
from optinfer.widgets.traffic import TrafficExplorer
from tests.javascript import NODE, needs_node

RATES, BUDGETS, PROMISE = [1.0, 8.0, 64.0], [16, 128], Promise(ttft=0.3, tpot=0.05)


def trace(rate: float) -> list[Arrival]:
    return [Arrival(when, tuple(range(i, i + 40)), 8) for i, when in enumerate(arrival_times(rate, 30, seed=3))]


def rehearsal(budget: int) -> Rehearsal:
    return Rehearsal(StepCost(0.01, 0.0005), num_blocks=256, max_batched_tokens=budget, max_num_seqs=8)


@pytest.fixture(scope="module")
def widget() -> TrafficExplorer:
    return TrafficExplorer.of(trace, rehearsal, RATES, BUDGETS, PROMISE)


def test_each_pair_is_its_own_rehearsal(widget: TrafficExplorer) -> None:
    for budget, row in zip(BUDGETS, widget.runs, strict=True):
        for rate, run in zip(RATES, row, strict=True):
            stage = rehearsal(budget)
            service = Service.of(serve(stage, trace(rate)), PROMISE)
            assert run["ttft"] == [service.ttft[p] for p in (50, 90, 99)]
            assert run["tpot"] == [service.tpot[p] for p in (50, 90, 99)]
            assert (run["kept"], run["goodput"]) == (service.kept, service.goodput)
            for kind in ("waiting", "running"):
                assert len(run[kind]) == traffic.COLUMNS
                assert max(run[kind]) == max(getattr(record, kind) for record in stage.log)
    kept = [run["kept"] for run in widget.runs[0]]
    assert kept == sorted(kept, reverse=True) and kept[0] == 1 > kept[-1]  # the promise breaks as the rate grows
    assert max(widget.runs[0][0]["waiting"]) < max(widget.runs[0][-1]["waiting"])


def test_where_no_step_ran_nobody_waits_or_runs() -> None:
    run = traffic._run([Arrival(0.0, (1, 2), 2), Arrival(10.0, (3, 4), 2)], rehearsal(16), PROMISE)
    assert run["running"][0] == run["running"][-1] == 1 and set(run["running"][5:-5]) == {0}


def test_what_was_not_measured_is_none() -> None:
    run = traffic._run([Arrival(0.0, (1, 2), 1)], rehearsal(16), PROMISE)
    assert run["tpot"] == [None] * 3 and None not in run["ttft"]


@pytest.mark.parametrize("rates, budgets", [([], [16]), ([1.0], []), ([2.0, 1.0], [16]), ([1.0], [16, 16])])
def test_choices_ascend(rates: list[float], budgets: list[int]) -> None:
    with pytest.raises(ValueError, match="must be ascending and not empty"):
        TrafficExplorer.of(trace, rehearsal, rates, budgets, PROMISE)


def test_page_and_summary(widget: TrafficExplorer) -> None:
    state = widget.static_state()
    assert state["rates"] == RATES and json.loads(json.dumps(state)) == state
    assert f"{widget.runs[1][2]['kept']:.0%} at 64/s" in widget.summary()
    assert "</script>" not in widget.static_html().split("<script", 1)[1].rsplit("</script>", 1)[0]


@needs_node
def test_picture_adds_up(widget: TrafficExplorer, tmp_path: Path) -> None:
    (tmp_path / "traffic.mjs").write_text(inlined(Path(traffic.__file__).with_suffix(".js")), encoding="utf-8")
    run = widget.runs[0][2]
    program = tmp_path / "program.mjs"
    program.write_text(
        'import widget from "./traffic.mjs";\n'
        f"console.log(JSON.stringify([widget.columns({json.dumps(run)}, 640, 120), [0.0042, 0.25, 2].map(widget.seconds)]));\n"
    )
    done = subprocess.run([NODE, str(program)], capture_output=True, text=True, timeout=600, check=True)
    drawn, said = json.loads(done.stdout)
    assert said == ["4.20 ms", "250 ms", "2.0 s"]
    for kind in ("waiting", "running"):
        assert sum(r["count"] for r in drawn["rectangles"] if r["kind"] == kind) == sum(run[kind])
    assert drawn["highest"] == max(a + b for a, b in zip(run["waiting"], run["running"]))
    assert min(r["y"] for r in drawn["rectangles"]) == pytest.approx(0)  # the tallest column fills the picture
    assert all(r["height"] == pytest.approx(120 * r["count"] / drawn["highest"]) for r in drawn["rectangles"])
