"""The product with microscaled weights: which instruction the compiler finds for it, and what is refused."""

import re

import pytest

pytest.importorskip("triton")

from optinfer_kernels.scaled_matmul import check_architecture, compile_scaled


@pytest.mark.compile
@pytest.mark.parametrize(
    ("arch", "form", "x_form", "group", "instruction"),
    [
        (80, "e2m1", "bf16", 32, "HMMA"),
        (90, "e2m1", "bf16", 32, "HGMMA"),  # restored to bfloat16 in registers
        (90, "e4m3", "bf16", 32, "HGMMA"),
        (90, "e4m3", "bf16", 0, "HGMMA"),  # FP8, a scale per row
        (89, "e4m3", "bf16", 0, "HMMA"),
        (100, "e2m1", "e2m1", 32, "UTCOMMA"),  # four bits by four bits, scales and all
        (100, "e4m3", "e4m3", 32, "UTCQMMA"),
        (120, "e2m1", "e2m1", 32, "OMMA"),
        (120, "e2m1", "e2m1", 16, "OMMA"),  # NVFP4
    ],
)
def test_instructions(arch: int, form: str, x_form: str, group: int, instruction: str) -> None:
    kernel = compile_scaled(arch, form, x_form, group)
    assert re.search(rf"\b{instruction}\b", kernel.sass) and kernel.spill_bytes == 0
    if instruction in ("UTCOMMA", "OMMA"):
        assert "block_scale" in kernel.ptx and not re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", kernel.sass)


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match="not on 90"):
        check_architecture(90, {"e2m1"}, 16)
    with pytest.raises(ValueError, match=r"needs compute capability 8.9, this is 8.0"):
        check_architecture(80, {"e4m3", "bf16"}, 32)
