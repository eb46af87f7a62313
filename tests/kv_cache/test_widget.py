"""The widget's JavaScript manager does what the Python manager does: same events, same state, same refusals."""

import contextlib
import json
import random
import subprocess
from pathlib import Path

import pytest

from optinfer.kv_cache import BlockManager, DuplicateSequence, OutOfBlocks, UnknownSequence, replay
from optinfer.widgets import kv_memory
from optinfer.widgets.kv_memory import KVMemory, demo_manager, replay_records
from optinfer.widgets.modules import inlined
from tests.javascript import NODE, needs_node

JS = inlined(Path(kv_memory.__file__).with_suffix(".js"))  # what readers get

RUN = """
import { readFileSync } from "node:fs";
const { default: js } = await import(process.argv[1]);
const names = { allocate: 1, append: 1, commit: 1, fork: 1, truncate: 1, free: 1, preempt: 1 };
const out = JSON.parse(readFileSync(0, "utf8")).map((trace) => {
  const options = { prefixCaching: trace.prefix_caching, watermark: trace.watermark };
  let m = new js.BlockManager(trace.num_blocks, trace.block_size, options);
  const errors = [];
  trace.operations.forEach(([name, ...args], i) => {
    try { m[name](...args); errors.push(null); } catch (error) {
      if (!(error instanceof js.Refused)) throw error;
      errors.push(error.kind);
    }
  });
  const s = js.replay(m.events, trace.num_blocks);
  const plain = (map, f) => Object.fromEntries([...map].map(([id, v]) => [id, f(v)]));
  return {
    events: m.events, errors,
    state: { tokens: plain(m.sequences, (q) => q.tokens), tables: plain(m.sequences, (q) => q.table),
             ref_counts: m.refCounts, hashes: m.hashes, free_queue: m.freeQueue },
    replayed: { tokens: plain(s.tokens, (q) => q), tables: plain(s.tables, (q) => q),
                ref_counts: s.refCounts, hashes: s.hashes, free_queue: s.freeQueue },
  };
});
process.stdout.write(JSON.stringify(out));
"""


def run_node(script, data, *args):
    command = [NODE, "--input-type=module", "-e", script, *args]
    # A copy with the module suffix: node takes .js for CommonJS.
    return json.loads(
        subprocess.run(command, input=json.dumps(data), capture_output=True, text=True, check=True).stdout
    )


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("js") / "kv_memory.mjs"
    path.write_text(JS, encoding="utf-8")
    return path


def random_trace(rng):
    trace = {
        "num_blocks": rng.randint(1, 12),
        "block_size": rng.randint(1, 4),
        "prefix_caching": rng.random() < 0.8,
        "watermark": rng.choice([0, 0, 0.3]),
    }
    operations, lengths = [], {}
    tokens = lambda: [rng.randint(0, 1) for _ in range(rng.randint(1, 12))]  # noqa: E731
    for i in range(rng.randint(1, 30)):
        some = rng.choice(list(lengths)) if lengths else "nobody"
        kind = rng.choice(
            ["allocate", "allocate", "append", "append", "fork", "free", "preempt", "truncate", "commit", "bad"]
        )
        if kind == "allocate":
            options = {"commit": rng.random() < 0.8, "salt": rng.choice(["", "", "é"])}
            operations.append([kind, f"s{i}", tokens(), options])
            lengths[f"s{i}"] = 1
        elif kind == "append":
            operations.append([kind, some, tokens(), {"commit": rng.random() < 0.8}])
        elif kind == "fork":
            operations.append([kind, some, f"s{i}"])
            lengths[f"s{i}"] = 1
        elif kind in ("free", "preempt"):
            operations.append([kind, some])
            lengths.pop(some, None)
        elif kind in ("truncate", "commit"):
            operations.append([kind, some, rng.randint(1, 6)])
        else:
            operations.append(
                rng.choice([["allocate", some, []], ["append", some, [-1]], ["fork", some, some], ["free", "x"]])
            )
    return trace | {"operations": operations}


def run_python(trace):
    m = BlockManager(trace["num_blocks"], trace["block_size"], trace["prefix_caching"], watermark=trace["watermark"])
    kinds = {OutOfBlocks: "OutOfBlocks", UnknownSequence: "UnknownSequence", DuplicateSequence: "DuplicateSequence"}
    errors = []
    for name, *args in trace["operations"]:
        options = args.pop() if isinstance(args[-1], dict) else {}
        try:
            getattr(m, name)(*args, **options)
            errors.append(None)
        except (OutOfBlocks, ValueError) as error:
            errors.append(kinds.get(type(error), "ValueError"))
    state = m.snapshot()
    state = {name: getattr(state, name) for name in ("tokens", "tables", "ref_counts", "hashes", "free_queue")}
    return {"events": [event.to_dict() for event in m.events], "errors": errors, "state": state, "replayed": state}


