"""Whether it is right: every kernel against float64, CUDA graphs against eager steps, lessons from top to bottom.

A row has `check`, `case`, and `ok`; numerical ones the largest `error` and the `limit` it must keep.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optinfer import doctor as examination
from optinfer import hardware
from optinfer.attention import attention_reference, flash_attention
from optinfer.attention.dispatch import KERNELS, Problem, obstacle
from optinfer.bench.gpu_day.steps import NotHere, Rows
from optinfer.bench.random_model import random_model
from optinfer.kv_cache.attention import paged_attention, paged_attention_reference
from optinfer.quantization.formats.gpu import as_kernel_weight
from optinfer.quantization.formats.products import quantized_matmul as quantized_matmul_of
from optinfer.quantization.model import quantize
from optinfer.quantization.schemes import SchemeName, resolve_scheme

OUTPUT_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}


def doctor(tiny: bool) -> Rows:
    """What the machine is. What the course's notebooks miss here is named, and fails nothing."""
    for finding in examination.versions() + examination.machine() + examination.ways():
        yield {"check": "doctor", "case": finding.name, "value": finding.value, "why": finding.fix}


def attention(tiny: bool, few: bool = False) -> Rows:
    """Every kernel, dtype and head dimension, causal or not, with window and soft-cap where the kernel has them.

    The limit is flash-attention's own: twice the error of the formula in the same dtype, three times with a soft-cap.
    """
    device = hardware.default_device()
    shapes = [(1, 4, 2, 70, 130)] if tiny else [(1, 4, 2, 70, 130), (1, 4, 4, 128, 128)]
    shapes += [] if tiny or few else [(2, 8, 2, 1000, 1000), (2, 8, 8, 1, 2000), (1, 16, 16, 2048, 2048)]
    head_dims = (64,) if tiny else (64, 128) if few else (32, 64, 80, 128, 256)
    extras: tuple[dict[str, Any], ...] = ({},) if tiny else ({}, {"window": 50}, {"softcap": 20.0})
    cases = itertools.product(KERNELS, _dtypes(device), shapes, head_dims, (False, True), extras)
    for name, dtype, (b, h, kv, n, m), d, causal, extra in cases:
        problem = Problem(device.type, hardware.capability(device), dtype, d, n, m, causal, **extra)
        if obstacle(name, problem) is not None:
            continue
        q, k, v = _random(dtype, (b, h, n, d), (b, kv, m, d), (b, kv, m, d))
        doubles = (q.double(), k.double(), v.double())

        def compute(q=q, k=k, v=v, causal=causal, name=name, extra=extra) -> Tensor:
            out = flash_attention(q, k, v, causal, backend=name, **extra)
            return out if isinstance(out, Tensor) else out[0]

        exact: Any = attention_reference(*doubles, causal, **extra)
        plain = _error(attention_reference(q, k, v, causal, **extra), exact)
        limit = (3 if "softcap" in extra else 2) * plain + 4 * OUTPUT_ULP[dtype] * exact.abs().max().item()
        case = f"{name} {dtype} {b}x{h}/{kv}x{n}x{m}x{d}{' causal' * causal}{''.join(f' {o} {x}' for o, x in extra.items())}"
        yield _compared("attention", case, compute, exact, limit)


def quantized(tiny: bool, few: bool = False) -> Rows:
    """The fast and the readable product of every packed format, and the product of bytes."""
    device = hardware.default_device()
    shapes = [(130, 256)] if tiny or few else [(130, 256), (576, 1536), (4096, 4096), (1000, 14336)]
    tokens = (1, 9) if tiny else (1, 8, 16, 17, 64)
    yield from _packed_products(device, shapes, tokens)
    yield from _scaled_products(device, shapes, tokens)
    yield from _products_of_bytes(device, shapes, tokens)


