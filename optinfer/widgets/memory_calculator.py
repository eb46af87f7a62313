"""The memory of serving a model, as a calculator: weights, KV cache and activations against GPUs one can buy."""

from pathlib import Path

import traitlets

from optinfer import memory
from optinfer.widgets.base import StaticWidget


class MemoryCalculator(StaticWidget):
    """Choose a model, bits, context and requests; see what fills the memory and on which GPU it fits.

    Traits:
        model: name of a shape in `optinfer.memory.MODELS`.
        weight_bits, kv_bits: bits per weight and per number in the KV cache.
        context: tokens per request.
        requests: served at the same time.
    """

    _esm = Path(__file__).with_suffix(".js")
    _widget_css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

    models = traitlets.List(memory.presets()).tag(sync=True)
    gpus = traitlets.Dict(memory.GPUS).tag(sync=True)
    model = traitlets.Unicode("Llama-3-70B").tag(sync=True)
    weight_bits = traitlets.Float(16).tag(sync=True)
    kv_bits = traitlets.Float(16).tag(sync=True)
    context = traitlets.Int(4096).tag(sync=True)
    requests = traitlets.Int(1).tag(sync=True)

    @traitlets.validate("model")
    def _known_model(self, proposal: dict[str, str]) -> str:
        if proposal["value"] not in memory.MODELS:
            raise ValueError(f"model must be one of {', '.join(memory.MODELS)}, not {proposal['value']!r}")
        return proposal["value"]

    def plan(self) -> memory.MemoryPlan:
        """What the widget shows, computed in Python."""
        return memory.plan(memory.MODELS[self.model], self.weight_bits, self.kv_bits, self.context, self.requests)

    def summary(self) -> str:
        plan = self.plan()
        return (
            f"{self.model}, {self.weight_bits:g}-bit weights, {self.requests} requests of {self.context} tokens: "
            f"weights {plan.weights / 1e9:.1f} GB, KV cache {plan.kv_cache / 1e9:.1f} GB, "
            f"activations {plan.activations / 1e9:.1f} GB, together {plan.total / 1e9:.1f} GB"
        )