@needs_node
def test_the_port_equals_the_python_manager_on_thousands_of_random_traces(module):
    rng = random.Random()
    traces = [random_trace(rng) for _ in range(4_000)]
    expected = json.loads(json.dumps([run_python(trace) for trace in traces]))
    for trace, mine, theirs in zip(traces, expected, run_node(RUN, traces, str(module))):
        assert theirs == mine, json.dumps(trace)
    seen = {event["type"] for run in expected for event in run["events"]}
    assert {"BlockHit", "BlockCopied", "BlockForgotten", "SequenceTruncated"} <= seen
    assert any("OutOfBlocks" in run["errors"] for run in expected)


@needs_node
def test_a_broken_port_would_be_noticed(module, tmp_path):
    rng = random.Random(0)
    traces = [random_trace(rng) for _ in range(300)]
    expected = json.loads(json.dumps([run_python(trace) for trace in traces]))
    for old, new in [
        ("(tokens.length - 1) / size", "tokens.length / size"),
        ("this.freeQueue.unshift(...unhashed)", "this.freeQueue.push(...unhashed)"),
        ("this.hashes[block] = null;\n    const others", "const others"),
    ]:
        assert old in JS
        broken = tmp_path / "broken.mjs"
        broken.write_text(JS.replace(old, new), encoding="utf-8")
        with contextlib.suppress(subprocess.CalledProcessError):
            assert run_node(RUN, traces, str(broken)) != expected


@needs_node
def test_the_lane_counts_like_the_python_allocator(module):
    from optinfer.kv_cache import ContiguousAllocator, Request

    script = """
    import { readFileSync } from "node:fs";
    const { default: js } = await import(process.argv[1]);
    process.stdout.write(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(([events, total, policy, maxLen]) => {
      const operations = js.groupByOperation(events);
      return js.contiguousLane(operations, operations.length, total, policy, maxLen);
    })));
    """
    rng = random.Random(3)
    jobs, expected = [], []
    for _ in range(300):
        policy = rng.choice(ContiguousAllocator.POLICIES)
        a, m, live = ContiguousAllocator(96, policy, max_model_len=32), BlockManager(999, 1), []
        for i in range(rng.randint(1, 20)):
            request = Request(rng.randint(1, 16), rng.randint(1, 16))
            if a.admit(i, request):
                m.allocate(i, [i] * request.prompt_len)
                m.append(i, [i] * request.output_len)
                for _ in range(request.output_len):
                    a.grow(i)
                live.append(i)
            elif live:
                a.free(gone := live.pop(rng.randrange(len(live))))
                m.free(gone)
        jobs.append([[event.to_dict() for event in m.events], 96, policy, 32])
        usage = a.usage(waiting=False)
        expected.append((usage.used, usage.reserved, usage.internal, sorted(p[0] for p in a.pieces().values())))
    for lane, mine in zip(run_node(script, jobs, str(module)), expected):
        theirs = (lane["used"], lane["reserved"], lane["internal"], [part["start"] for part in lane["parts"]])
        assert theirs == mine


def test_the_demo_has_every_beat():
    m = demo_manager()
    m.check_integrity()
    records = [event.to_dict() for event in m.events]
    assert replay_records(records, 16) == replay(m.events, 16) == m.snapshot()
    types = [record["type"] for record in records]
    assert {"BlockHit", "BlockCopied", "SequenceForked"} <= set(types)
    assert any(record.get("evicted") for record in records)
    assert any(record.get("preempted") for record in records)
    resumed = [r for r in records if r["type"] == "SequenceAllocated" and r["seq_id"] == "E"]
    assert len(resumed) == 2 and resumed[1]["num_cached_tokens"] > 0  # recompute finds some of it again


def test_the_demo_preempts_only_when_every_page_is_taken():
    m = demo_manager()
    for i, event in enumerate(m.events):
        if type(event).__name__ == "SequenceFreed" and event.preempted:
            assert not replay(m.events[:i], 16).free_queue


def test_summary_and_page_without_a_kernel():
    widget = KVMemory.demo()
    assert "sequences in 16 pages of 4 tokens" in widget.summary()
    assert 'data-widget="KVMemory"' in widget.static_html() and "http" not in widget.summary()
