"""The number-format inspector: one number in eleven formats, bit by bit, inside the group that it shares a scale with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets

from optinfer.quantization.formats.small_floats import BLOCK_FORMATS, E2M1, BlockName
from optinfer.quantization.number_formats import CODEBOOKS, FORMATS
from optinfer.widgets.base import StaticWidget

if TYPE_CHECKING:
    from torch import nn

    from optinfer.quantization.formats.tensor import QuantizedTensor

# Sixteen weights of a typical size, for readers without a model at hand.
EXAMPLE = {
    "name": "sixteen example weights",
    "values": [
        *(0.021, -0.043, 0.008, 0.113, -0.062, 0.03, -0.005, 0.051),
        *(-0.092, 0.014, 0.037, -0.018, 0.071, -0.027, 0.002, -0.155),
    ],
}


class NumberFormats(StaticWidget):
    """Type a number or pick a weight: its bits in every format, its rounding error, and that of its group.

    Formats of eight bits and fewer that need a scale share one per group, so a typed outlier spoils its neighbours.

    Traits:
        blocks: dicts of ``name`` and ``values``, weights that share a scale, and perhaps ``tensor_absmax``, the largest
            magnitude of the tensor that they are from: NVFP4 has a scale for it.
        block, index: the weight that is picked.
        formats: what the script needs to know about each format.
    """

    _esm = Path(__file__).with_suffix(".js")
    _widget_css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

    blocks = traitlets.List([EXAMPLE]).tag(sync=True)
    block = traitlets.Int(0).tag(sync=True)
    index = traitlets.Int(0).tag(sync=True)
    formats = traitlets.List().tag(sync=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.formats = [
            {
                "name": f.name,
                "bits": f.bits,
                "kind": f.kind,
                "exponent": f.exponent_bits,
                "mantissa": f.mantissa_bits,
                "max": f.max,
                "table": list(CODEBOOKS.get(f.name.lower(), ())),
            }
            for f in FORMATS.values()
        ]
        scales = {"mxfp4": "e8m0", "nvfp4": "e4m3"}
        for name, scale in scales.items():
            form = BLOCK_FORMATS[name]
            shared = {"bits": 4, "kind": "block", "table": list(E2M1), "max": form.largest}
            self.formats = [*self.formats, {"name": name.upper(), "scale": scale, "block": form.block} | shared]

    @classmethod
    def of_model(cls, model: "nn.Module", group_size: int = 64, count: int = 4) -> "NumberFormats":
        """An inspector of real weights: the first block of `count` linear layers spread over the model's depth."""
        from optinfer.quantization.layers import linear_layers

        layers = list(linear_layers(model).items())
        chosen = [layers[i * (len(layers) - 1) // max(1, count - 1)] for i in range(count)]
        blocks = [
            {
                "name": name,
                "values": linear.weight.detach().reshape(-1)[:group_size].float().tolist(),
                "tensor_absmax": float(linear.weight.detach().abs().max()),
            }
            for name, linear in chosen
        ]
        return cls(blocks=blocks)

    def summary(self) -> str:
        values: Any = self.blocks[self.block]["values"]
        value, absmax = values[self.index], max(map(abs, values))
        lines = [f"{value:.6g} from {self.blocks[self.block]['name']}, group of {len(values)}, absmax {absmax:.6g}"]
        for f in FORMATS.values():
            scale = absmax / f.max if f.scaled and absmax else 1.0
            pattern = f.encode(value / scale)
            bits = " ".join(field for _, field in f.fields(pattern))
            lines.append(f"{f.name:9} {bits}  = {f.decode(pattern) * scale:.6g}")
        names: tuple[BlockName, ...] = ("mxfp4", "nvfp4")
        for name in names:
            q, restored = self.in_blocks(name)
            lines.append(f"{name.upper():9} {int(q.codes()[0, self.index]):04b}  = {restored[self.index]:.6g}")
        return "\n".join(lines)

    def in_blocks(self, scheme: BlockName) -> "tuple[QuantizedTensor, list[float]]":
        """The picked group in a format with small scales: the quantized tensor, and its numbers restored."""
        import torch

        from optinfer.quantization.formats.small_floats import quantize_blocks

        block: Any = self.blocks[self.block]
        values = torch.tensor(block["values"])[None]
        whole = max(float(values.abs().max()), block.get("tensor_absmax", 0.0))
        rest = torch.zeros(1, -values.shape[1] % 32 + 32)
        rest[0, -1] = whole  # a block of its own, for the tensor's scale
        q = quantize_blocks(torch.cat([values, rest], 1), scheme)
        return q, q.dequantize()[0, : values.shape[1]].tolist()
