"""A `cpu.Linear` is an `nn.Linear` in everything but speed."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from optinfer import cpu

pytestmark = pytest.mark.skipif(cpu.kernels() is None, reason="no C++ compiler here")


def layer(dtype=torch.bfloat16, bias=True):
    torch.manual_seed(0)
    return cpu.use_cpu_linear(nn.Linear(40, 24, bias=bias).to(dtype))


def exact(linear, x):
    return nn.functional.linear(
        x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 5, 40), (2, 30, 40), (0, 40)])
def test_one_rounding_from_the_exact_result(dtype, bias, shape):
    linear, x = layer(dtype, bias), torch.randn(shape).to(dtype)
    with torch.no_grad():
        out = linear(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact(linear, x), atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_gradients():
    linear, x = layer(), torch.randn(3, 7, 40).bfloat16().requires_grad_()
    reference, y = copy.deepcopy(linear).double(), x.detach().double().requires_grad_()
    upstream = torch.randn(3, 7, 24).bfloat16()
    linear(x).backward(upstream)
    nn.functional.linear(y, reference.weight, reference.bias).backward(upstream.double())
    for ours, theirs in (
        (x.grad, y.grad),
        (linear.weight.grad, reference.weight.grad),
        (linear.bias.grad, reference.bias.grad),
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, atol=1e-3, rtol=0.01)
    linear.weight.requires_grad_(False)
    linear(x).sum().backward()
    assert linear.weight.grad is not None  # the old one: nothing was added
    torch.testing.assert_close(linear.weight.grad.double(), reference.weight.grad, atol=1e-3, rtol=0.01)


def test_what_its_owner_does_to_it_is_seen():
    linear, x = layer(), torch.randn(4, 40).bfloat16()
    with torch.no_grad():
        first = linear(x)
        linear.weight.mul_(2)
        linear.bias.mul_(2)
        assert torch.equal(linear(x), 2 * first)
        linear.weight.data = linear.weight.data * 2  # elsewhere
        linear.bias.data = linear.bias.data * 2
        assert torch.equal(linear(x), 4 * first)
        state = {name: tensor * 2 for name, tensor in linear.state_dict().items()}
        linear.load_state_dict(state, assign=True)
        assert torch.equal(linear(x), 8 * first)
        for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            twin.weight.mul_(0)
            twin.bias.mul_(0)
            assert not twin(x).any() and torch.equal(linear(x), 8 * first)
        file = io.BytesIO()
        torch.save(linear, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), 8 * first)
        assert linear.float()(x.float()).dtype == torch.float32
        torch.testing.assert_close(linear.bfloat16()(x), 8 * first)


def test_moving_lets_go_of_the_old_memory():
    import gc
    import weakref

    linear, x = layer(), torch.randn(4, 40).bfloat16()
    with torch.no_grad():
        linear(x)
    storage = weakref.ref(linear.weight.untyped_storage())
    linear.float()
    gc.collect()
    assert storage() is None or storage().data_ptr() != linear.weight.untyped_storage().data_ptr()


def test_only_plain_layers_are_turned():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.Sequential(nn.Linear(4, 4)))
    names = list(model.state_dict())
    cpu.use_cpu_linear(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [cpu.Linear, Special, cpu.Linear]
    assert list(model.state_dict()) == names
    assert isinstance(model[0], nn.Linear)


def test_float32_is_torch_s_own():
    linear, x = layer(torch.float32), torch.randn(4, 40)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_large_pages_hold_the_same_values():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(700, 800) for _ in range(3)), "head": nn.Linear(700, 900)})
    model["tied"] = nn.Embedding(900, 700)
    model["tied"].weight = model["head"].weight
    parameters = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in parameters.items()}
    moved = model["layers"][0].weight.data_ptr()
    cpu.move_to_large_pages(model)
    assert all(p is parameters[name] and torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert model["tied"].weight is model["head"].weight
    import mmap

    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert model["layers"][0].weight.data_ptr() != moved and model["layers"][0].weight.data_ptr() % 64 == 0
    x = torch.randn(2, 700)
    model["layers"][1](x).sum().backward()
    assert model["layers"][1].weight.grad is not None
