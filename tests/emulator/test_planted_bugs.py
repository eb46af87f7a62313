"""How good is the emulator at seeing bugs? Plant them in the PTX, one at a time, and count by kind."""

import os
import re
from collections import Counter

import pytest

pytest.importorskip("triton")
from optinfer_kernels.emulator import Deadlock, emulate
from tests.attention import cases
from tests.emulator.barriers import lines_of_barriers, purposes_of, without

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
}
MASK = r"setp\.lt\.s32(\s+%p\d+, %r\d+, )(%r\d+);"  # column < length: off by one wherever this length stands
# The least share of each kind that must be seen. Some masks stand before another mask that says the same, some waits come
# after one for the same phase: nobody can see those missing. Block barriers have a test of their own below.
LEAST = {
    "a block barrier dropped": 0.1,
    "one copy group too few waited for": 1.0,
    "a wait for wgmma dropped": 1.0,
    "a proxy fence dropped": 0.5,
    "a wait for an mbarrier dropped": 0.8,
    "16 bytes too many expected": 1.0,
    "an arrival dropped": 0.6,
    "the wrong lane in a shuffle": 1.0,
    "a mask off by one": 0.5,
}
# kernel, architecture, sizes (several tiles, a ragged end), options
SUBJECTS = [
    ("flash_attention", 80, (1, 1, 1, 140, 330, 64), {"causal": True}),
    ("flash_attention_tma", 90, (1, 1, 1, 140, 330, 64), {"causal": True}),
    ("flash_attention_ws", 90, (1, 1, 1, 140, 650, 64), {}),
]
PER_KIND = 8


def planted(ptx):
    for kind, (pattern, change) in BUGS.items():
        places = list(re.finditer(pattern, ptx))
        for m in places[:: max(1, len(places) // PER_KIND)]:
            yield kind, ptx[: m.start()] + change(m) + ptx[m.end() :]
    for length in sorted({m[2] for m in re.finditer(MASK, ptx)})[:PER_KIND]:
        wrong = re.sub(MASK, lambda m: f"setp.le.s32{m[1]}{m[2]};" if m[2] == length else m[0], ptx)  # noqa: B023
        yield "a mask off by one", wrong


def attend(kernel, arch, sizes, options, edit=None):
    """The emulator, and what it saw: "found", "wrong answer", "deadlock" or "missed"."""
    tensors = cases.inputs(*sizes)
    try:
        with emulate(arch, edit=edit) as gpu:
            out, _ = cases.kernel(kernel)(*tensors, return_lse=True, **options)
    except Deadlock:
        return None, "deadlock"
    error = (out.double() - cases.exact(*tensors, **options)).abs().max().item()
    wrong = not error <= cases.allowed_error(*tensors, **options)
    return gpu, "found" if gpu.findings else "wrong answer" if wrong else "missed"


@pytest.mark.parametrize("kernel, arch, sizes, options", SUBJECTS, ids=lambda x: x if isinstance(x, str) else "")
def test_planted_bugs_are_seen(kernel, arch, sizes, options, capsys):
    def verdict(edit=None):
        return attend(kernel, arch, sizes, options, edit)

    gpu, unchanged = verdict()
    assert unchanged == "missed", gpu.findings
    scores: dict[str, Counter] = {}
    for kind, ptx in planted(gpu.runs[-1].ptx):
        scores.setdefault(kind, Counter())[verdict(lambda _, text=ptx: text)[1]] += 1
    with capsys.disabled():
        print()
        for kind, found in scores.items():
            print(f"{kernel} sm_{arch}: {kind}: {dict(found)}")
    shares = {kind: (found.total() - found["missed"]) / found.total() for kind, found in scores.items()}
    assert all(share >= LEAST[kind] for kind, share in shares.items()), shares


def test_the_barrier_before_a_tensor_store_is_seen():
    """The store reads its tile late. What other warps wrote must be ordered before it is issued, not before it reads."""
    subject = SUBJECTS[1]
    gpu, _ = attend(*subject)
    ptx = gpu.runs[-1].ptx
    store = ptx.count("\n", 0, re.search(r"cp\.async\.bulk\.tensor[^;]*bulk_group", ptx).start()) + 1
    before = [line for line in lines_of_barriers(ptx) if line < store]
    gpu, seen = attend(*subject, lambda _: without(ptx, {before[-1]}))
    assert seen == "found" and "race: read after write" in gpu.findings.kinds()


# How many barriers are needed alone, do each other's work, are covered by others, have nothing to order. Triton 3.7.1:
#     flash_attention     sm_80    7   0   4   0
#     flash_attention_tma sm_90    4  12   1   2
#     flash_attention_ws  sm_90   10   0   0  25
@pytest.mark.parametrize("kernel, arch, sizes, options", SUBJECTS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_silent_barrier_is_explained(kernel, arch, sizes, options, capsys):
    """One run says what each barrier is for; then it is dropped: alone, with those that do its work, with all needless ones.

    So a barrier whose loss the race check does not see is one that the pairs of accesses do not need, not one that the
    check forgets: the two verdicts come from different runs.
    """
    subject = (kernel, arch, sizes, options)
    ptx = attend(*subject)[0].runs[-1].ptx

    def seen_without(lines):
        return attend(*subject, lambda _: without(ptx, lines))[1] != "missed"

    with purposes_of(ptx) as purposes:
        assert attend(*subject)[1] == "missed"  # the many clocks report no more than the one
    groups = (purposes.needed(), purposes.shared(), purposes.covered(), purposes.idle())
    with capsys.disabled():
        print(f"\n{kernel} sm_{arch}: needed, shared, covered, idle: {[len(group) for group in groups]}")
    assert purposes.needed() and not purposes.unexplained
    assert {line for line in purposes.lines if seen_without({line})} == purposes.needed()
    for together in purposes.sets():
        if len(together) > 1:
            assert seen_without(together)
            assert not any(seen_without(together - {line}) for line in together)
    assert not seen_without(purposes.covered() | purposes.idle())


def test_a_tensor_map_filled_in_too_early_is_seen():
    """The warp clears the map's 128 bytes, meets, and one thread fills them in; without the meeting they may be cleared late."""
    subject = SUBJECTS[2]
    ptx = attend(*subject)[0].runs[-1].ptx
    publish = re.search(r"tensormap\.cp_fenceproxy[^;]*;", ptx)
    meeting = [m for m in re.finditer(r"bar\.warp\.sync\s+-1;", ptx) if m.start() < publish.start()][-1]
    gpu, seen = attend(*subject, lambda _: ptx[: meeting.start()] + ptx[meeting.end() :])
    assert seen == "found" and "race: write after write" in gpu.findings.kinds()
