"""The widget of GPTQ's columns shows what `gptq_quantize` does."""

import torch

from optinfer.quantization.gptq import gptq_quantize, row_errors
from optinfer.quantization.rtn import quantize_linear
from optinfer.widgets.gptq_columns import GptqColumns


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
