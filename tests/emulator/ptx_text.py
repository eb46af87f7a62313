"""Small kernels written in PTX by hand, and the machine that runs them: no compiler needed."""

import numpy as np

from optinfer_kernels.emulator.checks import Findings
from optinfer_kernels.emulator.machine import Machine
from optinfer_kernels.emulator.memory import GlobalMemory
from optinfer_kernels.emulator.ptx import parse

HEADER = """
.version 8.6
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
.reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %d<40>;
{loads}
{body}
ret;
}}
"""


def run(body: str, *arrays: np.ndarray, threads: int = 32, shared: int = 1024, check: bool = True) -> Machine:
    """Run `body` on one block. The address of arrays[k] is in %d{k}; %r0 is the thread, %d10 four times the thread."""
    parameters = ", ".join(f".param .u64 p{k}" for k in range(len(arrays)))
    loads = "\n".join(f"ld.param.b64 %d{k}, [p{k}];" for k in range(len(arrays)))
    loads += "\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %d10, %r0, 4;"
    kernel = parse(HEADER.format(parameters=parameters, threads=threads, loads=loads, body=body))
    findings = Findings()
    memory = GlobalMemory(findings)
    addresses = np.array([memory.add(f"array {k}", a) for k, a in enumerate(arrays)], np.uint64)
    offsets = {f"p{k}": 8 * k for k in range(len(arrays))}
    machine = Machine(kernel, memory, addresses.view(np.uint8), offsets, shared, findings, check)
    machine.run((1, 1, 1))
    return machine


def compute(op: str, *sources: np.ndarray, result: np.dtype | type = np.uint32, constants: tuple = ()) -> np.ndarray:
    """``op d, a, b, ..., constants`` for 32 threads, on 32-bit registers (64 where an array is wider)."""
    sources = tuple(np.ascontiguousarray(s) for s in sources)
    out = np.zeros(32, result)
    body, names = [], []
    for k, array in enumerate((*sources, out)):
        wide = array.dtype.itemsize == 8
        body.append(f"add.u64 %d{20 + k}, %d{k}, %d10;" + (f" add.u64 %d{20 + k}, %d{20 + k}, %d10;" if wide else ""))
        names.append(f"%d{30 + k}" if wide else f"%r{10 + k}")
        if k < len(sources):
            body.append(f"ld.global.b{64 if wide else 32} {names[k]}, [%d{20 + k}];")
    operands = ", ".join([names[-1], *names[:-1], *map(str, constants)])
    body.append(f"{op} {operands};")
    body.append(f"st.global.b{64 if out.itemsize == 8 else 32} [%d{20 + len(sources)}], {names[-1]};")
    machine = run("\n".join(body), *sources, out)
    assert not machine.findings, machine.findings
    return out
