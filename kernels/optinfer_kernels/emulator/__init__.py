"""Execute what Triton compiles, without a GPU: the kernel's PTX, on NumPy arrays, all threads of a block at once.

Triton's interpreter runs a kernel's source. It does not see what the compiler makes of it: inline assembly, layouts,
shared memory, asynchronous copies, barriers, tensor cores, warps with different jobs. This runs the compiled kernel.

    from optinfer_kernels.emulator import emulate

    with emulate(90) as gpu:                          # sm_75, 80, 86, 89, 90 (TMA, wgmma), 120
        out, lse = flash_attention(q, k, v)           # an ordinary launch function, on CPU tensors
    print(gpu.findings)                               # what was wrong
    print(gpu.runs[-1].report())                      # what it did: counts, never times
    print(gpu.runs[-1].by_line("flash_attention.py"))

    launch          a Triton launch -> parameters, a run
    ptx             the parser: text -> basic blocks of instructions
    instructions    the table of what is known; anything else is refused before it runs
    arithmetic      what a thread does by itself, and shuffles
    machine         registers, scheduler, branches, barriers
    data_movement   loads, stores, atomics, cp.async, ldmatrix
    tensor_cores    mma, wgmma
    mbarriers       Hopper's barriers, and fences between proxies
    tensor_copies   the TMA unit
    memory          global memory held to the tensors' elements; shared memory
    checks          findings; races by vector clocks
    counters        sectors and wavefronts, against the least possible
    report          tables

What it cannot see: time, occupancy, caches; the machine code (`ptxas` comes after PTX); rounding where hardware
approximates; races through global memory; more than one order of the warps in a run, though the race check does not
depend on the order. It knows nothing of any kernel.
"""

from .checks import Findings
from .instructions import Unsupported
from .launch import ARCHITECTURES, Gpu, Run, emulate
from .machine import Deadlock

__all__ = ["ARCHITECTURES", "Deadlock", "Findings", "Gpu", "Run", "Unsupported", "emulate"]
