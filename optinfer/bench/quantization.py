"""Quantization beside bitsandbytes: the same model, the same inputs, one run, rounds interleaved.

Measured: time to quantize the whole model, time per generated token at batch 1 and 8, peak memory of a process that
loads, quantizes and generates. Before anything is timed, the peers' logits are compared.
Decode steps of the engine are measured beside llama.cpp, too: on the same bits.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optinfer import hardware
from optinfer.bench.rows import QuantizationRow
from optinfer.bench.steps import BATCHES, beside_llama_cpp, row
from optinfer.models import load_model
from optinfer.quantization import quantize
from optinfer.quantization.layers import linear_layers, replace_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEERS = ("optinfer", "bitsandbytes")
VARIANTS: dict[str, dict[str, Any]] = {
    "nf4": {"scheme": "nf4"},
    "nf4 + double quantization": {"scheme": "nf4", "double_quant": True},
    "llm_int8": {"scheme": "llm_int8"},
}


def run(quick: bool = False) -> list[QuantizationRow]:
    """Rows for `optinfer bench quantization`; bitsandbytes and llama.cpp are left out where they are not installed.

    Args:
        quick: fewer rounds, NF4 and LLM.int8() only.
    """
    model, tokenizer = load_model()
    ids = tokenizer("The memory of a language model", return_tensors="pt").input_ids.to(model.device)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every layer: that would be timed as well
    peers = [p for p in PEERS if p == "optinfer" or _has_bitsandbytes()]
    names = ["nf4", "llm_int8"] if quick else list(VARIANTS)
    rounds = 3 if quick else 7
    rows = _decode_rows("bf16", {"torch": model}, rounds)
    if not quick:
        extra = {"optinfer": quantize(copy.deepcopy(model), "int4", progress=False)}
        rows += _decode_rows("int4", extra, rounds)
        extra = {"optinfer": quantize(copy.deepcopy(model), "int8", progress=False)}
        rows += _decode_rows("int8", extra, rounds)
        del extra
    rows += beside_llama_cpp(model, (1, 8) if quick else BATCHES, rounds)
    for name in names:
        options = VARIANTS[name]
        made: dict[str, nn.Module] = {}

        def make(peer: str, options: dict = options, made: dict = made) -> Callable[[nn.Module], None]:
            def work(target: nn.Module) -> None:
                made[peer] = QUANTIZE[peer](target, **options)

            return work

        seconds = _interleaved_on_copies(model, {peer: make(peer) for peer in peers}, max(2, rounds // 2))
        for peer in peers:
            rows.append(row(name, peer, "quantize the model", seconds[peer]))
        if len(peers) == 2:
            with torch.inference_mode():
                a, b = (made[p](ids).logits.float() for p in PEERS)
            difference = ((a - b).norm() / b.norm()).item()
            if difference > 0.02:
                raise RuntimeError(f"{name}: logits of the peers differ by {difference:.3g}: not timed")
        rows += _decode_rows(name, made, rounds)
        for peer in peers:
            rows.append(QuantizationRow(variant=name, peer=peer, what="peak memory", **_peak(peer, options)))
    return rows


def compare_tokens(model: PreTrainedModel, variant: str = "nf4", rounds: int = 3) -> list[QuantizationRow]:
    """Time per token of the model, and of its quantized copy by each peer that is installed; for the notebook."""
    rows = _decode_rows("bf16", {"torch": model}, rounds)
    peers = [p for p in PEERS if p == "optinfer" or _has_bitsandbytes()]
    made = {peer: QUANTIZE[peer](copy.deepcopy(model), **VARIANTS[variant]) for peer in peers}
    return rows + _decode_rows(variant, made, rounds)


def _quantize_by_bitsandbytes(model: nn.Module, scheme: str, double_quant: bool = False) -> nn.Module:
    """What `from_pretrained` with a BitsAndBytesConfig makes, from the weights in memory."""
    import bitsandbytes as bnb

    layers = linear_layers(model)
    for name in list(layers):
        linear = layers.pop(name)
        size = (linear.in_features, linear.out_features)
        bias, device = linear.bias is not None, linear.weight.device
        with torch.device("meta"):
            new: nn.Module
            if scheme == "llm_int8":
                new = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False, threshold=6.0)
            else:
                new = bnb.nn.Linear4bit(
                    *size,
                    bias=bias,
                    compute_dtype=linear.weight.dtype,
                    compress_statistics=double_quant,
                    quant_type=scheme,
                )
        weight = linear.weight.data.cpu()
        if scheme == "llm_int8":
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            new.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type=scheme, compress_statistics=double_quant
            )
        new.bias = linear.bias
        new.to(device)
        replace_module(model, linear, new.eval())
    return model


def _quantize_by_optinfer(model: nn.Module, **options: Any) -> nn.Module:
    return quantize(model, progress=False, **options)


QUANTIZE = {"optinfer": _quantize_by_optinfer, "bitsandbytes": _quantize_by_bitsandbytes}


def _interleaved_on_copies(
    model: nn.Module, work: dict[str, Callable[[nn.Module], None]], rounds: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {peer: [] for peer in work}
    for _ in range(rounds):
        for peer, run_once in work.items():
            target = copy.deepcopy(model)
            gc.collect()
            start = time.perf_counter()
            run_once(target)
            _synchronize(model)
            seconds[peer].append(time.perf_counter() - start)
    return seconds


def _decode_rows(variant: str, models: dict[str, Any], rounds: int, context: int = 32) -> list[QuantizationRow]:
    """Time per token (of each sequence) at batch 1 and 8; the peers take turns."""
    from transformers import DynamicCache

    rows = []
    for batch in (1, 8):
        steps: dict[str, Any] = {}
        seconds: dict[str, list[float]] = {peer: [] for peer in models}
        for peer, model in models.items():
            prompt = torch.randint(0, 1000, (batch, context), device=model.device)
            cache = DynamicCache(config=model.config)

            def step(model: Any = model, token: Any = prompt[:, -1:], cache: Any = cache) -> None:
                model(token, past_key_values=cache)

            with torch.inference_mode():
                model(prompt, past_key_values=cache)
                step()
            steps[peer] = step
        with torch.inference_mode():
            for _ in range(rounds * 3):
                for peer, step in steps.items():
                    start = time.perf_counter()
                    step()
                    _synchronize(models[peer])
                    seconds[peer].append(time.perf_counter() - start)
        for peer, samples in seconds.items():
            rows.append(row(variant, peer, f"token, batch {batch}", samples))
    return rows


def _peak(peer: str, options: dict[str, Any]) -> dict[str, Any]:
    """Peak resident memory of a fresh process that loads, quantizes and generates 8 tokens, in bytes."""
    command = [sys.executable, "-m", "optinfer.bench.quantization", peer, json.dumps(options)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def _peak_here(peer: str, options: dict[str, Any]) -> dict[str, int]:
    if _has_bitsandbytes():
        import bitsandbytes  # noqa: F401  both peers pay for its import: our fused operator lives there

    model, tokenizer = load_model()
    before = hardware.peak_memory_bytes()
    QUANTIZE[peer](model, **options)
    ids = tokenizer("The memory of a language model", return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=8, do_sample=False)
    return {"peak_bytes_after_load": before, "peak_bytes": hardware.peak_memory_bytes()}


def _synchronize(model: Any) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def _has_bitsandbytes() -> bool:
    import importlib.util

    return importlib.util.find_spec("bitsandbytes") is not None


if __name__ == "__main__":
    print(json.dumps(_peak_here(sys.argv[1], json.loads(sys.argv[2]))))
