"""Quantizes a model with llm-compressor, for the ladder beside ours. Runs in its own environment, imports nothing of ours.

    python llmcompressor_worker.py < order.json

The order: `{"model": folder, "sequences": [[token ids], ...], "method": "gptq" or "awq", "bits": 3, "group_size": 64,
"out": file}`. The file receives the weights that the quantized model computes with, restored to the model's dtype; the
last line of output is `{"version": ..., "seconds": ..., "cpu_seconds": ...}`.
"""

import importlib.metadata
import json
import os
import sys
import time
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def recipe(method: Literal["gptq", "awq"], bits: int, group_size: int) -> list:
    """The method with its authors' defaults, on affine grids."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {
        "num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size,
    }  # fmt: skip
    grids = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    return [GPTQModifier(**grids)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**grids)]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints goes to the error stream
    import torch
    from compressed_tensors.quantization import forward_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():  # AWQ in 0.14 pins memory for one all the same, and stops with an error
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    order = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype="auto")
    sequences = order["sequences"]
    text = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(s) for s in sequences]})
    start, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        processor=order["model"],
        dataset=text,
        recipe=recipe(order["method"], order["bits"], order["group_size"]),
        num_calibration_samples=len(sequences),
        max_seq_length=len(sequences[0]),
        batch_size=8,
        shuffle_calibration_samples=False,
    )
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    with torch.no_grad():
        for module in model.modules():
            if scheme := getattr(module, "quantization_scheme", None):
                module.weight.copy_(forward_quantize(module, module.weight, "weight", scheme.weights))
    names = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in ("weight", "bias")}
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters() if name in names}, order["out"])
    print(json.dumps({"version": importlib.metadata.version("llmcompressor")} | spent), file=answers, flush=True)


if __name__ == "__main__":
    main()
