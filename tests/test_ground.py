"""Data, results, machine, lesson, command line: the ground under every chapter."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from optinfer import bench, card, cli, data, doctor, hardware, plots, results
from optinfer.course import lab
from optinfer.course.lesson import setup
from optinfer.errors import OptinferError
from optinfer.execute import NotebookError, execute

ROOT = Path(__file__).resolve().parents[1]


# ---- data ----


def test_data_errors_name_what_is_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file 'text/novel.txt'; text/ holds: calibration.txt"):
        data.path("text/novel.txt")
    with pytest.raises(ValueError, match="split must be"):
        data.text("train")
    with pytest.raises(ValueError, match="kind must be one of chat, code, rewrite, summarize, not 'poem'"):
        data.prompts("poem")


def test_prompts_are_distinct_and_filled() -> None:
    for kind in ("chat", "summarize", "rewrite", "code"):
        prompts = data.prompts(kind)
        assert len(prompts) >= 6 and len(set(prompts)) == len(prompts) and all(len(p) > 15 for p in prompts)


def test_fourteen_claims() -> None:
    assert list(data.claims()) == list(range(1, 15))


# ---- results ----


def test_results_round_trip(tmp_path: Path) -> None:
    rows = [{"peer": "ours", "seconds": 0.5, "samples": [0.4, 0.5, 0.6]}, {"peer": "theirs", "seconds": 1.0}]
    path = results.save("attention", rows, tmp_path / "new")
    recorded = results.read(path)
    assert recorded.rows == rows and recorded.suite == "attention"
    assert recorded.where(peer="theirs") == rows[1:]
    assert recorded.provenance["versions"]["torch"] == torch.__version__
    assert recorded.provenance["date"][:10] in recorded.caption()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = results.save("attention", [{"seconds": 1.0}], tmp_path)
    before = path.read_text()
    for bad in ([], [{"seconds": math.nan}], [{"tensor": torch.ones(1)}]):
        with pytest.raises(ValueError, match="attention"):
            results.save("attention", bad, tmp_path)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_reading_something_else(tmp_path: Path) -> None:
    other = tmp_path / "x.json"
    for content in ("{", "[]", '{"suite": "a"}'):
        other.write_text(content)
        with pytest.raises(ValueError, match="not a file of recorded results"):
            results.read(other)


def test_the_recording_of_the_most_alike_chip_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors with one name: files of their own, and the reader gets the one like theirs, not the newest."""
    from optinfer import data, processor

    monkeypatch.setattr(data, "root", lambda: tmp_path)
    (tmp_path / "data" / "results").mkdir(parents=True)
    old = processor.Processor("AMD EPYC", "AuthenticAMD", "25", "1", ("avx2", "fma"))
    new = processor.Processor("AMD EPYC", "AuthenticAMD", "25", "17", ("avx2", "fma", "avx512f"))
    sibling = processor.Processor("AMD EPYC", "AuthenticAMD", "25", "18", ("avx2", "fma", "avx512f"))
    for day, chip in enumerate((old, new), 1):
        monkeypatch.setattr(results, "this_processor", lambda chip=chip: chip)
        facts = {
            "date": f"2026-01-0{day}",
            "device": chip.name,
            "processor": asdict(chip),
            "capability": None,
            "versions": {},
        }
        monkeypatch.setattr(results, "provenance", lambda facts=facts: facts)
        results.save("speed", [{"seconds": float(day)}], tmp_path / "data" / "results")
    assert len(list((tmp_path / "data" / "results").iterdir())) == 2
    for reader, seconds, alike in ((old, 1.0, True), (new, 2.0, True), (sibling, 2.0, True)):
        monkeypatch.setattr(results, "this_processor", lambda reader=reader: reader)
        recorded = results.load("speed")
        assert recorded is not None and recorded.rows == [{"seconds": seconds}]
        assert ("not a chip like" not in recorded.caption()) == alike
    namesake = processor.Processor("AMD EPYC", "AuthenticAMD", "1", "1", ())
    monkeypatch.setattr(results, "this_processor", lambda: namesake)
    recorded = results.load("speed")
    assert recorded is not None and "a chip of the same name as the one here, perhaps" in recorded.caption()
    stranger = processor.Processor("Another", "GenuineIntel", "6", "1", ())
    monkeypatch.setattr(results, "this_processor", lambda: stranger)
    recorded = results.load("speed")
    assert recorded is not None and "AMD EPYC (family 25, model 17)" in recorded.caption()
    assert "not a chip like the one here" in recorded.caption()


