"""Whole models of random weights: what a 7B or a 70B weighs in memory, and how fast it decodes.

Speed and size depend on shapes alone, so no weights need downloading: packed codes are random bytes, each a legal
weight. The text that comes out is noise.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optinfer import hardware, noise
from optinfer.bench.rows import QuantizedMatmulRow
from optinfer.bench.timing import in_turns, one_after_another
from optinfer.memory import ModelShape
from optinfer.quantization.layers import linear_layers, replace_module
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.schemes import resolve_scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 512
CONFIGS: dict[str, dict[str, Any]] = {
    "Mistral-7B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "Llama-3-70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "nf4 + double quantization": {"name": "nf4", "double_quant": True},
    "int4": {"name": "int4", "group_size": 64},
}


def run(quick: bool = False) -> list[QuantizedMatmulRow]:
    """Rows with model, variant, weight_bytes (allocated), seconds per token at batch 1 and fraction of bandwidth."""
    device = hardware.default_device()
    cases = [("small", variant) for variant in VARIANTS]
    if device.type == "cuda" and not quick:
        cases = [("Mistral-7B", variant) for variant in VARIANTS] + [("Llama-3-70B", "nf4 + double quantization")]
    rows = []
    for name, variant in cases:
        try:
            row = measure(random_model(name, variant, device), device)
        except torch.OutOfMemoryError:
            row = QuantizedMatmulRow(skipped="does not fit this GPU")
        rows.append(replace(row, peer=f"optinfer {variant}", model=name))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def random_model(name: str, variant: str, device: torch.device) -> PreTrainedModel:
    """A transformers model of these shapes on `device`; never more of it in 16 bits than stays so."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = hardware.default_dtype(device)
    config = LlamaConfig(**CONFIGS[name], max_position_embeddings=4096, dtype=dtype)
    options = VARIANTS[variant]
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    if options is not None:
        scheme = resolve_scheme(**options)
        for linear in linear_layers(model).values():
            layer = QuantizedLinear(linear.in_features, linear.out_features, scheme, dtype=dtype, device=device)
            replace_module(model, linear, layer)
    fill(model, device)
    return model.eval()


def fill(model: PreTrainedModel, device: torch.device) -> None:
    """Random values for every parameter, in place or on `device` where it is still without memory."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            data = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.data
            if data.dtype == torch.uint8:
                data.random_(0, 256)
            elif "scale" in name or "absmax" in name or "offset" in name:
                data.fill_(0.02)
            else:
                data.normal_(0, 0.02)
            module._parameters[name] = nn.Parameter(data, requires_grad=False)
    inner = model.model
    with device:  # its table of frequencies is computed, not a parameter
        inner.rotary_emb = type(inner.rotary_emb)(model.config)


def measure(model: PreTrainedModel, device: torch.device, repeats: int = 21) -> QuantizedMatmulRow:
    """Memory of the weights, and time per token at batch 1 with a context of 512: a row without names.

    On a GPU a token is a CUDA graph.
    """
    from transformers import StaticCache

    weights = sum(p.nbytes for p in model.parameters())
    if len({p.data_ptr() for p in model.parameters()}) != len(list(model.parameters())):
        raise AssertionError("tied parameters would be counted twice")
    room = CONTEXT + noise.PATIENCE * repeats + 16  # every run of a step appends a token
    cache = StaticCache(config=model.config, max_cache_len=room)
    prompt = torch.randint(0, model.config.vocab_size, (1, CONTEXT), device=device)
    token, position = prompt[:, -1:], torch.tensor([[CONTEXT]], device=device)
    visible = (torch.arange(room, device=device) <= CONTEXT)[None, None, None]
    with torch.inference_mode():
        model(prompt, past_key_values=cache)

        def step() -> torch.Tensor:
            return model(token, attention_mask=visible, past_key_values=cache, position_ids=position).logits

        if not torch.isfinite(step()).all():
            raise AssertionError("the model computes something that is not a number")
        samples = in_turns({"step": one_after_another([step], device)}, device, repeats)["step"]
    seconds = statistics.median(samples)
    shape = ModelShape.of(model.config)
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    read = weights - embeddings.nbytes + CONTEXT * shape.kv_bytes_per_token(8 * model.dtype.itemsize)
    return QuantizedMatmulRow(
        weight_bytes=weights,
        seconds=seconds,
        samples=samples,
        bytes_per_second=read / seconds,
        of_bandwidth=read / seconds / hardware.this_machine().bandwidth,
    )
