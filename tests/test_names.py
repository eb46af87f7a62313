"""Where a type lists the names that a table holds, the two agree."""

from collections.abc import Iterable
from typing import Any, get_args

import pytest

from optinfer import data, memory
from optinfer.quantization import number_formats, schemes
from optinfer.quantization.formats import small_floats
from optinfer.serving import router
from optinfer.speculative import by_name

TABLES: dict[str, tuple[Any, Iterable[str]]] = {
    "schemes": (schemes.SchemeName, schemes.SCHEMES),
    "codebooks": (number_formats.CodebookName, number_formats.CODEBOOKS),
    "formats in blocks": (small_floats.BlockName, small_floats.BLOCK_FORMATS),
    "drafters": (by_name.DraftName, by_name._NAMED),
    "GPUs": (memory.Gpu, memory.GPUS),
    "kinds of prompts": (data.PromptKind, [file.stem for file in data.path("prompts").glob("*.json")]),
    "texts": (data.Split, [file.stem for file in data.path("text").glob("*.txt")]),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_types_names_are_the_tables(table: str) -> None:
    names, entries = TABLES[table]
    assert set(get_args(names)) == set(entries)


@pytest.mark.parametrize("build", ["attention_builds", "quantized_builds"])
def test_builds_take_the_dtypes_they_name(build: str) -> None:
    module = pytest.importorskip(f"optinfer_kernels.{build}")
    assert set(get_args(module.Dtype)) == set(module.DTYPES)


def test_a_router_knows_every_policy_it_names() -> None:
    class Idle:
        has_work = False

    for policy in get_args(router.Routing):
        assert not router.Router([Idle()], policy).has_work
    with pytest.raises(ValueError, match="policy must be one of prefix, load, turns, got 'random'"):
        router.Router([Idle()], "random")


def test_an_unknown_gpu_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="gpu must be one of T4, .*, got 'T5'"):
        memory.MemoryPlan(1.0, 1.0, 1.0).fits("T5")
