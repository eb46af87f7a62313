"""The compile gate of the quantized products: no spills anywhere, and a budget of instructions per weight."""

import pytest

pytest.importorskip("triton")
from optinfer.quantization.number_formats import CODEBOOKS
from optinfer_kernels.compile import SHARED_MEMORY
from optinfer_kernels.quantized_builds import compile_quantized
from tests.builds import Builds

pytestmark = pytest.mark.compile
ARCHS = (80, 86, 89, 90, 100, 120)
NF4, FP4 = tuple(CODEBOOKS["nf4"]), tuple(CODEBOOKS["fp4"])


def case(scheme, arch, dtype="bf16", tokens=1, group_size=64, nested=False, codebook=None):
    return scheme, arch, dtype, tokens, group_size, nested, NF4 if scheme == "codebook" else codebook


def cases():
    for arch in ARCHS:
        for tokens in (1, 16, 32, 64):
            for scheme in ("codebook", "int4", "int4 affine", "int8"):
                yield case(scheme, arch, tokens=tokens)
            yield case("codebook", arch, tokens=tokens, nested=True)
        for scheme in ("codebook", "int4", "int8"):
            yield case(scheme, arch, dtype="fp16")
        yield case("int4", arch, group_size=32)
        yield case("int4", arch, group_size=128)


BUILDS = Builds(compile_quantized, cases())


def name(case) -> str:
    return "-".join(str(part) for part in case[:6])


TURING = Builds(
    compile_quantized, (case(scheme, 75, dtype="fp16") for scheme in ("codebook", "int4", "int4 affine", "int8"))
)


@pytest.mark.parametrize("case", TURING.cases, ids=name)
def test_one_token_without_tensor_cores(case):
    """A T4 starts 14 instructions of a thread in the time in which a weight of 4.5 bits arrives (its data sheet: 320 GB/s)."""
    build = TURING[case]
    assert build.kernel.spill_bytes == 0 and build.mix["HMMA"] == 0
    assert build.mix["LDS"] <= build.weights_per_thread / 10  # sums of rows go through shared memory, no weight does
    assert build.instructions_per_weight <= 7


@pytest.mark.parametrize("case", BUILDS.cases, ids=name)
def test_fits_without_spilling(case):
    build = BUILDS[case]
    assert build.kernel.spill_bytes == 0
    assert build.kernel.shared_bytes <= SHARED_MEMORY[case[1]]
    assert sum(build.mix[i] for i in ("HMMA", "HGMMA", "UTCHMMA", "IMMA")) > 0  # the tensor cores do the products
    assert build.mix["LDGSTS"] > 0  # weights arrive in the background
    # No code goes through the conversion unit, which is slow; a zero point does, one for a row and a step.
    assert build.mix["I2F"] <= (build.weights_per_thread / 16 if case[0] == "int4 affine" else 0)


# What one token costs: the regression figures. A kernel that does better may lower its line, none may raise it.
BUDGET = {"codebook": 4.0, "codebook nested": 4.2, "int4": 2.7, "int4 affine": 3.5, "int8": 4.0}


@pytest.mark.parametrize("case", [c for c in BUILDS.cases if c[3] == 1 and c[4] == 64], ids=name)
def test_instructions_per_weight(case):
    scheme, nested = case[0], case[5]
    budget = BUDGET[f"{scheme} nested" if nested else scheme]
    assert 1 < BUILDS[case].instructions_per_weight <= budget


def test_the_readable_kernel_spends_many():
    """A look-up and a scale for every weight: several times the fast kernel's count. And it fits as well."""
    build = compile_quantized("codebook", 90, codebook=NF4, readable=True)
    assert build.kernel.spill_bytes == 0 and build.mix["HMMA"] == 0
    assert build.instructions_per_weight > 3 * BUILDS[case("codebook", 90)].instructions_per_weight


def test_the_count_can_fail():
    """The same loop with a quarter of the rows per program spreads its overhead over fewer weights."""
    build = BUILDS[case("codebook", 90)]
    assert build.weights_per_thread == 128
    assert len(build.loop) == sum(build.mix.values())
    assert build.mix["PRMT"] >= 2 * build.weights_per_thread  # eight permutes for four weights, counted by hand
