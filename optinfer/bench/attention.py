"""Attention beside its peers: every SDPA backend, FlexAttention, the naive formula and our kernels.

Sizes follow the FlashAttention-3 paper (arXiv 2407.08608, section 4.1): 16k tokens in all, hidden size 2048, head
dimensions 64 and 128, causal and not; then one query per sequence over a long context with grouped heads (decoding).
On a CPU the sizes are small and interpreted kernels are checked, not timed.
"""

import functools
import statistics
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optinfer import hardware
from optinfer.attention import attention_flops, attention_reference, flash_attention
from optinfer.attention.dispatch import KERNELS, Backend, Problem, obstacle
from optinfer.bench.rows import AttentionRow
from optinfer.bench.timing import in_turns

SDPA = {
    "sdpa math": SDPBackend.MATH,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
CHECKED_ELEMENTS = 2**26  # scores per head group that a float64 reference may hold


def run(quick: bool = False) -> list[AttentionRow]:
    """Rows with peer, sizes, median seconds, tflops, fraction of the matmul rate, peak extra bytes and error.

    `error` is the largest difference from float64; `error_ratio` divides it by the error of the formula in the same
    dtype. Both are None where a float64 reference would not fit. A peer that cannot run has a `skipped` reason.
    """
    device = hardware.default_device()
    dtype = hardware.default_dtype(device)
    rows: list[AttentionRow] = []
    for sizes in problems(device, quick):
        rows += compare(sizes, device, dtype, repeats=5 if quick else 20)
    return rows + memory_rows(device, dtype, quick)


def brief(rows: list[AttentionRow]) -> list[dict[str, Any]]:
    """The timed and checked rows as a reader wants them: the case in words, milliseconds, error, memory."""
    shown = []
    for row in rows:
        if row.error_ratio is None and row.seconds is None:
            continue  # a peer that this machine does not have, or memory without a time
        heads = f"{row.batch} x {row.heads} heads" + (f" on {row.kv_heads}" if row.kv_heads != row.heads else "")
        lengths = f"{row.q_len:,} tokens" if row.q_len == row.kv_len else f"1 token over {row.kv_len:,}"
        shown.append(
            {
                "case": f"{heads}, {lengths}, dim {row.head_dim}" + (", causal" if row.causal else ""),
                "attention": row.peer,
                "ms": f"{1e3 * row.seconds:.2f}" if row.seconds else row.skipped or "",
                "error / formula's error": f"{row.error_ratio:.2f}" if row.error_ratio else "",
                "MB beyond inputs": f"{row.peak_bytes / 1e6:.2f}" if row.peak_bytes is not None else "",
            }
        )
    return shown


def memory_rows(device: torch.device, dtype: torch.dtype, quick: bool) -> list[AttentionRow]:
    """Memory beyond inputs for one head of 64, as the text gets longer: the whole matrix of scores, or a tile of it."""
    lengths = (1024, 2048) if quick else (1024, 2048, 4096, 8192, 16384)
    tiled: Backend = "auto" if device.type == "cuda" else "online"
    formulas: dict[str, Callable] = {
        "naive": lambda q, k, v: attention_reference(q, k, v, True),
        f"optinfer {tiled}": lambda q, k, v: flash_attention(q, k, v, True, backend=tiled),
    }
    rows = []
    for n in lengths:
        q, k, v = (torch.randn(1, 1, n, 64, device=device, dtype=dtype) for _ in range(3))
        for name, attend in formulas.items():
            peak = peak_extra_bytes(functools.partial(attend, q, k, v))
            rows.append(AttentionRow(peer=name, what="memory", **problem(1, 1, 1, n, n, 64, True), peak_bytes=peak))
    return rows


def problems(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    lengths: tuple[int, ...]
    if device.type != "cuda":
        lengths = (256,) if quick else (256, 512, 1024)
        shapes = [(1, 4, 4, n, n, d, c) for d in (64, 128) for c in (False, True) for n in lengths]
        shapes.append((2, 8, 2, 1, 1024, 64, False))
    else:
        lengths = (1024, 4096) if quick else (512, 1024, 2048, 4096, 8192, 16384)
        shapes = [
            (16384 // n, 2048 // d, 2048 // d, n, n, d, c) for d in (64, 128) for c in (False, True) for n in lengths
        ]
        shapes += [(b, 32, 8, 1, n, 128, False) for b in (1, 16) for n in (4096, 32768)]
    return [problem(*shape) for shape in shapes]


def problem(*shape: int) -> dict[str, Any]:
    """A shape under the names that its rows have."""
    return dict(zip(("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "causal"), shape, strict=True))


def peers(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """Name -> function of (q, k, v)."""
    causal, gqa = sizes["causal"], sizes["heads"] != sizes["kv_heads"]

    def sdpa(backend: SDPBackend) -> Callable:
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        return attend

    found: dict[str, Callable] = {"naive": lambda q, k, v: attention_reference(q, k, v, causal)}
    found |= {name: sdpa(backend) for name, backend in SDPA.items()}
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        flex = torch.compile(flex_attention)
        lengths = (sizes["q_len"], sizes["kv_len"])
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, *lengths, device=device) if causal else None
        found["flex"] = lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=gqa)
    problem = Problem(
        device.type, hardware.capability(device), dtype, sizes["head_dim"], sizes["q_len"], sizes["kv_len"], causal
    )
    for name in KERNELS:
        if obstacle(name, problem) is None:
            found[f"optinfer {name}"] = lambda q, k, v, name=name: flash_attention(q, k, v, causal, backend=name)
    return found


def compare(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype, repeats: int) -> list[AttentionRow]:
    """One row per peer on one problem. Each is checked before any is timed; then they are timed in turns."""
    generator = torch.Generator().manual_seed(0)
    shape = (sizes["batch"], sizes["heads"], sizes["q_len"], sizes["head_dim"])
    kv_shape = (sizes["batch"], sizes["kv_heads"], sizes["kv_len"], sizes["head_dim"])
    q, k, v = (torch.randn(s, generator=generator, device="cpu").to(device, dtype) for s in (shape, kv_shape, kv_shape))
    exact = baseline = None
    if sizes["heads"] * sizes["q_len"] * sizes["kv_len"] <= CHECKED_ELEMENTS:
        exact = attention_reference(q[:1].double(), k[:1].double(), v[:1].double(), sizes["causal"])
        baseline = (attention_reference(q[:1], k[:1], v[:1], sizes["causal"]).double() - exact).abs().max().item()

    interpreted = device.type != "cuda"
    rows: list[AttentionRow] = []
    running: dict[str, Callable[[], Any]] = {}
    for name, attend in peers(sizes, device, dtype).items():
        row = AttentionRow(peer=name, **sizes, dtype=str(dtype).removeprefix("torch."))
        rows.append(row)
        try:
            out = attend(q, k, v)
        except Exception as error:  # another library's, of any kind; ours are checked elsewhere
            row.skipped = str(error).strip().split("\n")[0][:80]
            continue
        if exact is not None:
            row.error = (out[:1].double() - exact).abs().max().item()
            row.error_ratio = row.error / baseline if baseline else None
        if interpreted and name.startswith("optinfer"):
            row.skipped = "interpreted: checked, not timed"
            continue
        running[name] = functools.partial(attend, q, k, v)
        row.peak_bytes = peak_extra_bytes(running[name])
    samples = in_turns(running, device, repeats)
    flops = attention_flops(*(sizes[n] for n in ("batch", "heads", "q_len", "kv_len", "head_dim", "causal")))
    ceiling = hardware.this_machine().matmul_flops
    for row in rows:
        if row.peer in samples:
            row.samples = samples[row.peer]
            row.seconds = statistics.median(row.samples)
            row.tflops = flops / row.seconds / 1e12
            row.of_matmul = flops / row.seconds / ceiling
    return rows


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """The most memory, in bytes, that torch had allocated during the call beyond what it had before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _LiveBytes() as seen:
        call()
    return seen.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the memory of every tensor made inside, for devices whose allocator keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._owners: dict[int, int] = {}  # storage address -> tensors alive on it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor, known)
        return out

    def _follow(self, tensor: torch.Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._owners:
            if address in known:
                return  # a view of what was there before
            self._owners[address] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._owners[address] += 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._owners[address] -= 1
        if not self._owners[address]:
            del self._owners[address]
            self.now -= size
