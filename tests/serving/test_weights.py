"""The model stays its owner's: weights and adapters that change under an engine, and logits that are no numbers."""

import copy
import os

import pytest
import torch

from optinfer.serving import Engine, SamplingParams
from optinfer.serving.watch import Watch

PROMPTS = [list(range(3, 25)), [7, 8, 9]]
PARAMS = SamplingParams(max_tokens=8)
WAYS = {"compiled": {"attention_backend": "auto"}, "torch": {"attention_backend": "sdpa"}, "modules": {"fuse": False}}


@pytest.fixture
def own(model):
    return copy.deepcopy(model)


def scale(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(-1.5)


def replace_tensor(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data * -0.5


def assign(model):
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    state = {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_layer(model):
    torch.manual_seed(6)
    layer = torch.nn.Linear(48, 16, bias=False)
    torch.nn.init.normal_(layer.weight, std=0.25)
    model.model.layers[1].self_attn.v_proj = layer


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    loss = model(input_ids=torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    optimizer.step()
    optimizer.zero_grad()


def quantize(model):
    import optinfer

    optinfer.quantize(model, "int8", progress=False)


class Adapter(torch.nn.Module):
    """As PEFT wraps a layer: switched by attributes, no weight of the model changes."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer
        self.delta = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        torch.nn.init.normal_(self.delta.weight, std=0.3)
        self._active_adapter, self._disable_adapters = "default", False

    def forward(self, x):
        return self.base(x) if self._disable_adapters else self.base(x) + self.delta(x)


def adapt(model):
    torch.manual_seed(7)
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)


def to_half(model):
    model.to(torch.bfloat16)


CHANGES = [scale, replace_tensor, assign, replace_layer, train, quantize, adapt, to_half]


def texts(engine):
    return [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(own, hf_generate, way, change):
    if change is to_half and os.environ.get("PRETEND_KERNELS") == "once":
        pytest.skip("a kernel and the formula that stands in for it round differently")
    engine = Engine(own, num_blocks=30, block_size=4, **WAYS[way])
    before = texts(engine)
    change(own)
    fresh = texts(Engine(copy.deepcopy(own), num_blocks=30, block_size=4, **WAYS[way]))
    assert texts(engine) == fresh
    if change is not to_half:  # rounding in bfloat16 differs between ways
        assert fresh == [hf_generate(own, prompt, 8) for prompt in PROMPTS] != before
    assert engine.manager.num_free_blocks == 30


def test_an_adapter_switched_off_and_on(own, hf_generate):
    engine = Engine(own, num_blocks=30, block_size=4)
    plain = texts(engine)
    adapt(own)
    adapted = texts(engine)
    own.model.layers[0].self_attn.q_proj._disable_adapters = True
    assert texts(engine) == plain != adapted
    own.model.layers[0].self_attn.q_proj._disable_adapters = False
    assert texts(engine) == adapted == [hf_generate(own, prompt, 8) for prompt in PROMPTS]


def test_a_change_in_the_middle_of_a_text(own):
    """The text so far stays; from there on it is the new model's."""
    engine = Engine(own, num_blocks=30, block_size=4)
    engine.add_request(PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=True))
    for _ in range(4):
        engine.step()
    (sequence,) = engine.scheduler.running
    so_far = list(sequence.token_ids)
    scale(own)
    done = []
    while engine.has_work:
        done += engine.step()
    assert len(so_far) == len(PROMPTS[0]) + 4
    rest = Engine(own, num_blocks=30).generate([so_far], SamplingParams(max_tokens=4, ignore_eos=True))
    assert done[0].token_ids == so_far[len(PROMPTS[0]) :] + rest[0].token_ids


def test_a_quantized_head_is_renewed(own):
    own = own.to(torch.bfloat16)
    engine = Engine(own, num_blocks=30, head="int8")
    texts(engine)
    with torch.no_grad():
        own.lm_head.weight.copy_(own.lm_head.weight.roll(1, 0))
    assert texts(engine) == texts(Engine(own, num_blocks=30, head="int8"))


def test_hooks_that_only_look_change_nothing(own):
    """A model that was asked for hidden states keeps transformers' hooks for good."""
    engine = Engine(own, num_blocks=30, block_size=4)
    before, decoder = texts(engine), engine.runner._lean
    own(torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in own.modules())
    assert texts(engine) == before and engine.runner.is_current() and engine.runner._lean == decoder
    assert Engine(own, num_blocks=30).runner._lean


def test_a_change_that_cannot_be_served_is_refused(own, reference):
    engine = Engine(own, num_blocks=30, block_size=4)
    request = engine.add_request(PROMPTS[1], PARAMS)
    engine.step()
    attention = own.model.layers[0].self_attn
    usual, attention.forward = attention.forward, lambda *a, **k: (k["hidden_states"] * 0, None)
    own.model.layers[0].mlp.register_forward_hook(lambda *a: None)  # seen, and with it the rest
    with pytest.raises(ValueError, match="attention"):
        engine.step()
    attention.forward = usual
    own.model.layers[0].mlp._forward_hooks.clear()
    done = []
    while engine.has_work:
        done += engine.step()
    assert [(c.request_id, c.token_ids) for c in done] == [(request, reference(PROMPTS[1], 8))]


def test_the_draft_model_too(own, model, reference):
    engine = Engine(model, num_blocks=40, block_size=4, draft=own, adaptive_drafts=False)
    assert texts(engine) == [reference(p, 8) for p in PROMPTS]
    right = engine.stats.accepted_tokens
    assert right == engine.stats.draft_tokens > 0
    assign(own)
    assert texts(engine) == [reference(p, 8) for p in PROMPTS]
    assert engine.stats.accepted_tokens < engine.stats.draft_tokens


def test_nothing_changed(own):
    watch = Watch(own)
    assert watch.same_weights() and watch.same_modules()
    own(torch.tensor([[5, 6]]))
    own.generate(torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=0)
    assert watch.same_weights() and watch.same_modules()


# ---- what the cache remembers


def test_salt_and_reset(model, reference):
    engine = Engine(model, num_blocks=30, block_size=4)

    def cached(**options):
        (done,) = engine.generate([PROMPTS[0]], PARAMS, **options)
        assert done.token_ids == reference(PROMPTS[0], 8)
        return done.metrics.cached_tokens

    assert [cached(), cached(), cached(salt="a"), cached(salt="b"), cached(salt="a"), cached()] == [0, 20, 0, 0, 20, 20]
    engine.reset_prefix_cache()
    assert cached() == 0
    engine.add_request(PROMPTS[0], PARAMS)
    engine.step()
    engine.reset_prefix_cache()  # the running one is computed again
    done = []
    while engine.has_work:
        done += engine.step()
    assert [c.token_ids for c in done] == [reference(PROMPTS[0], 8)]
    with pytest.raises(TypeError, match="salt"):
        engine.add_request(PROMPTS[0], PARAMS, salt=3)


# ---- logits that are no numbers


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_broken_logits_end_their_request_alone(model, reference, value, sampled, streamed, monkeypatch):
    engine = Engine(model, num_blocks=30, block_size=4)
    run, bad = engine.runner.run, 50

    def broken(chunks, num_logits, copies=()):
        logits, row = run(chunks, num_logits, copies).clone(), 0
        for chunk, count in zip(chunks, num_logits):
            if bad in chunk.token_ids or chunk.start > 20:
                logits[row, 17] = value
            row += count
        return logits

    monkeypatch.setattr(engine.runner, "run", broken)
    options = {"n": 3, "temperature": 1.0} if sampled else {}
    other = engine.add_request(PROMPTS[1], PARAMS)
    params = SamplingParams(max_tokens=8, ignore_eos=True, **options)
    if streamed:
        last = [delta for delta in engine.stream([50, 51], params) if delta.finish_reason]
    else:
        last = engine.generate([[50, 51]], params)
    assert [end.finish_reason for end in last] == ["error"] * params.n and not any(end.token_ids for end in last)
    assert all("not finite" in end.error for end in last)
    (late,) = engine.generate([list(range(3, 23))], SamplingParams(max_tokens=8, ignore_eos=True))
    assert (late.finish_reason, len(late.token_ids)) == ("error", 2)
    done = engine.step()
    while engine.has_work:
        done += engine.step()
    assert [(c.request_id, c.token_ids, c.error) for c in done] == [(other, reference(PROMPTS[1], 8), None)]
    assert engine.stats.failed == params.n + 1 and engine.manager.num_free_blocks == 30