def _packed_products(device: torch.device, shapes: list[tuple[int, int]], tokens: tuple[int, ...]) -> Rows:
    """Codes are restored in x's dtype: one rounding for each weight, and one of the output."""
    from optinfer_kernels import quantized_matmul, quantized_matmul_fast

    variants: dict[str, dict[str, Any]] = {
        "nf4": {"name": "nf4"},
        "nf4 + double quantization": {"name": "nf4", "double_quant": True},
        "fp4": {"name": "fp4"},
        "int4": {"name": "int4", "group_size": 64},
        "int4 affine": {"name": "int4", "group_size": 64, "symmetric": False},
        "int8": {"name": "int8", "group_size": "channel"},
    }
    halves = [dtype for dtype in _dtypes(device) if dtype != torch.float32]
    for (label, options), (rows, columns), dtype in itertools.product(variants.items(), shapes, halves):
        (weight,) = _random(dtype, (rows, columns))
        packed = resolve_scheme(**options).quantize(weight)
        restored = packed.dequantize(torch.float32).double()
        kernel_weight = as_kernel_weight(packed)
        for count in tokens:
            (x,) = _random(dtype, (count, columns))
            limit = 2 * OUTPUT_ULP[dtype] * (x.double().abs() @ restored.abs().T).max().item()
            kernels = {"fast": quantized_matmul_fast.quantized_matmul} | (
                {"readable": quantized_matmul.quantized_matmul} if count <= 16 else {}
            )
            for kernel, product in kernels.items():
                case = f"{kernel} {label} {dtype} {rows}x{columns}, {count} tokens"

                def compute(product=product, x=x, w=kernel_weight) -> Tensor:
                    return product(x, w)

                yield _compared("quantized", case, compute, x.double() @ restored.T, limit)


def _scaled_products(device: torch.device, shapes: list[tuple[int, int]], tokens: tuple[int, ...]) -> Rows:
    """Small floats in eight bits, where the GPU knows E4M3."""
    e4m3: tuple[SchemeName, ...] = ("fp8", "mxfp8") if (hardware.capability(device) or (0, 0)) >= (8, 9) else ()
    for name, (rows, columns), count in itertools.product(e4m3, shapes, tokens):
        weight, x = _random(torch.bfloat16, (rows, columns), (count, columns))
        packed = resolve_scheme(name).quantize(weight)
        restored = packed.dequantize(torch.float64)
        limit = 2 * OUTPUT_ULP[torch.bfloat16] * (x.double().abs() @ restored.abs().T).max().item()
        case = f"scaled {name} {torch.bfloat16} {rows}x{columns}, {count} tokens"

        def compute(x=x, q=packed) -> Tensor:
            return quantized_matmul_of(x, q, backend="triton")

        yield _compared("quantized", case, compute, x.double() @ restored.T, limit)


def _products_of_bytes(device: torch.device, shapes: list[tuple[int, int]], tokens: tuple[int, ...]) -> Rows:
    from optinfer_kernels.int8_matmul import int8_matmul

    for (rows, columns), count in itertools.product(shapes, tokens):
        a, b = (torch.randint(-128, 128, (n, columns), device=device).to(torch.int8) for n in (count, rows))
        case = f"int8 {rows}x{columns}, {count} tokens"

        def compute(a=a, b=b) -> Tensor:
            return int8_matmul(a, b)

        yield _compared("quantized", case, compute, a.double() @ b.double().T, 0.0)


