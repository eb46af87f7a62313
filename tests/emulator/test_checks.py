"""Each check on a few lines of PTX: silent where all is well, loud where one thing is wrong."""

import numpy as np
import pytest

pytest.importorskip("triton")
from optinfer_kernels.emulator import Deadlock

from .ptx_text import run

OWN = (
    "mov.u32 %r1, global_smem; shl.b32 %r2, %r0, 2; add.u32 %r1, %r1, %r2;"  # %r1: this thread's word of shared memory
)
OTHER = "xor.b32 %r3, %r0, {lane}; shl.b32 %r3, %r3, 2; mov.u32 %r4, global_smem; add.u32 %r4, %r4, %r3;"  # another's


def kinds(body, *arrays, **options):
    return set(run(body, *arrays, **options).findings.kinds())


def exchange(barrier, lane=32):
    """Every thread writes its word and reads another's."""
    return f"{OWN} st.shared.b32 [%r1], %r0; {barrier} {OTHER.format(lane=lane)} ld.shared.b32 %r5, [%r4];"


def test_races_between_warps():
    assert kinds(exchange("bar.sync 0;"), threads=64) == set()
    assert "race: read after write" in kinds(exchange(""), threads=64) | kinds(
        exchange("bar.warp.sync -1;"), threads=64
    )


def test_races_within_a_warp():
    assert kinds(exchange("bar.warp.sync -1;", lane=1)) == set()
    assert kinds(exchange("", lane=1)) == {"race within a warp: read after write"}


def test_a_read_must_be_over_before_the_next_write():
    again = f"{exchange('bar.sync 0;')} {{}} st.shared.b32 [%r1], %r5;"
    assert kinds(again.format("bar.sync 0;"), threads=64) == set()
    assert "race: write after read" in kinds(again.format("bar.warp.sync -1;"), threads=64)


def test_writing_the_same_value_twice_does_no_harm():
    """Two warps, one place: Triton does that where a tensor has fewer elements than the block has threads."""
    both = "mov.u32 %r1, global_smem; st.shared.b32 [%r1], {};"
    assert "race: one instruction writes two values to one place" in kinds(both.format("%r0"), threads=64)
    assert kinds(both.format("7") + "bar.sync 0; st.shared.b32 [%r1], 7;", threads=64) == set()


def test_uninitialized_shared_memory():
    assert kinds(f"{OWN} ld.shared.b32 %r5, [%r1];") == {"read of uninitialized shared memory"}


@pytest.mark.parametrize(
    "offset, kind", [(4096, "shared out of bounds"), (-4, "shared out of bounds"), (2, "misaligned shared access")]
)
def test_shared_bounds(offset, kind):
    assert kinds(f"{OWN} st.shared.b32 [%r1+{offset}], %r0;") == {kind}


def test_global_bounds():
    """One element too many is told, with how many lanes, although the array's memory goes on."""
    memory = np.zeros(64, np.uint32)
    store = "add.u64 %d11, %d0, %d10; st.global.b32 [%d11], %r0;"
    assert kinds(store, memory[:32]) == set()
    findings = run(store, memory[:29]).findings
    assert findings.kinds() == {"global out of bounds": 3}
    assert "byte 116 of array 0, which has 116" in str(findings)
    assert memory[28] == 28 and memory[29] == 29  # from the first run
    assert kinds("add.u64 %d11, %d0, 2; ld.global.b32 %r3, [%d11];", memory) == {"misaligned global access"}


COPY = """
{{ add.u64 %d11, %d0, %d10; {own} cp.async.ca.shared.global [%r1], [%d11], 4; cp.async.commit_group;
{wait} ld.shared.b32 %r5, [%r1]; add.u64 %d12, %d1, %d10; st.global.b32 [%d12], %r5; }}
"""


def test_asynchronous_copies_land_when_somebody_waits():
    source, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    assert kinds(COPY.format(own=OWN, wait="cp.async.wait_group 0;"), source, out) == set()
    assert (out == source).all()
    found = kinds(COPY.format(own=OWN, wait="cp.async.wait_group 1;"), source, out)
    assert found == {"read of an asynchronous copy in flight", "block ends with asynchronous copies in flight"}
    assert (out != source).all()


