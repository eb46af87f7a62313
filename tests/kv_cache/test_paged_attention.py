"""Attention over pages: torch and interpreted Triton against float64, and the kernels compiled for every GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optinfer.kv_cache import paged_attention, paged_attention_reference
from optinfer.kv_cache.pool import quantize_kv
from tests.devices import ON_GPU

TORCH_BACKENDS = ["reference", "sdpa"] + ["loops"] * (not ON_GPU)  # C++ loops are for the CPU


def problem(lens, heads=4, kv_heads=2, head_dim=32, block_size=16, q_len=1, dtype=torch.float32, int8=False, seed=0):
    """Random caches with sequences scattered over a pool in which everything else is nan (or 127)."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    max_blocks = max(-(-n // block_size) for n in lens) + 1
    num_blocks = max_blocks * len(lens) + 3
    tables = torch.randperm(num_blocks, generator=g)[: max_blocks * len(lens)].view(len(lens), max_blocks)
    shape = (num_blocks, block_size, kv_heads, head_dim)
    caches, scales = [], []
    for _ in range(2):
        full = torch.randn(shape, generator=g).to(dtype)
        used = torch.zeros(shape[:2], dtype=torch.bool)
        for i, n in enumerate(lens):
            token = torch.arange(n)
            used[tables[i, token // block_size], token % block_size] = True
        if int8:
            full, scale = quantize_kv(full)
            full[~used], scale[~used] = 127, torch.nan
            scales.append(scale)
        else:
            full[~used] = torch.nan
        caches.append(full)
    for i, n in enumerate(lens):  # entries behind the last block are never looked at
        tables[i, -(-n // block_size) :] = 10**6
    q = torch.randn((len(lens), heads, q_len, head_dim), generator=g).to(dtype)
    kwargs = dict(zip(("k_scale", "v_scale"), scales))
    return (q.squeeze(2) if q_len == 1 else q, *caches, tables.int(), torch.tensor(lens).int()), kwargs


def assert_close_to_exact(out, arguments, kwargs):
    """At most twice the error that plain torch makes in the same dtype, plus a rounding of the output."""
    exact = paged_attention_reference(*arguments, **kwargs, dtype=torch.float64)
    dtype = arguments[0].dtype
    assert out.dtype == dtype and out.shape == arguments[0].shape
    tolerance = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error <= tolerance, f"error {error:.2e}"


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.integers(3, 90), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (9, 3), (8, 1)]),
    head_dim=st.sampled_from([8, 24, 64]),
    block_size=st.sampled_from([1, 5, 16, 32]),
    q_len=st.integers(1, 3),
    int8=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_torch_backends_on_random_shapes(lens, heads, head_dim, block_size, q_len, int8, seed):
    arguments, kwargs = problem(lens, *heads, head_dim, block_size, q_len, int8=int8, seed=seed)
    for backend in TORCH_BACKENDS:
        assert_close_to_exact(paged_attention(*arguments, backend=backend, **kwargs), arguments, kwargs)


def ragged_problem(queries, contexts, seed=0, **options):
    """`problem` with so many queries of each sequence, packed."""
    (q, k, v, tables, lens), kwargs = problem(contexts, q_len=max(queries), seed=seed, **options)
    q = q.unsqueeze(2) if max(queries) == 1 else q  # [batch, heads, most, head_dim]
    packed = torch.cat([row[:, -n:].transpose(0, 1) for row, n in zip(q, queries)])
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    return (packed, k, v, tables, lens), {**kwargs, "query_starts": starts}


@st.composite
def ragged_problems(draw):
    contexts = draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    queries = [draw(st.integers(1, n)) if draw(st.booleans()) else 1 for n in contexts]
    heads, kv_heads = draw(st.sampled_from([(1, 1), (6, 2), (9, 3), (40, 1)]))
    arguments, options = ragged_problem(
        queries,
        contexts,
        draw(st.integers(0, 1000)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 20, 64])),
        block_size=draw(st.sampled_from([1, 5, 16])),
        int8=draw(st.booleans()),
    )
    options["window"] = draw(st.sampled_from([None, 1, 7, 30]))
    options["softcap"] = draw(st.sampled_from([None, 3.0]))
    if draw(st.booleans()):
        options["sinks"] = (
            torch.randn(heads, generator=torch.Generator(torch.get_default_device()).manual_seed(heads)) * 3
        )
    return arguments, options


@settings(max_examples=80, deadline=None)
@given(ragged_problems())
def test_ragged_batches_windows_caps_and_sinks(case):
    arguments, options = case
    for backend in TORCH_BACKENDS:
        assert_close_to_exact(paged_attention(*arguments, backend=backend, **options), arguments, options)


