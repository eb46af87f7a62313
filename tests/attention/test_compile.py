"""The compile gate: every kernel, dtype and tile, for every architecture, on a machine without a GPU."""

import os

import pytest

pytest.importorskip("triton")
from optinfer_kernels.attention_builds import compile_attention
from optinfer_kernels.compile import SHARED_MEMORY
from tests.builds import Builds

pytestmark = pytest.mark.compile
ARCHS = (75, 80, 86, 89, 90, 100, 120)
HEAD_DIMS = (32, 64, 128, 256)
DTYPES = ("fp16", "bf16", "fp32")


def cases():
    """bf16 is fp16 in all but name to registers and shared memory: it takes the head dims that models use most."""
    for arch in ARCHS:
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                no_bf16 = dtype == "bf16" and arch < 80
                if not no_bf16 and (dtype != "bf16" or head_dim in (64, 128)):
                    yield "flash_attention", arch, dtype, head_dim
            if arch >= 90 and dtype != "fp32":
                for head_dim in HEAD_DIMS:
                    yield "flash_attention_tma", arch, dtype, head_dim
        yield "flash_attention", arch, "fp16", 128, False
        yield "flash_attention", arch, "fp16", 128, True, True
    yield "flash_attention_tma", 90, "fp16", 128, False
    yield "flash_attention_tma", 90, "bf16", 128, True, True
    for dtype in ("fp16", "bf16"):
        for head_dim in (64, 128):
            for causal in (False, True):
                yield "flash_attention_ws", 90, dtype, head_dim, causal, causal


BUILDS = Builds(compile_attention, cases())


@pytest.mark.parametrize("case", BUILDS.cases, ids=lambda case: "-".join(map(str, case)))
def test_fits_without_spilling(case):
    kernel = BUILDS[case]
    assert kernel.spill_bytes == 0
    assert kernel.shared_bytes <= SHARED_MEMORY[case[1]]
    assert kernel.registers <= 255


@pytest.mark.parametrize(
    "case", [case for case in BUILDS.cases if case[2] != "fp32"], ids=lambda case: "-".join(map(str, case))
)
def test_uses_what_the_architecture_has(case):
    kernel, (name, arch) = BUILDS[case], case[:2]
    tensor_cores = {75: None, 80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}[arch]
    if tensor_cores is None:
        assert kernel.count("HMMA") == 0 and kernel.count("FFMA") > 100  # Triton has none for Turing; see the doctor
    else:
        assert kernel.count(tensor_cores) > 0
    if name == "flash_attention":
        assert kernel.count("UTMALDG") == 0 and (arch < 80 or kernel.count("LDGSTS") > 0)
    else:
        assert kernel.count("UTMALDG") > 0
    assert kernel.is_specialized == (name == "flash_attention_ws")
    if name == "flash_attention_ws":
        assert kernel.threads == 384  # one warp group that fetches, two that compute


def test_the_gate_can_fail():
    """Four warps cannot hold a 128 x 128 accumulator: this must be seen as a spill."""
    from optinfer_kernels import flash_attention

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("with TRITON_INTERPRET=1 nothing compiles in this process")
    before = flash_attention.TILES
    try:
        flash_attention.TILES = {75: {(2, 128): flash_attention.Tile(128, 128, 4, 2)}}
        assert compile_attention("flash_attention", 80, "fp16", 128).spill_bytes > 0
    finally:
        flash_attention.TILES = before


@pytest.mark.parametrize("version, stages", [("3.6.0", 1), ("3.7.0", 3), ("3.10.1", 3)])
def test_triton_without_fences_keeps_one_tile_in_flight_on_hopper(version, stages, monkeypatch):
    from optinfer_kernels import flash_attention

    monkeypatch.setattr(flash_attention.triton, "__version__", version)
    assert [flash_attention.stages_for(arch, 3) for arch in (80, 90, 120)] == [3, stages, 3]
