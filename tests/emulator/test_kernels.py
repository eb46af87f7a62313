"""Every kernel as a GPU would get it, executed, on odd shapes: float64 says what is right, and no finding is allowed."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from optinfer.attention import hbm_bytes
from optinfer_kernels import paged_attention as paged_kernel
from optinfer_kernels import quantized_matmul as readable
from optinfer_kernels import quantized_matmul_fast as fast
from optinfer_kernels.emulator import emulate
from optinfer_kernels.int8_matmul import int8_matmul
from optinfer_kernels.quantized_arguments import INT4, QuantizedWeight
from tests.attention import cases
from tests.kv_cache import test_paged_attention as paged
from tests.quantized_matmul.test_exactness import assert_exact
from tests.quantized_matmul.weights import make_weight

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing compiles with TRITON_INTERPRET"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the shared inputs are on the GPU, which needs no emulator"),
]
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


# ---- attention --------------------------------------------------------------------------------------------------


def in_a_sea(x):
    """x as a part of a larger tensor that is NaN all around: reading past a row's end shows."""
    sea = torch.full((*x.shape[:2], x.shape[2] + 64, x.shape[3]), torch.nan, dtype=x.dtype)
    sea[:, :, 16:-48] = x
    return sea[:, :, 16:-48]


LAYOUTS = {
    "plain": lambda x: x,
    "sea": in_a_sea,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "offset": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),  # not aligned to 16 bytes
}
CAUSAL = {"causal": True}
ATTENTION = [
    # batch, heads, KV heads, queries, keys, head_dim
    *(("flash_attention", arch, size, dtype, layout, options) for arch in (80, 90, 120) for size, dtype, layout, options in [
        ((2, 4, 2, 70, 150, 64), FP16, "sea", CAUSAL),
        ((1, 3, 1, 150, 90, 128), BF16, "plain", {"causal": True, "window": 40}),
        ((1, 2, 1, 50, 77, 80), BF16, "sea", {"softcap": 20.0}),
    ]),
    ("flash_attention", 80, (1, 2, 2, 1, 133, 64), BF16, "transposed", CAUSAL),
    ("flash_attention", 80, (1, 2, 1, 130, 130, 64), FP16, "offset", CAUSAL),
    ("flash_attention", 80, (1, 1, 1, 33, 65, 32), FP16, "sea", CAUSAL),
    ("flash_attention", 80, (1, 1, 1, 33, 65, 256), FP16, "plain", CAUSAL),
    ("flash_attention", 80, (1, 2, 1, 40, 60, 64), FP32, "sea", CAUSAL),
    ("flash_attention", 80, (1, 2, 2, 70, 30, 64), FP16, "plain", CAUSAL),  # rows that see nothing
    ("flash_attention", 75, (1, 1, 1, 33, 40, 32), FP16, "sea", CAUSAL),
    ("flash_attention", 75, (1, 1, 1, 40, 70, 64), FP16, "plain", {"causal": True, "window": 9}),
    ("flash_attention", 75, (1, 1, 1, 33, 40, 128), FP16, "sea", {"softcap": 20.0}),
    ("flash_attention", 75, (1, 1, 1, 20, 40, 64), FP32, "sea", CAUSAL),
    *(("flash_attention_tma", arch, size, dtype, layout, options) for arch in (90, 120) for size, dtype, layout, options in [
        ((2, 4, 2, 70, 150, 64), FP16, "sea", CAUSAL),
        ((3, 4, 1, 150, 90, 128), BF16, "plain", {"causal": True, "window": 40}),
        ((1, 2, 1, 150, 277, 80), BF16, "sea", {"softcap": 20.0}),
        ((1, 1, 1, 33, 65, 256), FP16, "transposed", CAUSAL),
    ]),
    ("flash_attention_ws", 90, (2, 4, 2, 70, 150, 64), FP16, "sea", CAUSAL),
    ("flash_attention_ws", 90, (1, 2, 1, 200, 200, 128), BF16, "plain", CAUSAL),
    ("flash_attention_ws", 90, (1, 2, 1, 150, 277, 64), FP16, "sea", {}),
    ("flash_attention_ws", 90, (1, 2, 1, 128, 256, 128), FP16, "transposed", {}),
    ("flash_attention_ws", 90, (1, 1, 1, 90, 40, 64), FP16, "plain", CAUSAL),  # rows that see nothing
]  # fmt: skip


