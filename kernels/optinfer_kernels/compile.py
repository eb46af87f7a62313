"""Compile a Triton kernel for a GPU that is not here, and read what the compiler made of it.

No GPU and no driver is needed: Triton ships the assembler (`ptxas`) and the disassembler (`cuobjdump`).

    k = compile_for(90, kernel, {"x_ptr": "*fp16", "n": "i32"}, {"BLOCK": 128}, num_warps=4)
    k.registers, k.spill_bytes, k.shared_bytes, k.count("HGMMA")
"""

import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optinfer_kernels import require_triton

triton = require_triton()

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

# Compute capability -> shared memory one block may use, in bytes (CUDA programming guide, table "compute capabilities").
SHARED_MEMORY = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}

# What to look for in the machine code, and what it means.
INSTRUCTIONS = {
    "FFMA": "one multiply-add per thread, on the ordinary cores",
    "HMMA": "tensor cores, one warp at a time (mma.sync)",
    "HGMMA": "tensor cores, four warps at a time, operands straight from shared memory (wgmma, Hopper)",
    "UTCHMMA": "tensor cores with their own memory for the accumulator (tcgen05, Blackwell)",
    "LDG": "load to registers",
    "LDGSTS": "copy to shared memory in the background (cp.async)",
    "UTMALDG": "the TMA unit copies a whole tile, no registers or addresses involved",
    "MUFU.EX2": "2 to the power of x, on the special function unit",
    "LDL": "register spill: read back",
    "STL": "register spill: written out",
}


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, compiled for one architecture."""

    arch: int  # compute capability times ten: 90 for Hopper
    registers: int  # per thread
    spill_bytes: int  # per thread; 0 means everything fits in registers
    shared_bytes: int  # per block
    threads: int  # per block, warp-specialized workers included
    ptx: str
    sass: str
    ttgir: str

    def count(self, instruction: str) -> int:
        """How often a machine instruction occurs: `HGMMA` counts HGMMA.64x128x16.F32 and so on."""
        return len(re.findall(rf"\b{re.escape(instruction)}(?![A-Z0-9])", self.sass))

    @property
    def instructions(self) -> dict[str, int]:
        """Counts of the instructions of `INSTRUCTIONS` that occur."""
        counts = {name: self.count(name) for name in INSTRUCTIONS}
        return {name: count for name, count in counts.items() if count}

    def main_loop(self) -> list[str]:
        """The machine instructions of the longest innermost loop: what a program spends its time on."""
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", self.sass)
        code = [(int(address, 16), text.strip()) for address, text in lines]
        loops = []
        for address, text in code:
            target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
            if target and int(target.group(1), 16) < address:
                loops.append((int(target.group(1), 16), address))
        innermost = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
        bodies = [[text for address, text in code if a <= address <= b] for a, b in innermost]
        return max(bodies, key=len, default=[])

    @property
    def is_specialized(self) -> bool:
        """Whether warps were given different jobs, with registers moved between them."""
        return "setmaxnreg" in self.ptx


def compile_for(
    arch: int,
    kernel: "JITFunction",
    signature: dict[str, str],
    constants: Mapping[str, object],
    *,
    aligned: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> CompiledKernel:
    """Compile `kernel` for compute capability `arch` (75, 80, 86, 89, 90, 100, 120).

    `signature` gives the type of every run-time argument: "*fp16" (a pointer), "i32", "fp32",
    "tensordesc<fp16[1, 1, 128, 64]>". `constants` gives every tl.constexpr. Pointers are taken to be 16-byte aligned,
    and so are the integers named in `aligned` taken to be multiples of 16: what Triton's launcher would find out from
    the arguments themselves; without it loads are not vectorized.
    """
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("cannot compile while TRITON_INTERPRET is set: unset it and start Python again")
    names = kernel.arg_names
    if missing := [name for name in names if name not in signature and name not in constants]:
        raise ValueError(f"{kernel.__name__}: no type or value for {', '.join(missing)}")
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    multiples_of_16 = [name for name in names if types[name].startswith("*") or name in aligned]
    source = ASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in multiples_of_16},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _disassemble(binary.asm["cubin"])
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", binary.asm["ptx"])
    return CompiledKernel(
        arch=arch,
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=binary.metadata.shared,
        threads=int(threads.group(1)) if threads else 32 * num_warps,
        ptx=binary.asm["ptx"],
        sass=sass,
        ttgir=binary.asm["ttgir"],
    )


def compile_in_parallel(build: Callable, cases: Iterable[tuple]) -> dict[tuple, Any]:
    """``{case: build(*case)}`` on all cores; where a build fails, the exception in place of its result.

    Works in processes without TRITON_INTERPRET, whatever this one has set. `build` must be importable by name.
    """
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            futures = {case: pool.submit(build, *case) for case in cases}
            return {case: future.exception() or future.result() for case, future in futures.items()}
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and machine code of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

        found = re.search(r"(REG:\d+ STACK:\d+ SHARED:\d+ LOCAL:\d+)", dump("-res-usage"))
        if found is None:
            raise RuntimeError("cuobjdump printed no resource usage")
        usage = dict(part.split(":") for part in found.group(1).split())
        return {name: int(value) for name, value in usage.items()}, dump("-sass")
