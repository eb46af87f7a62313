"""Products of the C++ kernels against float64, for every format, odd shapes, few tokens and many."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optinfer import cpu
from optinfer.cpu import structs
from optinfer.quantization import SCHEMES, quantize_4bit, quantize_linear

pytestmark = pytest.mark.skipif(cpu.kernels() is None, reason="no C++ compiler here")
PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def assert_within_rounding(out, x, q):
    """Activations are rounded to multiples of 1/32767 of the largest of 1,024 columns, a codebook's values to 1/8191.

    The sum of these roundings, each at its worst, bounds the error; float32 sums add a little. With x in bfloat16 the
    weights and the result may be rounded to bfloat16 too: 8 bits, half a step off at most.
    """
    half_a_step = 2**-8 if x.dtype == torch.bfloat16 else 0
    w, x = q.dequantize(torch.float32).double(), x.double()
    step = torch.stack([part.abs().amax(1) for part in x.split(1024, 1)], 1) / 32767
    bound = sum(step[:, i, None] / 2 * part.abs().sum(1) for i, part in enumerate(w.split(1024, 1)))
    if q.scheme in ("nf4", "fp4"):
        absmax = q.absmax.double().view(len(w), -1).repeat_interleave(q.group_size, 1)
        bound = bound + x.abs() @ absmax.t() / 8191 / 2
    bound = bound + 3e-6 * (x.abs() @ (w.abs() + w.abs().amax()).t())  # zero points are taken off at the end
    bound = bound + half_a_step * (x.abs() @ w.abs().t() + out.double().abs()) * (1 + half_a_step)
    assert bool(((out.double() - x @ w.t()).abs() <= bound).all())


def product(x, weight, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return cpu.linear(x, weight)
    finally:
        torch.set_num_threads(before)


shapes = {"rows": st.integers(1, 70), "columns": st.integers(1, 700), "tokens": st.integers(1, 40)}
of_x = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=60, deadline=None)
@given(
    **shapes, dtype=st.sampled_from(list(PLAIN)), of_x=of_x, with_bias=st.booleans(), threads=st.sampled_from([1, 2])
)
def test_plain_weights(rows, columns, tokens, dtype, of_x, with_bias, threads):
    weight, x = torch.randn(rows, columns).to(PLAIN[dtype]), torch.randn(tokens, columns).to(of_x)
    bias = torch.randn(rows).to(PLAIN[dtype]) if with_bias else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    out = product(x, cpu.CpuWeight.plain(weight, bias), threads)
    torch.testing.assert_close(
        out.double(), exact, atol=2e-5 * columns**0.5, rtol=2**-8 if of_x == torch.bfloat16 else 1e-5
    )


@settings(max_examples=80, deadline=None)
@given(
    **shapes,
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([32, 64, 96, 128, 512, "channel", "tensor"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    of_x=of_x,
)
def test_linear_codes(rows, columns, tokens, bits, symmetric, group, dtype, of_x):
    if group == "tensor" and not symmetric:
        symmetric = True  # one zero point for all is a layout that the kernels leave to others
    q = quantize_linear(torch.randn(rows, columns).to(dtype), bits, group, symmetric)
    weight = q.cpu_weight()
    assert weight is not None
    x = torch.randn(tokens, columns).to(of_x)
    assert_within_rounding(product(x, weight, 1), x, q)


@settings(max_examples=60, deadline=None)
@given(**shapes, dtype=st.sampled_from([torch.bfloat16, torch.float32]), of_x=of_x)
def test_codes_with_a_minimum(rows, columns, tokens, dtype, of_x):
    q = SCHEMES["q4_1"].quantize((torch.randn(rows, columns) + torch.randn(rows, 1)).to(dtype))
    x = torch.randn(tokens, columns).to(of_x)
    assert_within_rounding(product(x, q.cpu_weight(), 1), x, q)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 9),
    tokens=st.integers(1, 40),
    kind=st.sampled_from(["nf4", "fp4"]),
    group_size=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
    of_x=of_x,
)
def test_codebooks(rows, blocks, tokens, kind, group_size, double_quant, of_x):
    columns = blocks * group_size
    q = quantize_4bit(torch.randn(rows, columns), kind, group_size, double_quant)
    x = torch.randn(tokens, columns).to(of_x)
    assert_within_rounding(product(x, q.cpu_weight(), 1), x, q)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_an_outlier_costs_its_neighbours_little(tokens):
    """16 bits hold a number a thousand times larger, and the others to a few parts in a hundred."""
    q = quantize_linear(torch.randn(50, 576), 8, "channel", True)
    x = torch.randn(tokens, 576)
    x[:, 7] = 3000
    out, w = cpu.linear(x, q.cpu_weight()), q.dequantize(torch.float32).double()
    assert_within_rounding(out, x, q)
    others = x.double()
    others[:, 7] = 0
    error = out.double() - 3000 * w[:, 7] - others @ w.t()
    assert error.norm() / (others @ w.t()).norm() < 0.05


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("dtype", PLAIN.values(), ids=str)
def test_infinities_and_nans_stay_where_they_are(tokens, dtype):
    """A row's neighbours do not see what it holds, also where its last columns are no whole unit."""
    weight, x = torch.randn(9, 21).to(dtype), torch.randn(tokens, 21)
    weight[4, 20], weight[6, 3] = torch.inf, torch.nan
    out = cpu.linear(x, cpu.CpuWeight.plain(weight))
    assert out[:, 4].isinf().all() and out[:, 6].isnan().all()
    assert out[:, [0, 1, 2, 3, 5, 7, 8]].isfinite().all()


