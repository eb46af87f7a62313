"""The profile command, from the command line."""

import os

import pytest

pytest.importorskip("triton")
from optinfer.cli import main
from optinfer.commands.profile import KERNELS

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing compiles with TRITON_INTERPRET"),
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_profile(kernel, capsys):
    assert main(["profile", kernel, "--gpu", "h100", "--q-len", "64", "--rows", "64", "--columns", "128"]) == 0
    text = capsys.readouterr().out
    assert "sm_90" in text and f"{kernel}.py:" in text and "no findings" in text
    assert "second" not in text  # counts, never times


def test_what_a_gpu_does_not_have(capsys):
    assert main(["profile", "flash_attention_tma", "--gpu", "a100"]) == 1
    assert "optinfer:" in capsys.readouterr().err
