"""The forward passes without modules (in torch, and as one call of the C++ kernels) compute what the modules compute."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
import transformers

from optinfer import cpu
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.schemes import SCHEMES, resolve_scheme
from optinfer.serving import Engine, SamplingParams
from optinfer.serving.compiled_decoder import CompiledDecoder
from optinfer.serving.lean_decoder import LeanDecoder, Product, is_lean
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.paged_batch import Chunk
from tests.devices import ON_GPU, cpu_only

SHAPE = {
    "vocab_size": 211, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "mistral": ("MistralConfig", {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
}  # fmt: skip
WAYS = {"compiled": "auto", "torch": "sdpa"}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def needs_kernels(request):
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("way") == "compiled" and (ON_GPU or cpu.kernels() is None):
        pytest.skip("no C++ compiler here, or a GPU")


def small(build_model, family, **changes):
    name, own = FAMILIES[family]
    return build_model(getattr(transformers, name)(**{**SHAPE, **own, **changes}), seed=4)


def logits(model, lengths, way=None, **options):
    """All logits of prompts of these lengths, packed, in two steps; by the model's modules without a way."""
    runner = ModelRunner(model, 40, 8, way is not None, attention_backend=WAYS.get(way, "sdpa"), **options)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    prompts = [torch.randint(3, 211, (n,), generator=generator).tolist() for n in lengths]
    tables = [[5 * i + j for j in range(5)] for i in range(len(prompts))]
    out = []
    for half in (0, 1):
        chunks = []
        for prompt, table in zip(prompts, tables):
            middle = len(prompt) // 2
            part, start = (prompt[middle:], middle) if half else (prompt[:middle], 0)
            chunks.append(Chunk(part, start, table))
        out.append(runner.run(chunks, [len(c.token_ids) for c in chunks]))
    assert type(runner.decoder) is {None: type(None), "compiled": CompiledDecoder, "torch": LeanDecoder}[way]
    return torch.cat(out).float()


@ways
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32(build_model, family, way):
    model = small(build_model, family)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms' weights and biases that matter
            parameter.data += torch.randn_like(parameter) * 0.3
    expected = logits(model, (2, 9, 33))
    torch.testing.assert_close(logits(model, (2, 9, 33), way), expected, atol=2e-3, rtol=1e-4)


@ways
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_no_farther_from_fp32_than_the_modules_are(build_model, family, way):
    exact = small(build_model, family)
    for parameter in exact.parameters():
        parameter.data = (parameter.data * (0.2 if parameter.dim() > 1 else 1)).bfloat16().float()
    rounded = copy.deepcopy(exact).bfloat16()
    truth = logits(exact, (2, 9, 33))
    ours, theirs = ((logits(rounded, (2, 9, 33), w) - truth).norm() / truth.norm() for w in (way, None))
    assert 0 < ours < 1.2 * theirs < 0.2


@cpu_only
@pytest.mark.parametrize(
    "scheme, options", [("int8", {}), ("int4", {"symmetric": False}), ("nf4", {"double_quant": True})]
)
def test_quantized_weights_compiled(build_model, scheme, options):
    """As far from the restored weights' own result as bf16 modules are."""
    import optinfer

    model = small(build_model, "llama", hidden_size=128, head_dim=16, num_attention_heads=8, intermediate_size=192)
    for parameter in model.parameters():
        parameter.data = (parameter.data * (0.2 if parameter.dim() > 1 else 1)).bfloat16()
    optinfer.quantize(model, scheme, progress=False, **options)
    restored = copy.deepcopy(model)
    for parent in list(restored.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(parent, name, child.dequantize())
    for parameter in restored.parameters():
        parameter.data = parameter.data.float()
    truth = logits(restored, (2, 9, 33))
    ours, theirs = (
        (logits(m, (2, 9, 33), w) - truth).norm() / truth.norm() for m, w in ((model, "compiled"), (model, None))
    )
    assert 0 < ours < 1.2 * theirs < 0.2


@ways
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_head(build_model, way, scheme):
    """In any scheme, however far it is from the model's own head, which stays as it is."""
    model = small(build_model, "llama", hidden_size=128, num_attention_heads=8, num_key_value_heads=4)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    before = model.lm_head.weight.clone()
    runner = ModelRunner(model, 40, 8, head=scheme, attention_backend=WAYS[way])
    runner.keep_hidden = True
    out = runner.run([Chunk(list(range(3, 24)), 0, [0, 1, 2])], [21]).float()
    head = QuantizedLinear.from_linear(model.lm_head, resolve_scheme(scheme))
    expected = runner.hidden[0].float() @ head.dequantize().weight.float().T
    assert (out - expected).norm() / expected.norm() < (0.03 if head.scheme.format.LOOKS_AT_INPUTS else 0.01)
    assert (out - expected.roll(1, 0)).norm() / expected.norm() > 0.2
    assert torch.equal(model.lm_head.weight, before) and type(model.lm_head) is torch.nn.Linear


def test_what_is_not_a_plain_layer_is_called(build_model):
    import optinfer

    model = small(build_model, "llama", hidden_size=192)
    optinfer.quantize(model, "int8", progress=False)
    decoder = LeanDecoder(model, model.lm_head)
    assert decoder.layers[0].qkv.merged is None and len(decoder.layers[0].qkv.layers) == 3
    assert decoder.head.merged is not None and type(decoder.head) is Product
    expected = logits(model, (2, 9))
    torch.testing.assert_close(logits(model, (2, 9), "torch"), expected, atol=2e-3, rtol=1e-3)


@ways
def test_what_happens_to_the_weights_is_seen(build_model, way):
    """In place, elsewhere, replaced, or whole layers exchanged: a step computes with what the model holds by then."""
    model = small(build_model, "llama")
    runner = ModelRunner(model, 8, 8, attention_backend=WAYS[way])
    chunk = [Chunk([5, 6, 7], 0, [0])]

    def agrees():
        with torch.no_grad():
            expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1:]
        if results:
            assert not runner.is_current()
            runner.renew()
        assert runner.is_current()
        torch.testing.assert_close(runner.run(chunk, [1]), expected, atol=2e-3, rtol=1e-4)
        return expected

    results = []
    results.append(agrees())
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.k_proj.weight.mul_(1.5)
        results.append(agrees())
        attention.q_proj.weight.data = attention.q_proj.weight.data * 0.5
        results.append(agrees())
        model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()}, assign=True)
        model.tie_weights()
        results.append(agrees())
        attention.v_proj = torch.nn.Linear(96, 32, bias=False)
        results.append(agrees())
    assert all((a - b).norm() / a.norm() > 0.01 for a, b in itertools.pairwise(results))


def test_nothing_keeps_a_model_alive(build_model):
    model = small(build_model, "llama")
    Engine(model, num_blocks=8).generate([[5, 6]], SamplingParams(max_tokens=2))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_models_it_does_not_know(build_model, model):
    assert not is_lean(small(build_model, "llama", hidden_act="gelu"))
    gemma = build_model(transformers.GemmaConfig(**SHAPE))
    assert not is_lean(gemma)
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: seen.append(1))
    try:
        assert not is_lean(model)
        Engine(model, num_blocks=8).generate([[5, 6]], SamplingParams(max_tokens=2))
        assert seen
    finally:
        handle.remove()
    model.train()
    try:
        assert not is_lean(model)
    finally:
        model.eval()
