"""The pretend GPU finds what a GPU would have found, and lets pass what is right."""

import pytest
import torch

from .pretence import pretend_gpu


def test_right_code_passes_without_a_wait():
    with pretend_gpu() as log:
        x = torch.arange(6.0, device="cuda").view(2, 3)
        y = (x @ x.T).softmax(-1) + torch.tensor(1.0)
        y.add_(1)
        assert x.device == y.device == torch.device("cuda", 0)
        assert not log.waits
        assert torch.allclose(y.cpu(), (x.cpu() @ x.cpu().T).softmax(-1) + 2)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x @ torch.ones(3, 2),
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(2, 3)]),
        lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.int64)),
        lambda x: torch.embedding(torch.ones(4, 2), x.long()),
        lambda x: torch.ones(2, 3).add_(x),
    ],
)
def test_a_forgotten_device_is_refused(mistake):
    with pretend_gpu(), pytest.raises(RuntimeError, match="two devices"):
        mistake(torch.ones(2, 3, device="cuda"))


def test_numpy_and_generators_of_the_cpu_are_refused():
    with pretend_gpu():
        with pytest.raises(TypeError, match="numpy"):
            torch.ones(2, device="cuda").numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device="cuda", generator=torch.Generator())


@pytest.mark.parametrize(
    ("kind", "wait"),
    [
        ("item", lambda x: x.sum().item()),
        ("item", lambda x: bool(x.any())),
        ("boolean mask", lambda x: x[x > 0]),
        ("nonzero", lambda x: x.nonzero()),
        ("to the CPU", lambda x: x.tolist()),
        ("index to the GPU", lambda x: x[torch.tensor([0, 1])]),
    ],
)
def test_waits_are_counted_and_refused_while_capturing(kind, wait):
    with pretend_gpu() as log:
        x = torch.ones(2, 3, device="cuda")
        wait(x)
        assert log.waits[kind] == log.waits.total() == 1
        with log.capture(), pytest.raises(RuntimeError, match="capturing"):
            wait(x)