def test_weights_are_read_where_they_lie():
    weight = torch.randn(40, 96).bfloat16()
    x, pointers = torch.randn(2, 96), cpu.CpuWeight.plain(weight[::2, 32:])
    before = cpu.linear(x[:, 32:], pointers)
    torch.testing.assert_close(before, x[:, 32:] @ weight[::2, 32:].float().t(), atol=1e-4, rtol=1e-4)
    weight.mul_(2)
    assert torch.equal(cpu.linear(x[:, 32:], pointers), 2 * before)


def test_a_wrong_product_would_be_noticed():
    q = quantize_linear(torch.randn(33, 100), 4, 32, False)
    x = torch.randn(2, 100)
    weight = q.cpu_weight()
    assert_within_rounding(cpu.linear(x, weight), x, q)
    weight.struct.group = 64  # every other scale
    with pytest.raises(AssertionError):
        assert_within_rounding(cpu.linear(x, weight), x, q)


def test_what_the_kernels_do_not_read():
    plain = cpu.CpuWeight.plain
    assert plain(torch.randn(3, 4).double()) is None
    assert plain(torch.randn(4, 3).t()) is None  # rows with gaps
    assert plain(torch.randn(3, 4, device="meta")) is None
    assert quantize_linear(torch.randn(8, 96), 3, 32, True).cpu_weight() is None
    assert quantize_linear(torch.randn(8, 96), 4, 24, True).cpu_weight() is None
    assert quantize_4bit(torch.randn(8, 96), "nf4", 64).cpu_weight() is None  # blocks go on in the next row


def test_shapes_are_checked_before_pointers_are_used():
    packed, scale = torch.zeros(8, 48, dtype=torch.uint8), torch.ones(8, 3)
    with pytest.raises(ValueError, match=r"packed must have the shape \(8, 32\)"):
        cpu.CpuWeight.linear_codes(packed, 64, 4, 32, scale)
    with pytest.raises(ValueError, match=r"scale must have the shape \(8, 3\)"):
        cpu.CpuWeight.linear_codes(packed, 96, 4, 32, scale[:, :2])
    with pytest.raises(ValueError, match="bias must have the shape"):
        cpu.CpuWeight.plain(torch.zeros(8, 48), torch.zeros(7))
    with pytest.raises(ValueError, match="x has 47 features, the weight takes 48"):
        cpu.linear(torch.zeros(1, 47), cpu.CpuWeight.plain(torch.zeros(8, 48)))


def test_structs_are_those_of_the_library():
    import ctypes

    kernels = cpu.kernels()
    sizes = (ctypes.c_int64 * len(structs.ALL))()
    kernels._sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(struct) for struct in structs.ALL]


GUARDED = """
import ctypes, mmap, sys, torch
from optinfer import cpu
from optinfer.quantization import SCHEMES, quantize_linear

libc, PAGE, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

def guarded(tensor):
    \"\"\"The same numbers at the very end of a page, before one that may not be read.\"\"\"
    size = tensor.nbytes
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(begin + pages * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    kept.append(memory)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * PAGE - size).view(tensor.shape)
    return copy.copy_(tensor)

def weight(scheme, rows, columns):
    w = torch.randn(rows, columns)
    if scheme in ("float32", "bfloat16", "float16"):
        return cpu.CpuWeight.plain(guarded(w.to(getattr(torch, scheme))))
    q = SCHEMES[scheme].quantize(w)
    q.__dict__.update({name: guarded(t) for name, t in vars(q).items() if isinstance(t, torch.Tensor)})
    return q.cpu_weight()

for rows in (1, 3, 18, 37):
    for columns in (64, 192, 131 if "float" in sys.argv[1] else 128):
        for tokens in (1, 2, 3, 5, 20):
            for dtype in (torch.float32, torch.bfloat16):
                out = cpu.linear(torch.randn(tokens, columns).to(dtype), weight(sys.argv[1], rows, columns))
                assert out.isfinite().all()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pages are protected otherwise there")
@pytest.mark.parametrize("scheme", [*PLAIN, "int8", "int4", "nf4", "q4_1"])
def test_nothing_beyond_a_weight_is_read(scheme):
    done = subprocess.run([sys.executable, "-c", GUARDED, scheme], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