def test_nobody_measured_it() -> None:
    assert results.load("no-such-suite") is None


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "results").glob("*.json")), ids=lambda p: p.name)
def test_committed_results_have_provenance(path: Path) -> None:
    recorded = results.read(path)
    assert path.name == results.file_name(recorded.suite, recorded.provenance)
    assert {"date", "device", "versions", "python"} <= recorded.provenance.keys() and recorded.rows


# ---- machine ----


def test_roofline_arithmetic() -> None:
    machine = hardware.Machine("m", "cpu", None, 2, 10**9, bandwidth=10e9, matmul_flops=100e9, dtype="float32")
    assert machine.ridge == 10
    assert machine.attainable_flops(1) == 10e9 and machine.attainable_flops(1000) == 100e9
    assert machine.least_seconds(flops=200e9, bytes_moved=10e9) == 2
    assert machine.least_seconds(flops=1e9, bytes_moved=30e9) == 3


def test_this_machine_is_plausible() -> None:
    machine = hardware.this_machine()
    assert machine is hardware.this_machine()
    assert 1e8 < machine.bandwidth < 1e14 and 1e8 < machine.matmul_flops < 1e16 and machine.cores >= 1


def test_a_t4_computes_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert hardware.default_dtype(torch.device("cuda")) == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert hardware.default_dtype(torch.device("cuda")) == torch.bfloat16


# ---- lesson ----


def test_setup_is_idempotent_and_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    first = setup("00_start_here")
    a = torch.rand(3)
    second = setup("00_start_here")
    assert torch.equal(a, torch.rand(3)) and first.device == second.device
    assert f"torch {torch.__version__.split('+')[0]}" in capsys.readouterr().out


def test_predictions() -> None:
    lesson = setup("00_start_here")
    lesson.predict("token time", 10, "ms")
    assert "10 times your guess" in repr(lesson.compare("token time", 100))
    assert "within a quarter" in repr(lesson.compare(10, 11, "ms")).lower()
    assert lesson.compare(10, 11, "ms").tone == "good"
    with pytest.raises(KeyError, match="no prediction named 'tokens'; predicted so far: token time"):
        lesson.compare("tokens", 1.0)


def test_ledger() -> None:
    lesson = setup("00_start_here")
    lesson.claim(9, "180 GB", 180 > 160)
    lesson.claim(1, "140 GB", verdict=torch.tensor(1.0).item() == 2.0, note="on paper")
    table = repr(lesson.ledger())
    assert table.index("140 GB") < table.index("180 GB")
    assert "holds" in table and "does not hold: on paper" in table
    with pytest.raises(ValueError, match="number must be a claim from 1 to 14, not 15"):
        lesson.claim(15, "", True)
    with pytest.raises(ValueError, match="verdict must be one of"):
        lesson.claim(1, "", "maybe")  # type: ignore[arg-type]


def test_cards_escape_html() -> None:
    shown = card.Card("a < b", ("`x<y>`",), "good")
    assert "a &lt; b" in shown._repr_html_() and "<code>x&lt;y&gt;</code>" in shown._repr_html_()
    table = card.Table(("a",), (("<b>",),))
    assert "&lt;b&gt;" in table._repr_html_()
    with pytest.raises(ValueError, match="tone"):
        card.Card("x", tone="loud")


def test_figures_close_and_label() -> None:
    import matplotlib.pyplot as plt

    machine = hardware.Machine("m", "cpu", None, 2, 10**9, bandwidth=10e9, matmul_flops=100e9, dtype="float32")
    fig = plots.roofline(machine, [{"label": "p", "flops": 1e9, "bytes": 1e9, "seconds": 1.0}])
    assert "GFLOP/s over arithmetic intensity" in plots.describe(fig) and "the roof of m" in plots.describe(fig)
    assert "FLOP per byte" in fig.axes[0].get_xlabel() and fig.axes[0].get_ylabel() == "GFLOP/s"
    plt.close(fig)


