"""The workshop: known formats come out as themselves, and orders that theory promises hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optinfer.course.workshop import DESIGNS, Design
from optinfer.quantization import quantize_4bit
from optinfer.quantization.formats.small_floats import quantize_blocks


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 256, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)) * 0.05


def test_known_formats_are_themselves() -> None:
    w = weight()
    assert torch.equal(DESIGNS["NF4"].restore(w), quantize_4bit(w, "nf4").dequantize())
    nv = quantize_blocks(w, "nvfp4").dequantize()
    differs = (DESIGNS["NVFP4"].restore(w) - nv).abs() > 1e-6
    assert float(differs.float().mean()) < 0.02  # ties, and the last bit of the tensor's scale
    assert DESIGNS["NVFP4"].bits_per_weight == 4.5 == DESIGNS["E2M1, E8M0 for 16"].bits_per_weight
    assert DESIGNS["MXFP4"].bits_per_weight == 4.25


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(-10, 10), min_size=16, max_size=16, unique=True),
    st.sampled_from([1, 7, 16, 64]),
    st.integers(0, 99),
)
def test_every_weight_goes_to_the_nearest_value(values: list[float], block: int, seed: int) -> None:
    if max(map(abs, values)) < 1e-3:
        return
    w = torch.randn(3, 20, generator=torch.Generator(torch.get_default_device()).manual_seed(seed))
    design = Design("any", tuple(values), block, "float32")
    back = design.restore(w)
    for row in range(3):
        for start in range(0, 20, block):
            piece, got = w[row, start : start + block], back[row, start : start + block]
            scale = piece.abs().max() / max(map(abs, torch.tensor(values).tolist()))
            levels = torch.tensor(values) * scale
            best = (piece[:, None] - levels).abs().amin(1)
            torch.testing.assert_close((piece - got).abs(), best, rtol=1e-3, atol=1e-5)


def test_orders() -> None:
    """Smaller blocks lose less; a scale with a mantissa loses less than a power of two at equal bits."""
    w = weight(1)
    errors = [Design("x", DESIGNS["MXFP4"].values, block, "e8m0").error(w) for block in (16, 32, 64, 128)]
    assert errors == sorted(errors)
    assert DESIGNS["NVFP4"].error(w) < 0.9 * DESIGNS["E2M1, E8M0 for 16"].error(w)


def test_refusals() -> None:
    for options, message in [
        ({"values": (1.0,) * 3}, "sixteen"),
        ({"values": (0.0,) * 16}, "not all zero"),
        ({"values": tuple(range(16)), "block": 0}, "block must"),
        ({"values": tuple(range(16)), "scale": "e5m2"}, "scale must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            Design("x", **options)


@pytest.mark.compile
def test_any_codebook_costs_the_same_and_even_steps_cost_less() -> None:
    pytest.importorskip("triton")
    books = {name: Design(name, DESIGNS[name].values, 64) for name in ("int4", "NF4", "MXFP4")}
    cost = {name: design.instructions(80) for name, design in books.items()}
    assert cost["NF4"] == pytest.approx(cost["MXFP4"], rel=0.1) and cost["int4"] < cost["MXFP4"]
