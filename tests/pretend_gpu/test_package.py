"""What the package does on a GPU, as far as the pretend one can tell: nothing forgotten on the CPU, no hidden waits."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optinfer.quantization.checkpoints.words import pack_int32, unpack_int32
from optinfer.quantization.formats import products
from optinfer.quantization.formats.codebook import nest
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.schemes import SCHEMES
from optinfer.serving import Engine, SamplingParams
from optinfer.speculative.rejection import rejection_sample
from optinfer.speculative.training.distillation import frequent_tokens


@pytest.mark.parametrize("deterministic", [False, True])
def test_rejection_of_a_batch_never_waits(deterministic, log):
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
    target = torch.full((2, 4, 5), 0.2, device="cuda")
    emitted = rejection_sample(tokens, None if deterministic else target[:, :3], target)
    assert not log.waits
    assert emitted.device.type == "cuda" and emitted.shape == (2, 4)
    assert deterministic or (emitted.cpu()[:, :3] == 0).all()  # q is p: all accepted


def test_double_quantization_restores_without_a_wait(log):
    absmax = torch.rand(600, generator=torch.Generator().manual_seed(0))
    nested = nest(absmax.to("cuda"))
    nested.restore()
    log.waits.clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        restored = nested.restore()
    assert not log.waits
    assert torch.equal(restored.cpu(), nest(absmax).restore())


@pytest.mark.parametrize(
    "tokens, dtype", [(1, torch.float16), (4, torch.float16), (5, torch.float16), (1, torch.bfloat16)]
)
def test_a_few_tokens_go_to_the_fused_kernel(tokens, dtype, monkeypatch):
    """Where Triton finds no tensor cores (Turing): up to four, in fp16."""
    layer = QuantizedLinear.from_quantized(SCHEMES["nf4"].quantize(torch.randn(64, 128).to("cuda", dtype)))
    x, calls, kernel = torch.randn(tokens, 128).to("cuda", dtype), [], products.kernel_matmul
    monkeypatch.setattr(products, "kernel_matmul", lambda *a: calls.append(a) or kernel(*a))
    y = layer(x)
    wanted = x.double().cpu() @ layer.quantized.dequantize(torch.float64).cpu().T
    assert ((y.double().cpu() - wanted).norm() / wanted.norm()) < 1e-2
    assert bool(calls) == (torch.cuda.get_device_capability() >= (8, 0) or (tokens <= 4 and dtype == torch.float16))


def test_packing_stays_on_the_gpu():
    codes = torch.arange(24, dtype=torch.uint8).view(2, 12) % 8
    there = unpack_int32(pack_int32(codes.to("cuda"), 3), 3, 12)
    assert there.is_cuda and torch.equal(there.cpu(), codes)


def test_tokens_are_counted_where_they_are():
    shard = {
        "tokens": torch.tensor([[5, 5, 3]]).to("cuda"),
        "answer": torch.ones(1, 3, dtype=torch.bool).to("cuda"),
    }
    assert frequent_tokens([shard], 2, 8).cpu().tolist() == [3, 5]


def test_an_engine_with_every_attention():
    """By itself it takes CUDA graphs where the attention lets it; asked for with another, they are refused by name."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=64, **sizes)).eval().to("cuda")
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    texts = []
    for backend in ("auto", "triton", "sdpa", "reference"):
        engine = Engine(model, num_blocks=16, block_size=4, attention_backend=backend)
        assert (engine.runner.graphs is not None) == (backend in ("auto", "triton"))
        texts.append([done.token_ids for done in engine.generate([[5, 6, 7], [8]], params)])
    assert all(text == texts[0] for text in texts)
    for backend in ("sdpa", "reference"):
        with pytest.raises(ValueError, match="needs attention_backend 'auto' or 'triton'"):
            Engine(model, num_blocks=16, attention_backend=backend, cuda_graphs=True)
