"""NF4 and FP4 against bitsandbytes, to the last bit, and against the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optinfer.quantization import codebook, dequantize_4bit, nf4_from_quantiles, quantize_4bit
from optinfer.quantization.formats.tensor import pack_bits, unpack_bits
from optinfer.quantization.number_formats import DYNAMIC_INT8, dynamic_table
from optinfer.quantization.schemes import SCHEMES, resolve_scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((64, 64), (33, 77), (7, 13), (96, 576), (1, 1), (5, 130), (129, 1025), (4096,))


def reference(packed, absmax, scheme, block, shape, dtype):
    """The definition, in plain indexing: codebook[code] * absmax, rounded once."""
    n = math.prod(shape)
    flat = packed.reshape(-1).long()
    codes = torch.stack([flat >> 4, flat & 15], 1).reshape(-1)[:n]
    return (codebook(scheme)[codes] * absmax[torch.arange(n) // block]).reshape(shape).to(dtype)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_same_bits_as_bitsandbytes(scheme, dtype, block):
    peer = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(block)
    for shape in SHAPES:
        weight = (torch.randn(shape) * 0.3).to(dtype)
        if shape == (64, 64):
            weight[3] = 0  # blocks of zeros
        q = quantize_4bit(weight, scheme, block)
        packed, state = peer.quantize_4bit(weight, blocksize=block, quant_type=scheme)
        assert torch.equal(q.packed, packed), shape
        assert torch.equal(q.absmax, state.absmax), shape
        assert torch.equal(q.dequantize(), reference(packed, state.absmax, scheme, block, shape, dtype)), shape
        # On CPUs, bitsandbytes 0.50 reads the wrong absmax where rows are no multiple of a block above 64.
        if shape[-1] % block == 0:
            theirs = peer.dequantize_4bit(packed, state).reshape(shape)
            assert torch.equal(q.dequantize(), theirs), shape


@pytest.mark.parametrize("block", (32, 64, 256))
@pytest.mark.parametrize("shape", [(576, 1536), (33, 77), (3, 5)])
def test_double_quantization_by_value(block, shape):
    peer = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(1)
    weight = torch.randn(shape)
    q = quantize_4bit(weight, "nf4", block, double_quant=True)
    packed, state = peer.quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=True)
    theirs = peer.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(q.packed, packed)
    assert torch.equal(q.scale.offset, state.offset)
    assert torch.equal(q.scale.absmax, state.state2.absmax)
    # One step of the map at most: values close to a midpoint may fall on either side of it.
    outer = q.scale.absmax.repeat_interleave(256)[: len(theirs)]
    assert ((q.absmax - theirs).abs() <= 0.0142 * outer + 1e-7).all()
    assert (q.absmax == theirs).float().mean() > 0.97 or len(theirs) < 100


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    block=st.sampled_from((32, 64, 128)),
    scheme=st.sampled_from(("nf4", "fp4")),
    seed=st.integers(0, 2**31),
)
def test_every_weight_gets_its_nearest_value(rows, columns, block, scheme, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator(torch.get_default_device()).manual_seed(seed))
    q = quantize_4bit(weight, scheme, block)
    scale = q.absmax[torch.arange(weight.numel()) // block].reshape(weight.shape).double()
    best = ((weight.double() / scale)[..., None] - codebook(scheme).double()).abs().amin(-1) * scale
    error = (weight.double() - q.dequantize().double()).abs()
    assert (error <= best + 1e-6 * scale).all()


def test_nearest_value_check_can_fail():
    weight = torch.randn(4, 64)
    q = quantize_4bit(weight)
    q.packed[0] ^= 0x30
    assert not torch.equal(q.dequantize(), quantize_4bit(weight).dequantize())


@pytest.mark.parametrize(("scheme", "block", "error"), [
    ("nf4", 32, 0.067746), ("nf4", 64, 0.072798), ("nf4", 128, 0.076831),
    ("fp4", 32, 0.088925), ("fp4", 64, 0.096543), ("fp4", 128, 0.102969),
])  # fmt: skip
def test_error_on_normal_weights_is_that_of_bitsandbytes_suite(scheme, block, error):
    """The mean absolute errors that bitsandbytes' own tests accept, randn 1024², 7 sigma."""
    torch.manual_seed(3)
    weight = torch.randn(1024, 1024)
    mean = (weight - quantize_4bit(weight, scheme, block).dequantize()).abs().mean().item()
    assert abs(mean - error) < 7e-4


