"""The whole course's ledger: what earlier lessons recorded, and which lesson to run for the rest."""

import re
from pathlib import Path

import pytest
import torch

from optinfer import data
from optinfer.course import claims
from optinfer.course.lesson import Lesson

MASTERS = Path(__file__).resolve().parents[2] / "notebooks" / "source"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTINFER_PROGRESS", str(tmp_path))
    return tmp_path


def lesson(name):
    return Lesson(name, torch.device("cpu"), torch.bfloat16, 0)


def test_the_ledger_reads_what_lessons_recorded():
    assert all("run lesson" in row[2] and not row[4] for row in claims.table().rows)
    lesson("04_kv_cache").claim(10, "2.9 % wasted", True, "one trace")
    lesson("04_kv_cache").claim(10, "3.1 % wasted", "in part")
    rows = {row[0]: row for row in lesson("06_putting_it_together").course_ledger().rows}
    assert list(rows) == [str(number) for number in data.claims()]
    assert rows["10"][2] == "3.1 % wasted" and rows["10"][4] == "in part" and "cores" in rows["10"][3]
    assert rows["11"][2] == "not yet: run lesson 05_speculative_decoding"


def test_a_recording_keeps_its_own_machine_and_a_later_lesson_its_word():
    lesson("02_calibrated_quantization").claim(3, "67 % of the gap", "in part", where="recorded on EPYC, 2026-01-01")
    lesson("04_kv_cache").claim(9, "8 times the batch", "in part")
    early = lesson("00_start_here")
    early.claim(9, "it grows", True)
    rows = {row[0]: row for row in early.course_ledger().rows}
    assert rows["3"][3] == "recorded on EPYC, 2026-01-01"
    assert rows["9"][2] == "8 times the batch"
    assert [row[2] for row in early.ledger().rows] == ["it grows"]


def test_a_damaged_file_counts_as_empty(folder):
    (folder / "claims.json").write_text("[1, 2")
    assert claims.load() == {}
    lesson("x").claim(1, "140 GB", True)
    assert claims.load()[1]["measured"] == "140 GB"


def test_a_folder_that_cannot_be_written_to(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("OPTINFER_PROGRESS", str(folder / "file" / "progress.json"))
    lesson("x").claim(1, "140 GB", True)
    assert claims.load() == {}


def test_every_claim_names_a_lesson_that_measures_it():
    assert set(claims.LESSONS) == set(data.claims())
    for number, name in claims.LESSONS.items():
        text = (MASTERS / f"{name}.md").read_text(encoding="utf-8")
        assert re.search(rf"lesson\.claim\({number}\b", text), (number, name)


def test_claims_of_models_follow_from_their_shapes():
    from optinfer import memory

    rows = {name: said for name, *said in claims.of_models().rows}
    assert set(rows) == set(memory.MODELS)
    verdicts = {name: [text.split(":")[0] for text in said] for name, said in rows.items()}
    no, part, yes = "does not hold", "in part", "holds"
    assert verdicts["Llama-2-70B"] == [yes, yes, yes] and rows["Llama-2-70B"][0] == "holds: 138.0 GB"
    assert verdicts["Llama-3-8B"] == [no, yes, yes]
    assert verdicts["Gemma-3-27B"] == [no, yes, part] and rows["Gemma-3-27B"][2] == "in part: 10 of 62 layers"
    assert verdicts["Qwen3-Next-80B"] == [yes, yes, part]
    assert verdicts["DeepSeek-V3"] == [yes, no, yes]
    for (
        name,
        shape,
    ) in memory.MODELS.items():  # all layers grow: the cache is so many times a token's bytes, and nothing else
        assert (verdicts[name][2] == yes) == (shape.kv_bytes(200_000) == 200_000 * shape.kv_bytes_per_token())


def test_a_model_whose_layers_all_forget(monkeypatch):
    from dataclasses import replace

    from optinfer import memory

    gemma = memory.MODELS["Gemma-3-27B"]
    monkeypatch.setattr(memory, "MODELS", {"all sliding": replace(gemma, cache=gemma.cache[:1])})
    assert claims.of_models().rows[0][3] == "does not hold: 0 of 52 layers"