@pytest.mark.thorough
@settings(max_examples=12, deadline=None)
@given(ragged_problems(), st.sampled_from([1, 2, 4]))
def test_the_kernel_on_ragged_batches(case, splits):
    from optinfer_kernels.paged_attention import paged_attention as kernel

    arguments, options = case
    assert_close_to_exact(kernel(*arguments, splits=splits, **options), arguments, options)


def test_a_ragged_batch_is_its_sequences_one_by_one():
    """The reference itself, against dense attention written out for one query at a time."""
    (q, k, v, tables, lens), options = ragged_problem([1, 4, 9], [20, 4, 33])
    sinks = torch.randn(4)
    out = paged_attention_reference(q, k, v, tables, lens, window=6, softcap=2.0, sinks=sinks, **options)
    row = 0
    for i, queries in enumerate([1, 4, 9]):
        for position in range(int(lens[i]) - queries, int(lens[i])):
            seen = torch.arange(max(0, position - 5), position + 1)
            page, slot = tables[i, seen // 16].long(), seen % 16
            for head in range(4):
                keys, values = (x[page, slot, head // 2].double() for x in (k, v))
                scores = 2 * torch.tanh(keys @ q[row, head].double() / 32**0.5 / 2)
                weights = scores.exp() / (scores.exp().sum() + sinks[head].double().exp())
                torch.testing.assert_close(out[row, head].double(), weights @ values, atol=1e-5, rtol=1e-5)
            row += 1


def test_pages_equal_ordinary_attention():
    (q, k, v, tables, lens), _ = problem([50], heads=4, kv_heads=2)
    token = torch.arange(50)
    flat = [x[tables[0, token // 16].long(), token % 16].transpose(0, 1)[None] for x in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], *flat, enable_gqa=True)
    assert torch.allclose(paged_attention(q, k, v, tables, lens), expected[:, :, 0], atol=1e-6)


TRITON_CASES = {
    "decode, ragged": {"lens": [1, 70, 200]},
    "decode, no groups": {"lens": [33], "heads": 2, "kv_heads": 2},
    "decode, 9 heads on 3": {"lens": [40, 100], "heads": 9, "kv_heads": 3, "head_dim": 64},
    "decode, pages of 5": {"lens": [64, 65], "block_size": 5},
    "decode, pages larger than tiles": {"lens": [150], "block_size": 128},
    "decode, odd head_dim": {"lens": [20], "head_dim": 40},
    "chunk": {"lens": [30, 90], "q_len": 21},
    "whole prompt": {"lens": [37], "q_len": 37, "heads": 2, "kv_heads": 1},
    "verify drafts": {"lens": [6, 140], "q_len": 6},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("case", TRITON_CASES)
def test_the_kernel_interpreted(case, dtype):
    int8 = dtype == torch.int8
    options = {"dtype": torch.float16 if int8 else dtype, "int8": int8, **TRITON_CASES[case]}
    arguments, kwargs = problem(**options)
    assert_close_to_exact(paged_attention(*arguments, backend="triton", **kwargs), arguments, kwargs)


@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_the_number_of_splits_does_not_matter(splits):
    from optinfer_kernels.paged_attention import paged_attention as kernel

    arguments, _ = problem([1, 65, 130], q_len=1)  # 16 splits leave most of them empty
    assert_close_to_exact(kernel(*arguments, splits=splits), arguments, {})
    arguments, _ = problem([65, 130], q_len=9)
    assert_close_to_exact(kernel(*arguments, splits=splits), arguments, {})


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_results_do_not_depend_on_where_the_pages_are_or_who_else_is_there(backend):
    (q, k, v, tables, lens), _ = problem([60, 17, 90])
    out = paged_attention(q, k, v, tables, lens, backend=backend)
    order = torch.randperm(k.shape[0])
    moved = torch.argsort(order)[tables.clamp(max=k.shape[0] - 1).long()]
    assert torch.allclose(paged_attention(q, k[order], v[order], moved, lens, backend=backend), out, atol=1e-6)
    alone = paged_attention(q[1:2], k, v, tables[1:2], lens[1:2], backend=backend)
    assert torch.allclose(alone, out[1:2], atol=1e-6)


def test_extreme_scores_stay_finite():
    for factor in (1e4, -1e4):
        (q, k, v, tables, lens), _ = problem([70, 9])
        out = paged_attention(q * factor, k, v, tables, lens, backend="triton")
        assert out.isfinite().all() and out.abs().max() <= v.nan_to_num().abs().max() + 1e-5


def test_a_wrong_page_would_be_noticed():
    (q, k, v, tables, lens), _ = problem([60, 40])
    wrong = tables.clone()
    wrong[0, :2] = tables[0, :2].flip(0)  # the same keys in another order: attention does not care ...
    out = paged_attention(q, k, v, wrong, lens, backend="triton")
    assert_close_to_exact(out, (q, k, v, tables, lens), {})
    wrong[0, 0] = tables[1, 0]  # ... but it does care whose they are
    with pytest.raises(AssertionError):
        assert_close_to_exact(paged_attention(q, k, v, wrong, lens, backend="triton"), (q, k, v, tables, lens), {})


def test_bad_arguments_are_refused():
    (q, k, v, tables, lens), _ = problem([20, 40])
    (qi, ki, vi, _, _), scales = problem([20, 40], int8=True)
    long = torch.tensor([20, 1000])
    for call, error, message in [
        (lambda: paged_attention(q, k, v, tables, lens, backend="magic"), ValueError, "backend must be one of"),
        (lambda: paged_attention([1], k, v, tables, lens, backend="sdpa"), TypeError, "q must be a torch.Tensor"),
        (lambda: paged_attention(q[0], k, v, tables, lens), ValueError, "q must be"),
        (lambda: paged_attention(q.double(), k, v, tables, lens), TypeError, "float64"),
        (lambda: paged_attention(q, k.half(), v, tables, lens), TypeError, "k_cache has dtype"),
        (lambda: paged_attention(q, k, v[:, :3], tables, lens), ValueError, "k_cache and v_cache"),
        (lambda: paged_attention(q[:, :3], k, v, tables, lens), ValueError, "multiple of KV heads"),
        (lambda: paged_attention(qi, ki, vi, tables, lens), ValueError, "k_scale is required"),
        (lambda: paged_attention(q, k, v, tables, lens, **scales), ValueError, "only for int8"),
        (lambda: paged_attention(q, k, v, tables.float(), lens), TypeError, "block_tables must be int32"),
        (lambda: paged_attention(q, k, v, tables[:1], lens), ValueError, "block_tables must be"),
        (lambda: paged_attention(q, k, v, tables, lens * 0), ValueError, "context_lens must be 1"),
        (lambda: paged_attention(q, k, v, tables, long), ValueError, "context_lens must be 1"),
        (lambda: paged_attention(q, k, v, tables * 0 - 1, lens), ValueError, "outside 0 to"),
        (lambda: paged_attention(q, k, v, tables, lens, scale=0), ValueError, "scale must be"),
    ]:
        if ON_GPU and message in ("context_lens must be 1", "outside 0 to"):
            continue  # to look at their numbers would make the host wait for the GPU
        with pytest.raises(error, match=message):
            call()


# ---------------------------------------------------------------- compiled for GPUs that are not here


@pytest.mark.compile
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(
    "kind", ["decode", "decode of 8", "decode int8", "chunk", "decode with all", "chunk with all", "decode tree"]
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_compile_without_a_spill(arch, kind, head_dim):
    """ "all": window, soft cap and sinks; "tree": a mask among the newest tokens; "of 8": heads that share a KV head, else 4."""
    from optinfer_kernels.compile import SHARED_MEMORY, compile_for
    from optinfer_kernels.paged_attention import add_splits_kernel, paged_attention_kernel, tile_for

    int8, decode, everything = "int8" in kind, "decode" in kind, "with" in kind
    group = 8 if "of 8" in kind else 4
    tile = tile_for(arch, torch.float16, head_dim, group if decode else 512)
    constants = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "PAGE": 16, "BLOCK_M": tile.block_m}
    constants |= {"BLOCK_N": tile.block_n, "INT8": int8, "SPLIT": decode, "PRECISION": "tf32"}
    constants |= dict.fromkeys(["WINDOW", "SOFTCAP", "SINKS"], everything) | {"TREE": "tree" in kind}
    types = {"q_ptr": "*fp16", "out_ptr": "*fp16", "scale": "fp32", "cap_scale": "fp32"}
    types |= dict.fromkeys(["k_ptr", "v_ptr"], "*i8" if int8 else "*fp16") | {"tree_ptr": "*i8"}
    types |= dict.fromkeys(["table_ptr", "length_ptr", "start_ptr"], "*i32")
    types |= dict.fromkeys(["k_scale_ptr", "v_scale_ptr", "sink_ptr", "part_ptr", "lse_ptr"], "*fp32")
    signature = {n: types.get(n, "i32") for n in paged_attention_kernel.arg_names if n not in constants}
    aligned = tuple(n for n in signature if "stride" in n and n != "table_stride")
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = compile_for(arch, paged_attention_kernel, signature, constants, aligned=aligned, **options)
    assert compiled.spill_bytes == 0
    assert compiled.shared_bytes <= SHARED_MEMORY[arch]
    if arch >= 80:
        assert any(compiled.count(i) for i in ("HMMA", "HGMMA", "UTCHMMA")), "no tensor cores"
    if decode:
        constants = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_S": 16}
        signature = {n: types.get(n, "i32") for n in add_splits_kernel.arg_names if n not in constants}
        assert compile_for(arch, add_splits_kernel, signature, constants).spill_bytes == 0