def name_of(value):
    if isinstance(value, dict):
        return " ".join(f"{name} {option}" for name, option in value.items()) or "full"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize("kernel, arch, size, dtype, layout, options", ATTENTION, ids=name_of)
def test_attention(kernel, arch, size, dtype, layout, options, with_lse):
    if not with_lse and (layout, options) != ("sea", CAUSAL):
        pytest.skip("one case of each kernel is enough without the log-sum-exp")
    tensors = [LAYOUTS[layout](t) for t in cases.inputs(*size, dtype)]
    poisoned = torch.full((*tensors[0].shape[:2], size[3] + 2, size[5]), torch.nan, dtype=dtype)
    target = poisoned[:, :, 1:-1] if layout == "sea" else None
    with emulate(arch) as gpu:
        out, lse = cases.kernel(kernel)(*tensors, return_lse=with_lse, out=target, **options)
    cases.assert_exact(out, *tensors, **options)
    if with_lse:
        _, expected = cases.exact(*tensors, return_lse=True, **options)
        assert torch.equal(lse.isfinite(), expected.isfinite())
        torch.testing.assert_close(
            lse.double().nan_to_num(neginf=0), expected.nan_to_num(neginf=0), rtol=1e-5, atol=2e-5
        )
    assert poisoned[:, :, 0].isnan().all() and poisoned[:, :, -1].isnan().all()
    assert not gpu.findings, gpu.findings


@pytest.mark.parametrize(
    "kernel, arch", [("flash_attention", 80), ("flash_attention", 90), ("flash_attention_tma", 90)]
)
@pytest.mark.parametrize("sizes", [(1, 2, 1, 128, 128, 64), (2, 4, 4, 256, 384, 64)], ids=name_of)
def test_bytes_are_those_that_the_lesson_predicts(kernel, arch, sizes):
    """What the compiled kernel asks of memory equals `hbm_bytes`, to the byte."""
    from optinfer_kernels import flash_attention_tma
    from optinfer_kernels.flash_attention import tile_for

    tile = flash_attention_tma.tile_for(arch, 64) if "tma" in kernel else tile_for(arch, FP16, 64)
    with emulate(arch, check=False) as gpu:
        cases.kernel(kernel)(*cases.inputs(*sizes))
    names = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim")
    predicted = hbm_bytes("flash", **dict(zip(names, sizes)), itemsize=2, block_m=tile.block_m, block_n=tile.block_n)
    t = gpu.runs[-1].totals()
    assert t.bytes_loaded + t.bytes_stored == predicted


# ---- quantized products -----------------------------------------------------------------------------------------

QUANTIZED = [
    *((80, scheme, 300, 192, 64, 3, BF16, {}) for scheme in ("nf4", "nf4 nested", "fp4", "int4", "int4 affine", "int8")),
    *((arch, "int4 affine", 300, 192, 64, 3, FP16 if arch == 75 else BF16, {}) for arch in (75, 90, 120)),
    *((arch, *rest) for arch in (75, 90) for rest in [
        ("nf4", 70, 64 * 9, 64, 3, FP16, {"splits": 4}),
        ("int4 affine", 33, 96 * 3, 32, 1, FP16, {"scale_dtype": FP16}),
        ("int8", 130, 200, 200, 17, FP16, {}),
        ("nf4 nested", 40, 100, 100, 5, FP16, {}),
    ]),
    *((75, scheme, 300, 192, 64, tokens, FP16, {}) for scheme, tokens in [
        ("nf4", 1), ("nf4 nested", 4), ("int4", 1), ("int4 affine", 2), ("int8", 1),
    ]),
    (80, "nf4", 129, 160, 32, 40, FP16, {}),
    (80, "int4", 257, 128, 128, 64, BF16, {}),
]  # fmt: skip


