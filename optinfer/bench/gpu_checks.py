"""What only a GPU can judge: compiled kernels against float64, graphs against plain steps, memory against the formulas."""

from __future__ import annotations

from typing import Any

import torch

# Largest error, relative to the largest value: rounding of inputs and outputs in the dtype.
BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-3}


def kernels(device: torch.device) -> list[dict[str, Any]]:
    """Every kernel on odd shapes, against the same formula in float64.

    Returns: a row per case, with its error and its bound.

    Raises AssertionError: an error beyond its bound; the message names the cases.
    """
    torch.manual_seed(0)
    dtypes = [torch.float16, *([torch.bfloat16] if torch.cuda.is_bf16_supported() else [])]
    rows = [
        row
        for dtype in dtypes
        for row in (*_attention(device, dtype), *_paged(device, dtype), *_products(device, dtype))
    ]
    if wrong := [
        f"{row['kernel']} {row['case']}: {row['error']:.2g}" for row in rows if not row["error"] <= row["bound"]
    ]:
        raise AssertionError(f"beyond rounding: {'; '.join(wrong)}")
    return rows


def _row(kernel: str, case: str, found: torch.Tensor, expected: torch.Tensor, bound: float) -> dict[str, Any]:
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))
    return {"kernel": kernel, "case": case, "error": error, "bound": bound}


def _attention(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    from optinfer.attention import UnsupportedBackend, attention_reference, flash_attention

    rows = []
    for queries, keys, heads, dim, causal in (
        (129, 129, 4, 64, True),
        (77, 333, 6, 128, False),
        (1, 1000, 8, 64, True),
    ):
        q = torch.randn(2, heads, queries, dim, device=device).to(dtype)
        k, v = (torch.randn(2, heads // 2, keys, dim, device=device).to(dtype) for _ in range(2))
        expected: Any = attention_reference(q.double(), k.double(), v.double(), causal)
        for backend in ("triton", "triton_tma", "triton_ws"):
            try:
                found: Any = flash_attention(q, k, v, causal, backend=backend)
            except (UnsupportedBackend, ValueError):  # not for this GPU or this shape: refused, not wrong
                continue
            case = f"{dtype} {queries}x{keys}, {dim} wide{', causal' if causal else ''}"
            rows.append(_row(f"attention {backend}", case, found, expected, BOUNDS[dtype]))
    return rows


def _paged(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    from optinfer.kv_cache import paged_attention, paged_attention_reference
    from optinfer.kv_cache.pool import quantize_kv

    rows = []
    for int8 in (False, True):
        lengths, counts = torch.tensor([1, 17, 250, 1000]), [1, 3, 1, 70]
        pages = torch.randn(2, 200, 16, 2, 64, device=device).to(dtype)
        options: dict[str, Any] = {}
        k, v = pages[0], pages[1]
        if int8:
            (k, options["k_scale"]), (v, options["v_scale"]) = quantize_kv(k), quantize_kv(v)
        counts = [min(n, int(length)) for n, length in zip(counts, lengths)]
        starts = torch.tensor([0, *counts]).cumsum(0).to(device)
        q = torch.randn(sum(counts), 6, 64, device=device).to(dtype)
        tables = torch.randperm(200)[: 4 * 63].repeat(2)[: 4 * 63].view(4, 63) % 200
        arguments = (q, k, v, tables.to(device), lengths.to(device))
        options |= {"query_starts": starts, "max_queries": max(counts)}
        expected = paged_attention_reference(*arguments, dtype=torch.float64, **options)
        found = paged_attention(*arguments, backend="triton", **options)
        rows.append(_row("paged attention", f"{dtype}, pages {k.dtype}, ragged", found, expected, BOUNDS[dtype]))
    return rows


def _products(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    from optinfer.quantization.formats.products import quantized_matmul
    from optinfer.quantization.schemes import resolve_scheme

    rows = []
    for scheme, options in (
        ("nf4", {}),
        ("nf4", {"double_quant": True}),
        ("int4", {}),
        ("int8", {}),
        ("int4", {"symmetric": False}),
    ):
        weight = torch.randn(1536, 576, device=device).to(dtype)
        q = resolve_scheme(scheme, **options).quantize(weight)
        for tokens in (1, 5, 33):
            x = torch.randn(tokens, 576, device=device).to(dtype)
            expected = x.double() @ q.dequantize(torch.float32).double().T
            found = quantized_matmul(x, q, backend="triton")
            rows.append(
                _row("quantized product", f"{dtype} {scheme} {options} {tokens} tokens", found, expected, BOUNDS[dtype])
            )
    return rows


def engine(device: torch.device) -> list[dict[str, Any]]:
    """The engine with and without CUDA graphs against `generate`, in float32, and its pages against the formula.

    Raises AssertionError: another text, or other bytes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from optinfer.kv_cache import kv_bytes_per_token
    from optinfer.serving import Engine, SamplingParams

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
    rows = []
    for graphs in (True, False) if device.type == "cuda" else (False,):
        for draft in (None, "prompt_lookup"):
            built = Engine(model, num_blocks=64, block_size=16, cuda_graphs=graphs, draft=draft)
            done = built.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
            same = sum(c.token_ids == wanted for c, wanted in zip(done, expected))
            pool = built.runner.pool
            wanted_bytes = pool.num_blocks * 16 * kv_bytes_per_token(config, torch.float32)
            rows.append(
                {"graphs": graphs, "draft": str(draft), "same texts": same, "of": len(prompts), "bytes": pool.nbytes}
            )
            assert same == len(prompts), (
                f"{len(prompts) - same} of {len(prompts)} texts differ from generate ({rows[-1]})"
            )
            assert pool.nbytes == wanted_bytes, f"pages take {pool.nbytes} bytes, not {wanted_bytes}"
    return rows