def paged(tiny: bool, few: bool = False) -> Rows:
    """One query per sequence over pages in any order, of several lengths and head dimensions."""
    device = hardware.default_device()
    contexts = (7, 40) if tiny or few else (1, 16, 333, 4096)
    for dtype, dim, group, context in itertools.product(
        _dtypes(device), (64,) if tiny else (64, 128), (1, 4), contexts
    ):
        batch, size, kv_heads = 3, 16, 2
        blocks = -(-context // size)
        k, v = _random(dtype, *2 * [(batch * blocks, size, kv_heads, dim)])
        (q,) = _random(dtype, (batch, kv_heads * group, dim))
        tables = torch.randperm(batch * blocks, device=device).view(batch, blocks).int()
        lens = torch.tensor([context, max(1, context // 2), 1], dtype=torch.int32, device=device)
        exact = paged_attention_reference(q, k, v, tables, lens, dtype=torch.float64)
        plain = _error(paged_attention_reference(q, k, v, tables, lens, dtype=dtype), exact)
        limit = 2 * plain + 4 * OUTPUT_ULP[dtype] * exact.abs().max().item()

        def compute(q=q, k=k, v=v, tables=tables, lens=lens) -> Tensor:
            return paged_attention(q, k, v, tables, lens, backend="triton")

        yield _compared("paged", f"{dtype} dim {dim}, group {group}, {context} tokens", compute, exact, limit)


def ragged(tiny: bool, few: bool = False) -> Rows:
    """Several queries per sequence over pages in 16 bits and in int8, as a step of the engine has them."""
    from optinfer.kv_cache.pool import quantize_kv

    device = hardware.default_device()
    lengths, counts = ((1, 17, 40), (1, 3, 20)) if tiny or few else ((1, 17, 250, 1000), (1, 3, 1, 70))
    blocks = -(-max(lengths) // 16)
    for dtype, int8 in itertools.product(_dtypes(device), (False, True)):
        k, v = _random(dtype, *2 * [(len(lengths) * blocks, 16, 2, 64)])
        options: dict[str, Any] = {}
        if int8:
            (k, options["k_scale"]), (v, options["v_scale"]) = quantize_kv(k), quantize_kv(v)
        options |= {
            "query_starts": torch.tensor([0, *itertools.accumulate(counts)], device=device), "max_queries": max(counts)
        }  # fmt: skip
        (q,) = _random(dtype, (sum(counts), 6, 64))
        tables = torch.randperm(len(lengths) * blocks, device=device).view(len(lengths), blocks).int()
        arguments = (q, k, v, tables, torch.tensor(lengths, dtype=torch.int32, device=device))
        exact = paged_attention_reference(*arguments, dtype=torch.float64, **options)
        plain = _error(paged_attention_reference(*arguments, dtype=dtype, **options), exact)
        limit = 2 * plain + 4 * OUTPUT_ULP[dtype] * exact.abs().max().item()

        def compute(arguments: Any = arguments, options: dict[str, Any] = options) -> Tensor:
            query, keys, values, blocks, lens = arguments
            return paged_attention(query, keys, values, blocks, lens, backend="triton", **options)

        yield _compared("ragged", f"{dtype}, pages {'int8' if int8 else 'alike'}", compute, exact, limit)


def graphs(tiny: bool) -> Rows:
    """The engine's tokens as it runs by itself, with CUDA graphs where it can, and without them: in 16 bits and quantized."""
    from optinfer.serving import Engine, SamplingParams

    device = hardware.default_device()
    if device.type != "cuda":
        raise NotHere("CUDA graphs need a GPU")
    schemes: tuple[dict[str, Any] | None, ...] = (
        None, {"scheme": "nf4"}, {"scheme": "nf4", "double_quant": True}, {"scheme": "int8"}, {"scheme": "llm_int8"},
    )  # fmt: skip
    prompts = [[1, 2, 3, 4, 5], [7, 8], list(range(1, 40))]
    params = SamplingParams(max_tokens=4 if tiny else 24, ignore_eos=True)
    for options in schemes:
        torch.manual_seed(0)
        model = random_model("small", "bf16", device)
        if options:
            quantize(model, **options, progress=False)

        def tokens(cuda_graphs: bool | None, model=model) -> list[list[int]]:
            engine = Engine(model, num_blocks=64, max_num_seqs=4, cuda_graphs=cuda_graphs)
            return [done.token_ids for done in engine.generate(prompts, params)]

        row: dict[str, Any] = {"check": "graphs", "case": str(options or "16 bits")}
        try:
            captured, eager = tokens(None), tokens(False)
        except Exception as error:
            _stop_if_lost(error)
            yield row | {"ok": False, "why": f"{type(error).__name__}: {error}"[:300]}
            continue
        same = sum(a == b for x, y in zip(captured, eager, strict=True) for a, b in zip(x, y, strict=True))
        yield row | {"ok": captured == eager, "same_tokens": same, "of": sum(map(len, eager))}


def engine(tiny: bool) -> Rows:
    """The engine with and without CUDA graphs and drafts against `generate`, in float32; its pages against the formula."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from optinfer.kv_cache import kv_bytes_per_token
    from optinfer.serving import Engine, SamplingParams

    device = hardware.default_device()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model = model.to(device)
    prompts = [torch.randint(1, 500, (n,), device="cpu").tolist() for n in (1, 9, 30, 64)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        expected.append(model.generate(ids, max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist())
    for graphs, draft in itertools.product(
        (True, False) if device.type == "cuda" else (False,), (None, "prompt_lookup")
    ):
        built = Engine(model, num_blocks=64, block_size=16, cuda_graphs=graphs, draft=draft)
        done = built.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
        same = sum(c.token_ids == wanted for c, wanted in zip(done, expected, strict=True))
        pool = built.runner.pool
        formula = pool.num_blocks * 16 * kv_bytes_per_token(config, torch.float32)
        row = {"check": "engine", "case": f"{'graphs' if graphs else 'eager'}, draft {draft}"}
        yield row | {"ok": same == len(prompts), "same_texts": same, "of": len(prompts)}
        yield row | {"ok": pool.nbytes == formula, "bytes": pool.nbytes, "formula": formula}


def lesson(tiny: bool, name: str) -> Rows:
    """One lesson, run from top to bottom."""
    from optinfer import data

    path = Path(data.root()) / "notebooks" / f"{name}.ipynb"
    missing = [finding.name for finding in examination.versions() if finding.value == "missing" and finding.fatal]
    if missing or not _default_model_is_here():
        raise NotHere(f"missing: {', '.join(missing) or 'the default model'}")
    from optinfer.execute import execute

    with tempfile.TemporaryDirectory() as folder:
        # the step has a limit, and needs none for a cell
        notebook = execute(small_copy(path, Path(folder)) if tiny else path, timeout=7200)
    yield {"check": "lesson", "case": name, "ok": True, "cells": len(notebook.cells)}


# What takes minutes on a GPU, and in a rehearsal would take hours: rows, steps, batch and length of a head's training.
SMALL = {"05_speculative_decoding": ("= (1024, 600, 8, 96) if", "= (16, 8, 4, 32) if")}


def small_copy(path: Path, folder: Path) -> Path:
    """A copy of a lesson with the sizes of a rehearsal.

    Raises:
        ValueError: the lesson has no longer the sizes that this knows.
    """
    text = path.read_text(encoding="utf-8")
    if path.parent.name == "notebooks" and path.stem in SMALL:
        usual, small = SMALL[path.stem]
        if usual not in text:
            raise ValueError(f"{path} holds no {usual!r}: its sizes have changed, SMALL has not")
        text = text.replace(usual, small)
    copy = folder / path.name
    copy.write_text(text, encoding="utf-8")
    return copy


def _default_model_is_here() -> bool:
    from optinfer import folders, models

    return models.is_intact(folders.cache_directory() / models.DEFAULT_MODEL)


def _dtypes(device: torch.device) -> list[torch.dtype]:
    capability = hardware.capability(device)
    has_bfloat16 = capability is None or capability >= (8, 0)
    return [torch.float16, *[torch.bfloat16] * has_bfloat16, torch.float32]


def _random(dtype: torch.dtype, *shapes: tuple[int, ...]) -> Iterable[Tensor]:
    return tuple(torch.randn(shape, device=hardware.default_device()).to(dtype) for shape in shapes)


def _error(out: Any, exact: Tensor) -> float:
    return (out.double() - exact).abs().max().item()


def _compared(check: str, case: str, compute: Callable[[], Tensor], exact: Tensor, limit: float) -> dict[str, Any]:
    """A kernel that raises is a failed case, and the others go on; unless it took the whole GPU with it."""
    row = {"check": check, "case": case.replace("torch.", "")}
    try:
        error = _error(compute(), exact)
    except Exception as problem:
        _stop_if_lost(problem)
        return row | {"ok": False, "why": f"{type(problem).__name__}: {problem}"[:300]}
    # a NaN is no number that keeps a limit, and none that JSON knows
    return row | {"ok": error <= limit, "error": error if error == error else "nan", "limit": limit}


def _stop_if_lost(error: Exception) -> None:
    """After an illegal access or an assertion on the GPU nothing in this process works any more."""
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        raise error
