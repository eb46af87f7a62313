"""The pretend GPU finds what a GPU would have found, and lets pass what is right."""

import copy

import pytest
import torch

CUDA = torch.device("cuda", 0)


def kinds(log):
    found = {}
    for (kind, _), count in log.waits.items():
        found[kind] = found.get(kind, 0) + count
    return found


def test_right_code_passes_without_a_wait(log):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    y = (x @ x.T).softmax(-1) + torch.tensor(1.0)
    y.add_(1)
    assert x.device == y.device == CUDA and x.is_cuda
    assert not log.waits
    held = x.cpu()
    assert torch.allclose(y.cpu(), (held @ held.T).softmax(-1) + 2)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x @ torch.ones(3, 2),
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(2, 3)]),
        lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.int64)),
        lambda x: torch.embedding(torch.ones(4, 2), x.long()),
        lambda x: torch.ones(2, 3).add_(x),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None].cpu(), x[None]),
        lambda x: torch.nn.Linear(3, 2)(x),
    ],
)
def test_a_forgotten_device_is_refused(mistake):
    with pytest.raises(RuntimeError, match="two devices"):
        mistake(torch.ones(2, 3, device="cuda"))


def test_what_cuda_has_no_kernel_for():
    x = torch.ones(20, 24, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="not implemented"):
        x @ x.T
    with pytest.raises(RuntimeError, match="more than 16 rows"):
        torch._int_mm(x[:16].to(torch.int8), x.T.to(torch.int8))
    with pytest.raises(RuntimeError, match="device-side assert"):
        torch.embedding(torch.ones(4, 2, device="cuda"), torch.tensor([9], device="cuda"))


def test_what_only_cuda_has_a_kernel_for():
    x = torch.tensor([0, 2, 2, 1], dtype=torch.int32, device="cuda")
    assert torch.histc(x, bins=3, min=0, max=2).tolist() == [1, 1, 2]


def test_one_hot_is_made_on_the_gpu(log):
    x = torch.tensor([[0, 2]])
    there = torch.nn.functional.one_hot(x.to("cuda"), 3)
    assert log.num_waits == 1 and there.is_cuda and torch.equal(there.cpu(), torch.nn.functional.one_hot(x, 3))


def test_numpy_and_generators_of_the_cpu_are_refused():
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(2, device="cuda").numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    own = torch.Generator("cuda").manual_seed(3)
    assert torch.equal(
        torch.rand(5, device="cuda", generator=own).cpu(),
        torch.rand(5, device="cuda", generator=own.manual_seed(3)).cpu(),
    )


@pytest.mark.parametrize(
    ("kind", "wait"),
    [
        ("item", lambda x: x.sum().item()),
        ("item", lambda x: bool(x.any())),
        ("boolean mask", lambda x: x[x > 0]),
        ("nonzero", lambda x: x.nonzero()),
        ("to the CPU", lambda x: x.tolist()),
        ("to the CPU", lambda x: x.cpu()),
        ("index to the GPU", lambda x: x[torch.tensor([0, 1])]),
        ("to the GPU", lambda x: torch.tensor([1, 2], device="cuda")),
        ("synchronize", lambda x: torch.cuda.synchronize()),
    ],
)
def test_waits_are_counted_and_refused_while_capturing(kind, wait, log):
    x = torch.ones(2, 3, device="cuda")
    wait(x)
    assert kinds(log) == {kind: 1}
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="capturing"):
        wait(x)


def test_a_graph_does_it_again_on_the_same_memory():
    x, out, graph = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(x * 2 + 1)
    x.fill_(5)
    graph.replay()
    assert out.tolist() == [11.0] * 3


def test_models_move_train_and_are_copied():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    there = copy.deepcopy(model).to("cuda")
    assert all(p.is_cuda and p.is_leaf for p in there.parameters())
    x = torch.randn(5, 4)
    for one, inputs in ((model, x), (there, x.to("cuda"))):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(3):
            one(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), there.parameters()):
        torch.testing.assert_close(theirs.detach().cpu(), ours.detach(), rtol=1e-5, atol=1e-6)
    back = there.to("cpu")
    assert not any(p.is_cuda for p in back.parameters())


@pytest.mark.parametrize(
    "make", [torch.cuda.Stream, lambda: torch.Stream(device="cuda"), lambda: torch.Stream("cuda:0")]
)
def test_streams(make, log):
    stream = make()
    assert stream.device == CUDA and isinstance(stream, torch.Stream)
    with stream, torch.cuda.stream(stream):
        torch.ones(2, device="cuda").add_(1)
    stream.wait_stream(torch.cuda.current_stream())
    assert not log.waits
    stream.synchronize()
    assert kinds(log) == {"synchronize": 1}


def test_memory_is_counted():
    before = torch.cuda.memory_allocated()
    x = torch.ones(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4000
    del x
    assert torch.cuda.memory_allocated() == before
