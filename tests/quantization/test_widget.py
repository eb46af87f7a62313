"""Widgets show what the package does: GPTQ's columns, and numbers in formats with small scales."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from optinfer.quantization.formats.grid import quantize_linear
from optinfer.quantization.methods.gptq import gptq_quantize, row_errors
from optinfer.widgets import number_formats
from optinfer.widgets.gptq_columns import GptqColumns
from optinfer.widgets.modules import inlined
from optinfer.widgets.number_formats import NumberFormats
from tests.javascript import NODE, needs_node


def test_widget_ends_where_gptq_ends():
    weight, x = torch.randn(32, 8), torch.randn(50, 8)
    hessian = x.T @ x
    widget = GptqColumns.trace(weight, hessian, bits=3)
    walked = torch.tensor(widget.frames[-1]["weights"], dtype=torch.float64)
    plain = quantize_linear(weight, 3, "channel", symmetric=False).dequantize()
    worse = row_errors(weight, walked, hessian) > row_errors(weight, plain, hessian)  # there GPTQ takes `plain`
    expected = gptq_quantize(weight, hessian, 3, "channel", symmetric=False).dequantize().double()
    assert not worse.all()  # so the walk itself is compared too
    assert torch.allclose(torch.where(worse[:, None], plain.double(), walked), expected, atol=1e-6)
    assert "output error" in widget.summary() and "<script" in widget.static_html()


@needs_node
def test_the_inspector_rounds_as_the_formats_do(tmp_path: Path) -> None:
    values = [*(torch.randn(64, generator=torch.Generator(torch.get_default_device()).manual_seed(0)) * 0.05).tolist()]
    values[5], values[40:48] = 0.0, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]  # ties of E2M1
    widget = NumberFormats(blocks=[{"name": "x", "values": values, "tensor_absmax": 9.0}])
    small = [f for f in widget.formats if f["kind"] == "block"]
    (tmp_path / "widget.mjs").write_text(inlined(Path(number_formats.__file__).with_suffix(".js")), encoding="utf-8")
    (tmp_path / "run.mjs").write_text(
        'import widget from "./widget.mjs";\n'
        f"const [formats, list] = [{json.dumps(small)}, {json.dumps(values)}];\n"
        "console.log(JSON.stringify(formats.map((f) => list.map((v, i) => "
        "widget.encode(v, f, widget.largestAround(list, i, f), 9).value))));\n"
    )
    done = subprocess.run([NODE, str(tmp_path / "run.mjs")], capture_output=True, text=True, timeout=60, check=True)
    for form, shown in zip(small, json.loads(done.stdout), strict=True):
        assert shown == pytest.approx(widget.in_blocks(form["name"].lower())[1], rel=1e-5, abs=1e-9)
    assert "MXFP4" in widget.summary() and "NVFP4" in widget.summary()