@pytest.mark.parametrize("arch, scheme, n, k, group, tokens, dtype, options", QUANTIZED, ids=name_of)
def test_quantized_matmul_fast(arch, scheme, n, k, group, tokens, dtype, options):
    torch.manual_seed(n + k + tokens)
    options = dict(options)
    w = make_weight(scheme, n, k, group, options.pop("scale_dtype", FP32))
    x = torch.randn(tokens, k).to(dtype)
    with emulate(arch) as gpu:
        y = fast.quantized_matmul(x, w, **options)
    assert_exact(y, x, w, dtype)
    assert not gpu.findings, gpu.findings


@pytest.mark.parametrize("n, k, splits", [(40, 64 * 9, 8), (24, 64 * 7, 4), (8, 128, 4), (40, 64 * 35, 16)])
def test_splits_without_columns_read_nothing(n, k, splits):
    """As for 1536 x 8960 and 4096 x 11008: the columns run out before the splits do."""
    w, x = make_weight("int4", n, k, 64), torch.randn(1, k).bfloat16()
    with emulate(90, check=False) as gpu:
        y = fast.quantized_matmul(x, w, splits=splits)
    assert_exact(y, x, w, BF16)
    assert not gpu.findings, gpu.findings


@pytest.mark.parametrize("arch", [75, 80, 90])
@pytest.mark.parametrize("scheme, least_gain", [("nf4", 1.7), ("int4", 1.7), ("int4 affine", 1.7), ("int8", 1.0)])
def test_scales_by_group_are_read_in_whole_sectors(arch, scheme, least_gain):
    """Row by row each lane reads a sector of its own for one scale, and affine for one zero point."""
    w, x = make_weight(scheme, 256, 512, 512 if scheme == "int8" else 64), torch.randn(1, 512).half()
    source = Path(fast.__file__).read_text().splitlines()
    (of_x,) = (number for number, line in enumerate(source, 1) if "tl.load(x_ptr" in line)
    sectors = []
    for weight in (w, w.by_group()):
        with emulate(arch) as gpu:
            y = fast.quantized_matmul(x, weight, splits=1)
        assert_exact(y, x, w, FP16)
        assert not gpu.findings, gpu.findings
        # Of the weight: x is another matter, read again by every warp where each of them needs it in registers.
        lines = [
            line for line in gpu.runs[-1].lines("quantized_matmul_fast.py") if int(line.place.split(":")[1]) != of_x
        ]
        sectors.append((sum(line.sectors for line in lines), sum(line.least_sectors for line in lines)))
    (rows, _), (groups, least) = sectors
    assert rows >= least_gain * groups
    assert groups <= least


def test_the_sum_of_splits_reads_whole_sectors():
    """Each thread's numbers fit one load: with eight of them every sector was asked for twice."""
    w, x = make_weight("int4", 64, 1024, 64), torch.randn(2, 1024).bfloat16()
    with emulate(90, check=False) as gpu:
        fast.quantized_matmul(x, w, splits=4)
    totals = gpu.runs[-1].totals()
    assert gpu.runs[-1].name == "add_splits_kernel"
    assert totals.sectors == totals.least_sectors


@pytest.mark.parametrize("arch", [75, 80])
@pytest.mark.parametrize("scheme", ["nf4", "nf4 nested", "int4 affine", "int8"])
def test_quantized_matmul_readable(arch, scheme):
    w, x = make_weight(scheme, 37, 200, 100), torch.randn(2, 200).half()
    with emulate(arch) as gpu:
        y = readable.quantized_matmul(x, w)
    assert_exact(y, x, w, FP32)
    assert not gpu.findings, gpu.findings