def test_deadlock_says_who_waits_where():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $SKIP; bar.sync 1, 64; $SKIP: bar.sync 2, 64;"
    with pytest.raises(Deadlock, match=r"warps \[1\] wait for 64 threads at barrier 1 .*\n.*\[0\].* barrier 2"):
        run(body.replace("; ", ";\n"), threads=64)


def test_warps_with_different_jobs_meet_at_one_barrier():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $SKIP; bar.sync 1, 64; bra $END; $SKIP: bar.sync 1, 64; $END: mov.u32 %r1, %r0;"
    assert kinds(body.replace("; ", ";\n"), threads=64) == set()


MBARRIER = f"""
{OWN} mov.u32 %r6, global_smem;
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r6+512], {{count}};
{{visible}}
setp.lt.u32 %p2, %r0, 32;
@%p2 bra $WAIT;
st.shared.b32 [%r1], %r0;
{{arrive}}
bra $END;
$WAIT:
{{wait}}
ld.shared.b32 %r5, [%r1+128];
$END:
"""
PARTS = {
    "count": "32",
    "visible": "bar.sync 0;",
    "arrive": "mbarrier.arrive.shared::cta.b64 _, [%r6+512];",
    "wait": "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%r6+512], 0;\n@!done bra.uni again;\n}",
}


TOO_MANY = "setp.eq.u32 %p3, %r0, 40;\n@%p3 mbarrier.arrive.shared::cta.b64 _, [%r6+512], 33;"


@pytest.mark.parametrize("change, kind", [
    ({}, None),
    ({"wait": ""}, "race: read after write"),
    ({"visible": ""}, "mbarrier used before its init is visible"),
    ({"arrive": TOO_MANY}, "mbarrier with too many arrivals"),
])  # fmt: skip
def test_mbarriers(change, kind):
    found = kinds(MBARRIER.format(**PARTS | change), threads=64)
    assert found == set() if kind is None else kind in found


TWO_WAIT = f"""
mov.u32 %r6, global_smem;
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r6+512], 1;
{{visible}}
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r6+512];
{PARTS["wait"].replace("{", "{{").replace("}", "}}")}
{{all_through}}
@%p1 mbarrier.inval.shared::cta.b64 [%r6+512];
"""


@pytest.mark.parametrize("dropped, kind", [
    (None, None),
    ("visible", "mbarrier used before its init is visible"),  # by a thread that only waits
    ("all_through", "mbarrier invalidated while others may wait"),
])  # fmt: skip
def test_waits_lie_between_init_and_inval(dropped, kind):
    barriers = {name: "" if name == dropped else "bar.sync 0;" for name in ("visible", "all_through")}
    found = kinds(TWO_WAIT.format(**barriers), threads=64)
    assert found == set() if kind is None else kind in found


def test_an_arrival_that_never_comes():
    with pytest.raises(Deadlock, match="mbarrier"):
        run(MBARRIER.format(**PARTS | {"count": "33"}), threads=64)


def test_counters_know_sectors_and_banks():
    source = np.zeros(32 * 32, np.uint32)
    dense = run("add.u64 %d11, %d0, %d10; ld.global.b32 %r3, [%d11];", source)
    (traffic,) = [t for (memory, _), t in dense.counters.rows.items() if memory == "global"]
    assert (traffic.requests, traffic.nbytes, traffic.cost, traffic.ideal) == (1, 128, traffic.cost, 4)
    assert traffic.cost == 4 + (source.ctypes.data % 32 != 0)
    strided = run("shl.b64 %d11, %d10, 5; add.u64 %d11, %d0, %d11; ld.global.b32 %r3, [%d11];", source)
    (traffic,) = [t for (memory, _), t in strided.counters.rows.items() if memory == "global"]
    assert (traffic.cost, traffic.ideal) == (32, 4)
    bank = "mov.u32 %r1, global_smem; shl.b32 %r2, %r0, {}; add.u32 %r1, %r1, %r2; st.shared.b32 [%r1], %r0;"
    for shift, waves in ((2, 1), (3, 2), (7, 32)):
        machine = run(bank.format(shift), shared=8192)
        (traffic,) = machine.counters.rows.values()
        assert (traffic.cost, traffic.ideal) == (waves, 1)
