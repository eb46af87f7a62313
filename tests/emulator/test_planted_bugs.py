"""How good is the emulator at seeing bugs? Plant them in the PTX, one at a time, and count by kind."""

import os
import re
from collections import Counter

import pytest

pytest.importorskip("triton")
from optinfer_kernels.emulator import Deadlock, emulate
from tests.attention import cases

pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing compiles with TRITON_INTERPRET"),
]

BUGS = {  # kind -> (where, what instead)
    "a block barrier dropped": (r"\bbar\.sync\s+\d+(, \d+)?;", lambda m: ""),
    "one copy group too few waited for": (
        r"cp\.async\.wait_group\s+(\d+);",
        lambda m: f"cp.async.wait_group {int(m[1]) + 1};",
    ),
    "a wait for wgmma dropped": (r"wgmma\.wait_group\.sync\.aligned \d+;", lambda m: ""),
    "a proxy fence dropped": (r"fence\.proxy\.async\.shared::cta;", lambda m: ""),
    "a wait for an mbarrier dropped": (
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, \[[^\]]*\], %r\d+;",
        lambda m: "setp.eq.b32 complete, 0, 0;",
    ),
    "16 bytes too many expected": (r"(mbarrier\.arrive\.expect_tx[^;]*, )(\d+);", lambda m: f"{m[1]}{int(m[2]) + 16};"),
    "an arrival dropped": (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64[^;]*;", lambda m: ""),
    "the wrong lane in a shuffle": (
        r"(shfl\.sync\.bfly\.b32[^;]*, )([12])(, 31, -1;)",
        lambda m: f"{m[1]}{3 - int(m[2])}{m[3]}",
    ),
    "a mask off by one": (r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+;)", lambda m: f"setp.le.s32{m[1]}"),
}
# kernel, architecture, sizes (several tiles, a ragged end), options, the least share that must be seen
SUBJECTS = [
    ("flash_attention", 80, (1, 1, 1, 140, 330, 64), {"causal": True}, 0.7),
    ("flash_attention_tma", 90, (1, 1, 1, 140, 330, 64), {"causal": True}, 0.7),
    ("flash_attention_ws", 90, (1, 1, 1, 140, 650, 64), {}, 0.7),
]
PER_KIND = 8


def planted(ptx):
    for kind, (pattern, change) in BUGS.items():
        places = list(re.finditer(pattern, ptx))
        for m in places[:: max(1, len(places) // PER_KIND)]:
            yield kind, ptx[: m.start()] + change(m) + ptx[m.end() :]


@pytest.mark.parametrize("kernel, arch, sizes, options, share", SUBJECTS, ids=lambda x: x if isinstance(x, str) else "")
def test_planted_bugs_are_seen(kernel, arch, sizes, options, share, capsys):
    tensors = cases.inputs(*sizes)

    def verdict(edit=None):
        try:
            with emulate(arch, edit=edit) as gpu:
                out, _ = cases.kernel(kernel)(*tensors, return_lse=True, **options)
        except Deadlock:
            return None, "deadlock"
        error = (out.double() - cases.exact(*tensors, **options)).abs().max().item()
        wrong = not error <= cases.allowed_error(*tensors, **options)
        return gpu, "found" if gpu.findings else "wrong answer" if wrong else "missed"

    gpu, unchanged = verdict()
    assert unchanged == "missed", gpu.findings
    scores: dict[str, Counter] = {}
    for kind, ptx in planted(gpu.runs[-1].ptx):
        scores.setdefault(kind, Counter())[verdict(lambda _, text=ptx: text)[1]] += 1
    with capsys.disabled():
        print()
        for kind, found in scores.items():
            print(f"{kernel} sm_{arch}: {kind}: {dict(found)}")
    seen = sum(found.total() - found["missed"] for found in scores.values())
    assert seen >= share * sum(found.total() for found in scores.values())
