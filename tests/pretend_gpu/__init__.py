"""A pretend GPU: the project runs as if on CUDA, on a machine without it, and device mistakes are found.

    PRETEND_GPU=h100 python -m pytest -p tests.pretend_gpu.plugin …        # or t4
    make test-gpu                                                         # the real GPU where there is one, else both of these
    PRETEND_GPU=h100 python -m tests.pretend_gpu -m optinfer.execute notebooks/05_speculative_decoding.ipynb

A `PretendTensor` says that it is on cuda:0 and holds its numbers in a CPU tensor. Every operation passes through a dispatch
mode, which makes tensors for ``device="cuda"``, refuses what CUDA refuses (tensors of two devices, products of integers, a
generator of the other device, a wait of the host while a graph is captured), counts what costs time on a GPU (waits of the
host, work done on the CPU), and computes the rest on the CPU. Triton launches are interpreted; graphs are replayed.

It cannot show: speed, compiled kernels, races between streams, how CUDA's libraries round, fragmented memory.
"""

import os
from pathlib import Path

CARDS = ("h100", "t4")
_HERE = Path(__file__).parent


def environment(card: str) -> dict[str, str]:
    """What a process needs so that the Jupyter kernels it starts pretend as well, wherever they run."""
    root = _HERE.parents[1]
    paths = f"{root}{os.pathsep}{root / 'kernels'}"
    return {"PRETEND_GPU": card, "JUPYTER_PATH": str(_HERE / "jupyter"), "PYTHONPATH": paths}