@pytest.mark.parametrize("arch, tokens, n, k", [
    (75, 1, 130, 200), (75, 50, 70, 1100), (80, 1, 130, 200), (80, 20, 128, 1100), (90, 50, 70, 130), (120, 1, 130, 200)
])  # fmt: skip
def test_int8_matmul(arch, tokens, n, k):
    a, b = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((tokens, k), (n, k)))
    with emulate(arch) as gpu:
        y = int8_matmul(a, b)
    assert torch.equal(y.double(), a.double() @ b.double().T)
    assert not gpu.findings, gpu.findings


# ---- paged attention --------------------------------------------------------------------------------------------

PAGED = [
    *(
        (arch, name, dtype, None)
        for arch in (75, 80, 90)
        for name in paged.TRITON_CASES
        for dtype in (FP16, torch.int8)
    ),
    *((80, name, BF16, None) for name in ("decode, ragged", "chunk")),
    *(
        (arch, name, FP16, splits)
        for arch in (75, 80, 90)
        for name in ("decode, ragged", "chunk")
        for splits in (2, 16)
    ),
    (120, "decode, ragged", FP16, None),
    (80, "decode, ragged", FP32, None),
]


@pytest.mark.parametrize("arch, name, dtype, splits", PAGED, ids=name_of)
def test_paged_attention(arch, name, dtype, splits):
    int8 = dtype == torch.int8
    arguments, scales = paged.problem(**{"dtype": FP16 if int8 else dtype, "int8": int8, **paged.TRITON_CASES[name]})
    with emulate(arch) as gpu:
        out = paged_kernel.paged_attention(*arguments, splits=splits, **scales)
    paged.assert_close_to_exact(out, arguments, scales)
    assert not gpu.findings, gpu.findings


@pytest.mark.parametrize("arch", [75, 80, 90])
def test_paged_attention_with_everything(arch):
    arguments, options = paged.ragged_problem([5, 1, 9], [40, 70, 9], dtype=FP16, heads=6, kv_heads=2)
    options |= {"window": 20, "softcap": 3.0, "sinks": torch.randn(6)}
    with emulate(arch) as gpu:
        out = paged_kernel.paged_attention(*arguments, **options)
    paged.assert_close_to_exact(out, arguments, options)
    assert not gpu.findings, gpu.findings


def test_decoding_on_turing_keeps_to_its_budget():
    """One query of three heads that share keys is no tile of sixteen rows: 341,520 wavefronts and 232,944 instructions before.

    And one token's product keeps its weight in registers: 246,400 wavefronts and 141,424 instructions before.
    """
    torch.manual_seed(0)
    k, v = (torch.randn(40, 16, 3, 64).to(FP16) for _ in range(2))
    tables = torch.randperm(40).view(2, 20).int()
    with emulate(75, check=False) as gpu:
        paged_kernel.paged_attention(torch.randn(2, 9, 64).to(FP16), k, v, tables, torch.tensor([300, 300]).int())
        fast.quantized_matmul(torch.randn(1, 1024).to(FP16), make_weight("nf4", 256, 1024, 64))
    attention, _, product, _ = (run.totals() for run in gpu.runs)
    assert attention.wavefronts <= 110_000 and attention.instructions <= 85_000
    assert product.wavefronts <= 500 and product.instructions <= 75_000


# ---- the tests can fail -----------------------------------------------------------------------------------------


def test_a_scale_too_few_is_noticed():
    w, x = make_weight("int4", 40, 128, 64), torch.randn(1, 128).bfloat16()
    short = QuantizedWeight(w.codes, w.scale, 64, INT4)
    object.__setattr__(short, "scale", w.scale[:-1])  # past the check of the arguments
    with emulate(80, check=False) as gpu:
        fast.quantized_matmul(x, short)
    assert "global out of bounds" in gpu.findings.kinds()
