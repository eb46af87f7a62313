"""Matrix products, attention and a decoder's step for processors, in C++ that is compiled on the reader's machine.

The kernels are an extra. Without a C++ compiler `kernels()` returns None, and every caller has the same formula in torch.

What is in the room, in reading order:

* `vectors.hpp`, `numbers.hpp`: registers of 32 or 64 bytes, and 16-bit numbers in memory;
* `formats.hpp`: how columns of each weight format become numbers;
* `products.hpp`: ``x @ W.T``, read from where the model keeps W;
* `attention.hpp`: the online softmax over pages;
* `decoder.hpp`: one step of a Llama-like decoder made of these;
* `library.cpp`: what Python calls; `library.py` compiles and loads it, `structs.py` says what the structs look like;
* `weights.py`, `layers.py`: a weight as the kernels see it, and a linear layer that uses it.
"""

from optinfer.cpu.large_pages import move_to_large_pages
from optinfer.cpu.layers import Linear, is_plain, linear, product, remembered, use_cpu_linear
from optinfer.cpu.library import CpuKernels, kernels
from optinfer.cpu.structs import Pages, Scoring, Sequences
from optinfer.cpu.weights import CpuWeight

__all__ = [
    "CpuKernels",
    "CpuWeight",
    "Linear",
    "Pages",
    "Scoring",
    "Sequences",
    "is_plain",
    "kernels",
    "linear",
    "move_to_large_pages",
    "product",
    "remembered",
    "use_cpu_linear",
]