# ---- command line ----


def test_doctor_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "The course can run." in out and "GB/s" in out and "attention, auto" in out


def test_doctor_fails_without_what_the_course_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata as metadata

    real = metadata.version

    def version(name: str) -> str:
        if name == "anywidget":
            raise metadata.PackageNotFoundError(name)
        return "5.14.1" if name == "transformers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    findings = {f.name: f for f in doctor.versions()}
    assert findings["anywidget"].fatal and findings["anywidget"].fix.startswith("pip install anywidget")
    assert findings["transformers"].fatal and ">=5.15" in findings["transformers"].fix
    assert not findings["torch"].fatal
    assert cli.main(["doctor"]) == 1


def test_unknown_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="suite must be one of quantization.*not 'speed'"):
        bench.run("speed")
    assert cli.main(["bench", "speed"]) == 1
    assert "not 'speed'" in capsys.readouterr().err


def test_every_suite_can_be_imported() -> None:
    import importlib

    for suite in bench.SUITES + bench.LONG:
        assert callable(importlib.import_module(f"optinfer.bench.{suite}").run)


def test_lab_copies_installed_notebooks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "share"
    (installed / "notebooks" / "exercises").mkdir(parents=True)
    (installed / "notebooks" / lab.FIRST).write_text("original")
    (installed / "notebooks" / "exercises" / "01.ipynb").write_text("original")
    monkeypatch.setattr(data, "root", lambda: installed)
    monkeypatch.chdir(tmp_path)
    mine = lab.notebooks_folder()
    (mine / lab.FIRST).write_text("my work")
    assert lab.notebooks_folder() == mine
    assert (mine / lab.FIRST).read_text() == "my work" and (mine / "exercises" / "01.ipynb").exists()
    with pytest.raises(OptinferError, match="holds no 00_start_here.ipynb"):
        lab.notebooks_folder(tmp_path)


# ---- notebooks ----


def test_committed_notebooks_equal_their_masters() -> None:
    script = ROOT / "scripts" / "build_notebooks.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_committed_notebooks_hold_no_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_a_failing_cell_fails_the_notebook(tmp_path: Path) -> None:
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    path = tmp_path / "broken.ipynb"
    nbformat.write(notebook, path)
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        execute(path)


def test_directives_become_portable_markdown() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from build_notebooks import portable

    text = ":::{dropdown} First?\nYes.\n:::\n\n:::{dropdown} Second?\nNo.\n:::\n\n:::{note}\nA `b`.\n:::\n"
    assert portable(text) == (
        "<details><summary>First?</summary>\n\nYes.\n\n</details>\n\n"
        "<details><summary>Second?</summary>\n\nNo.\n\n</details>\n\n> **Note**\n>\n> A `b`.\n"
    )


def test_the_table_of_machines_takes_a_new_recording_without_an_edit() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from build_notebooks import machines

    from optinfer import results

    def recorded(suite: str, capability: list[int] | None, date: str) -> results.Recorded:
        facts = {"date": date, "versions": {"torch": "2.13.0"}, "capability": capability}
        return results.Recorded(suite, "Some GPU" if capability else "Some CPU", facts, [{}])

    cpu = recorded("paged_attention", None, "2026-11-24T12:00")
    assert machines([cpu]).splitlines()[2:] == [
        "| Some CPU | paged attention | torch 2.13.0 | 2026-11-24 |",
        "",
        "Nothing has been recorded on a GPU yet, so no figure of one is shown.",
    ]
    days = [recorded(suite, [9, 0], date) for suite, date in (("attention", "2026-12-02"), ("serving", "2026-12-01"))]
    assert machines([cpu, *days]).splitlines()[3:] == [
        "| Some GPU | attention, serving | torch 2.13.0 | 2026-12-01 to 2026-12-02 |"
    ]