def test_nf4_is_where_the_quantiles_are():
    assert abs(nf4_from_quantiles() - codebook("nf4").numpy()).max() < 2e-7


def test_rows_and_slabs_agree_with_the_whole():
    for shape in ((33, 77), (40, 64), (5, 1)):
        for double in (False, True):
            q = quantize_4bit(torch.randn(shape), double_quant=double)
            whole = q.dequantize()
            parts = torch.cat([slab for _, slab in q.slabs(size=100)])
            assert torch.equal(parts, whole)
            assert torch.equal(q.rows(1, 3), whole[1:3])


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_a_big_endian_stream(bits):
    for n in (1, 5, 8, 16, 21):
        codes = torch.randint(0, 1 << bits, (3, n), dtype=torch.uint8)
        packed = pack_bits(codes, bits)
        stream = "".join(format(c, f"0{bits}b") for c in codes[0].tolist()).ljust(8 * packed.shape[1], "0")
        assert "".join(format(b, "08b") for b in packed[0].tolist()) == stream
        assert torch.equal(unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize("bits", (0, 9))
def test_codes_of_no_byte_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
        pack_bits(torch.zeros(1, 8, dtype=torch.uint8), bits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tensor_shows_itself_in_one_line(scheme):
    shown = repr(resolve_scheme(scheme).quantize(torch.randn(32, 64)))
    assert "\n" not in shown and len(shown) < 200 and "tensor(" not in shown


def test_size():
    weight = torch.randn(576, 1536)
    assert quantize_4bit(weight).bits_per_weight == 4.5
    assert round(quantize_4bit(weight, double_quant=True).bits_per_weight, 3) == 4.127


@pytest.mark.parametrize(("arguments", "error", "words"), [
    ((torch.full((2, 64), float("nan")),), ValueError, "NaN or Inf"),
    ((torch.tensor([[1.0, float("inf")]]),), ValueError, "NaN or Inf"),
    ((torch.empty(0, 64),), ValueError, "empty"),
    ((torch.randn(2, 64), "nf4", 48), ValueError, "group_size must be one of 32, 64"),
    ((torch.randn(2, 64), "nf4", 8192), ValueError, "8192"),
    ((torch.randn(2, 64), "nf5"), ValueError, "quant_type must be one of nf4, fp4; got 'nf5'"),
    ((torch.randn(2, 64).double(),), TypeError, "float64"),
    ((torch.ones(2, 64, dtype=torch.int32),), TypeError, "int32"),
    (([1.0, 2.0],), TypeError, "list"),
])  # fmt: skip
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        quantize_4bit(*arguments)


def test_dequantize_refuses_other_schemes():
    from optinfer.quantization import quantize_int8

    with pytest.raises(TypeError, match="llm_int8"):
        dequantize_4bit(quantize_int8(torch.randn(4, 8)))


def test_the_table_of_double_quantization_is_made_once():
    """A graph cannot be captured while a constant is copied to the GPU."""
    assert dynamic_table(torch.device("cpu")) is dynamic_table(torch.device("cpu"))
    dynamic_table.cache_clear()
    with torch.inference_mode():
        assert not dynamic_table(torch.device("cpu")).is_inference()
    assert dynamic_table(torch.device("cpu")).tolist() == torch.tensor(DYNAMIC_INT8).tolist()
