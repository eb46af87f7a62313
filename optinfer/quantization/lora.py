"""LoRA adapters over quantized layers, trained by PEFT: QLoRA (Dettmers et al., arXiv 2305.14314) with our formats."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from optinfer.quantization.linear import QuantizedLinear

__all__ = ["lora_config"]


def lora_config(**options: Any) -> LoraConfig:
    """A `peft.LoraConfig` that knows `QuantizedLinear`.

    >>> model = quantize(model, "nf4", double_quant=True)
    >>> model = peft.get_peft_model(model, lora_config(r=8, target_modules=["q_proj", "v_proj"]))

    Give the same configuration to `peft.PeftModel.from_pretrained(model, folder, config=…)` to load an adapter again.

    Args:
        options: of `peft.LoraConfig`.

    Raises:
        ValueError: an option that starts from the layer's own weight, which is packed here (DoRA, PiSSA, OLoRA, …).
    """
    if options.get("use_dora"):
        raise ValueError("use_dora=True needs the layer's weight, which is quantized; leave it out")
    if options.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights={options['init_lora_weights']!r} starts from the layer's weight, which is quantized; use True, "
            "False or 'gaussian'"
        )
    config = LoraConfig(**options)
    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    return config


class LoraQuantizedLinear(Linear):
    """Two small matrices beside a quantized layer. They cannot be merged into it without rounding it anew."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "an adapter cannot be merged into a quantized layer: keep it beside the layer, or merge it into the original model"
        )
