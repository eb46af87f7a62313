"""Serving: a trace of ragged requests through our engine, transformers' `generate`, its continuous batching, vLLM and llama.cpp.

All peers serve the same trace in the same run, taking turns, so that a busy moment of the machine hits all of them.
Throughput runs have every request waiting at the start; latency runs have Poisson arrivals.
"""

import contextlib
import copy
import functools
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tqdm.auto import tqdm

from optinfer import cpu, data, models
from optinfer.bench.rows import ServingRow
from optinfer.bench.worker import Worker, environment_of
from optinfer.quantization.checkpoints.gguf import load_as_shipped
from optinfer.serving import Completion, Engine, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SYSTEM_PROMPT = (
    "You are a patient teacher of computer science. Answer briefly, with one example, and say what you are unsure of."
)
_NUM_BLOCKS = 1024


@dataclass(frozen=True)
class TraceRequest:
    """A prompt, how many tokens to generate (exactly), and when it arrives, in seconds."""

    token_ids: list[int]
    max_tokens: int
    arrival: float = 0.0


@dataclass(frozen=True)
class Served:
    """What a peer made of a request: how many tokens, seconds to the first one, and mean seconds between the others."""

    num_tokens: int
    ttft: float | None = None
    tpot: float | None = None


def served(completions: list[Completion]) -> list[Served]:
    return [
        Served(len(c.token_ids), c.metrics.time_to_first_token, c.metrics.time_per_output_token) for c in completions
    ]


class Peer(Protocol):
    """Who serves traces beside us."""

    name: str

    def serve(self, trace: list[TraceRequest]) -> list[Served]: ...


class VLLM:
    """vLLM; `scripts/vllm_environment.sh` makes its environment and prints the path of its python.

    Args:
        options: arguments of `vllm.LLM`.
    """

    def __init__(self, python: str, model: str, **options: Any):
        self._worker = Worker("vLLM", python, "vllm_worker.py", model, json.dumps(options))
        self.name = f"vLLM {self._worker.version}, CPU"

    def serve(self, trace: list[TraceRequest]) -> list[Served]:
        found = self._worker.ask([asdict(request) for request in trace])["results"]
        counts = [len(r["token_ids"]) for r in found]
        return [
            Served(n, r["ttft"], (r["finished"] - r["ttft"]) / (n - 1) if n > 1 else None)
            for n, r in zip(counts, found)
        ]

    def close(self) -> None:
        self._worker.close()


class LlamaCpp:
    """llama.cpp with the default model; `scripts/llama_cpp_environment.sh` makes its environment.

    Args:
        weights: their format, such as ``"BF16"``, made from the file that the model comes in; ``""``: that file.
    """

    def __init__(self, python: str, weights: str = "BF16", threads: int | None = None):
        threads = threads or torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:  # the worker has read the file before it answers
            self._worker = Worker(
                "llama.cpp",
                python,
                "llama_cpp_worker.py",
                str(models.default_gguf(Path(folder))),
                weights,
                str(threads),
            )
        self.name = f"llama.cpp {self._worker.version}, {weights or 'Q4_1 as shipped'}"

    def serve(self, trace: list[TraceRequest]) -> list[Served]:
        found = self._worker.ask([asdict(request) for request in trace])["results"]
        return [Served(r["num_tokens"], r.get("ttft"), r["per_token"]) for r in found]

    def close(self) -> None:
        self._worker.close()


def make_trace(
    tokenizer: "PreTrainedTokenizerBase",
    num_requests: int,
    rate: float | None = None,
    seed: int = 0,
    longest: int = 96,
    lengths: list[int] | None = None,
) -> list[TraceRequest]:
    """Chat, summary and rewriting prompts under one system prompt, with ragged output lengths of 8 to `longest`.

    Args:
        rate: Poisson arrivals per second; None: all at once.
        lengths: the output length of each request, in place of random ones.
    """
    rng = random.Random(seed)
    texts = [text for kind in ("chat", "summarize", "rewrite") for text in data.prompts(kind)]
    trace, now = [], 0.0
    for i in range(num_requests):
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": rng.choice(texts)}]
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        if rate is not None:
            now += rng.expovariate(rate)
        length = rng.randint(8, longest) if lengths is None else lengths[i]
        trace.append(TraceRequest(list(encoded["input_ids"]), length, now))
    return trace


# ---- the peers: each serves a trace whose requests all wait at the start, and returns the tokens per request


def run_engine(engine: Engine, trace: list[TraceRequest]) -> list[Completion]:
    """Serve a trace in real time; requests join when they arrive."""
    start, pending = engine.clock(), sorted(enumerate(trace), key=lambda item: item[1].arrival)
    done: dict[str, Completion] = {}
    ids: dict[int, str] = {}
    while pending or engine.has_work:
        while pending and engine.clock() - start >= pending[0][1].arrival:
            i, request = pending.pop(0)
            params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
            ids[i] = engine.add_request(request.token_ids, params, arrival=start + request.arrival)
        if engine.has_work:
            done.update((completion.request_id, completion) for completion in engine.step())
        elif pending:
            time.sleep(max(0.0, pending[0][1].arrival - (engine.clock() - start)))
    return [done[ids[i]] for i in range(len(trace))]


@torch.inference_mode()
def run_static(model: "PreTrainedModel", trace: list[TraceRequest], batch_size: int = 16) -> list[list[int]]:
    """transformers' `generate` on batches in order of arrival; each runs until its longest request is done."""
    results = []
    for first in range(0, len(trace), batch_size):
        batch = trace[first : first + batch_size]
        width = max(len(request.token_ids) for request in batch)
        ids = torch.tensor([[0] * (width - len(r.token_ids)) + r.token_ids for r in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(r.token_ids)) + [1] * len(r.token_ids) for r in batch])
        longest = max(request.max_tokens for request in batch)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
        )
        results += [row[width : width + r.max_tokens].tolist() for row, r in zip(out, batch)]
    return results


def run_continuous(model: "PreTrainedModel", trace: list[TraceRequest]) -> tuple[list[list[int]], float]:
    """transformers' continuous batching, which `generate_batch` stands on; here with an output length per request.

    Pages for as many tokens and a step as large as the engine has. Returns tokens, and the seconds they took after a
    first short request, which fills the cache's memory.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    attention = model.config._attn_implementation
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
    sizes = ContinuousBatchingConfig(num_blocks=_NUM_BLOCKS * 16 // 256, max_batch_tokens=512)
    try:
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=sizes, warmup=False
        ) as manager:
            _continuous(manager, [TraceRequest(trace[0].token_ids[:4], 2)])
            start = time.perf_counter()
            results = _continuous(manager, trace)
            seconds = time.perf_counter() - start
    finally:
        model.set_attn_implementation(attention)
    return results, seconds


def _continuous(manager: Any, trace: list[TraceRequest]) -> list[list[int]]:
    ids = [
        manager.add_request(request.token_ids, request_id=f"{len(trace)}-{i}", max_new_tokens=request.max_tokens)
        for i, request in enumerate(trace)
    ]
    results: dict[str, list[int]] = {}
    while len(results) < len(trace):
        output = manager.get_result(timeout=600)
        if output is None:
            raise RuntimeError("transformers' continuous batching returned nothing for ten minutes")
        if output.is_finished():
            results[output.request_id] = output.generated_tokens
    return [results[i] for i in ids]


# ---- the suite


def run(quick: bool = False) -> list[ServingRow]:
    """Throughput at 16 and 64 requests (quick: 8), latency under Poisson arrivals, and the cost ladder.

    vLLM and llama.cpp take part where `OPTINFER_VLLM_PYTHON` and `OPTINFER_LLAMA_CPP_PYTHON` name the python of their
    environments; who is missing is said to be skipped.
    """
    from optinfer.quantization import quantize

    model, tokenizer = models.load_model()
    longest = 24 if quick else 96
    trace_of = functools.partial(make_trace, tokenizer, longest=longest)
    with contextlib.ExitStack() as stack:
        peers: list[Peer] = []
        if python := environment_of("vLLM", "OPTINFER_VLLM_PYTHON"):
            options = json.loads(os.environ.get("OPTINFER_VLLM_OPTIONS", "{}"))
            vllm = VLLM(python, str(models.default_model_path()), **options)
            peers.append(stack.enter_context(contextlib.closing(vllm)))
        if python := environment_of("llama.cpp", "OPTINFER_LLAMA_CPP_PYTHON"):
            peers.append(stack.enter_context(contextlib.closing(LlamaCpp(python))))
        rows: list[ServingRow] = []
        for num_requests, rounds in ((8, 1),) if quick else ((16, 3), (64, 2)):
            rows += throughput(model, trace_of(num_requests), rounds, peers)
        rows += latency(model, trace_of(8 if quick else 32, rate=2.0), peers)
    quantized = quantize(copy.deepcopy(model), "int4", progress=False)
    shipped, _ = load_as_shipped()
    return rows + ladder(model, quantized, trace_of(8 if quick else 24), num_blocks=96, shipped=shipped)


@dataclass
class _Turns:
    """What one peer's turns brought: seconds of each, what it served in the last, or why it cannot run here."""

    seconds: list[float] = field(default_factory=list)
    done: list[Served] = field(default_factory=list)
    skipped: str | None = None


def throughput(
    model: "PreTrainedModel", trace: list[TraceRequest], rounds: int = 3, others: Sequence[Peer] = ()
) -> list[ServingRow]:
    """Serve the trace with every peer in turn, after a warm-up, `rounds` times; the order rotates.

    Raises RuntimeError if a peer leaves out tokens. One of transformers' ways that cannot run here is `skipped`, with why.
    """
    engines: dict[str, Engine] = {}
    peers = _ways(model, trace, engines)
    peers |= {peer.name: lambda peer=peer: _timed(lambda: peer.serve(trace)) for peer in others}  # type: ignore[misc]
    _warm_up(model, trace, others)
    turns = _in_turns(peers, trace, rounds)
    base = turns["transformers generate_batch"].seconds
    rows = []
    for name, own in turns.items():
        if own.skipped is not None:
            rows.append(ServingRow(suite="throughput", peer=name, requests=len(trace), skipped=own.skipped))
            continue
        row = _row("throughput", name, own.done, median(own.seconds), engines.get(name))
        row.samples = own.seconds
        row.against_generate_batch = median(base) / median(own.seconds) if base else None
        rows.append(row)
    return rows


def _ways(
    model: "PreTrainedModel", trace: list[TraceRequest], engines: dict[str, Engine]
) -> dict[str, Callable[[], tuple[list[Served], float]]]:
    """Ours, whose engines are left in `engines`, and transformers'.

    Each with its own seconds: from the first request handed over to the last answer, its memory ready before.
    """

    def fresh_engine(name: str, **options: Any) -> tuple[list[Served], float]:
        engines[name] = Engine(model, num_blocks=_NUM_BLOCKS, **options)
        return _timed(lambda: served(run_engine(engines[name], trace)))

    def continuous() -> tuple[list[Served], float]:
        tokens, seconds = run_continuous(model, trace)
        return _counted(tokens), seconds

    return {
        "optinfer": lambda: fresh_engine("optinfer"),
        "optinfer, prompt lookup": lambda: fresh_engine("optinfer, prompt lookup", draft="prompt_lookup"),
        "transformers generate": lambda: _timed(lambda: _counted(run_static(model, trace))),
        "transformers generate_batch": continuous,
    }


def _warm_up(model: "PreTrainedModel", trace: list[TraceRequest], others: Sequence[Peer]) -> None:
    short = [TraceRequest(trace[0].token_ids, 2)] * 2
    run_engine(Engine(model, num_blocks=64), short)
    run_static(model, short)
    for peer in others:
        for _ in range(2):  # compiled for the trace's shapes before it counts
            peer.serve(trace)


def _in_turns(
    peers: dict[str, Callable[[], tuple[list[Served], float]]], trace: list[TraceRequest], rounds: int
) -> dict[str, _Turns]:
    turns = {name: _Turns() for name in peers}
    names = list(peers)
    order = [names[(turn + i) % len(names)] for turn in range(rounds) for i in range(len(names))]
    with tqdm(order, desc=f"{len(trace)} requests", unit="run") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            own = turns[name]
            if own.skipped is not None:
                continue
            try:
                own.done, took = peers[name]()
            except Exception as error:  # another library's, of any kind
                if not name.startswith("transformers"):
                    raise
                own.skipped, own.seconds = f"{type(error).__name__}: {error}".split("\n")[0][:80], []
                continue
            own.seconds.append(took)
            if [done.num_tokens for done in own.done] != [request.max_tokens for request in trace]:
                raise RuntimeError(f"{name} did not generate what the trace asks for")
    return turns


def latency(model: "PreTrainedModel", trace: list[TraceRequest], others: Sequence[Peer] = ()) -> list[ServingRow]:
    """The trace's arrivals in real time: time to first token and time per output token, in seconds."""
    engine = Engine(model, num_blocks=_NUM_BLOCKS)
    peers: dict[str, Callable[[], list[Served]]] = {"optinfer": lambda: served(run_engine(engine, trace))}
    for peer in others:
        peers[peer.name] = functools.partial(peer.serve, trace)
    rows = []
    for name, serve in peers.items():
        done, seconds = _timed(serve)
        rows.append(_row("latency", name, done, seconds, engine if name == "optinfer" else None))
    return rows


def _row(suite: str, peer: str, done: list[Served], seconds: float, engine: Engine | None) -> ServingRow:
    """A trace served. `engine`: ours, which tells of its memory, too."""
    num_tokens = sum(d.num_tokens for d in done)
    return ServingRow(
        suite=suite,
        peer=peer,
        requests=len(done),
        output_tokens=num_tokens,
        seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        **_percentiles(done),
        **(_memory(engine) if engine else {}),
    )


def _counted(tokens: list[list[int]]) -> list[Served]:
    return [Served(len(own)) for own in tokens]


def _timed(serve: Callable[[], list[Served]]) -> tuple[list[Served], float]:
    start = time.perf_counter()
    done = serve()
    return done, time.perf_counter() - start


def _percentiles(done: list[Served]) -> dict[str, Any]:
    """Percentiles of the times that the peer tells (transformers tells none)."""
    found: dict[str, float] = {}
    for kind in ("ttft", "tpot"):
        values = [getattr(d, kind) for d in done if getattr(d, kind) is not None]
        if len(values) > 1:
            cuts = quantiles(values, n=100, method="inclusive")
            found |= {f"{kind}_p{p}": cuts[p - 1] for p in (50, 90, 99)}
    return found


def _memory(engine: Engine) -> dict[str, Any]:
    stats = engine.stats
    return {
        "cached_tokens": stats.cached_tokens,
        "peak_used_blocks": stats.peak_used_blocks,
        "num_blocks": engine.manager.num_blocks,
        "preemptions": stats.preemptions,
    }


@dataclass(frozen=True)
class _Rung:
    """What is served with on one rung; `options` of the engine."""

    name: str
    model: "PreTrainedModel"
    options: dict[str, Any]

    def engine(self, num_blocks: int) -> Engine:
        return Engine(self.model, num_blocks=num_blocks, **{"max_batched_tokens": 512, **self.options})


def ladder(
    model: "PreTrainedModel",
    quantized: "PreTrainedModel | None",
    trace: list[TraceRequest],
    num_blocks: int = 256,
    rounds: int = 1,
    shipped: "PreTrainedModel | None" = None,
) -> list[ServingRow]:
    """The same trace and the same KV memory, with one idea more on each rung.

    The first rungs run the formulas of a textbook over copied pages. Without paging every request reserves the longest
    context of the trace, so fewer run at once. The rungs take turns, after a warm-up of each; ``seconds`` is the median
    and ``spread`` the largest distance from it, as a share.

    Args:
        quantized: the same model with quantized weights; None leaves that rung out.
        shipped: the same model in the 4 bits it was published in, one more rung where it is given.
    """
    longest = max(len(request.token_ids) + request.max_tokens for request in trace)
    rungs = _rungs(model, quantized, shipped, reserved=max(1, num_blocks * 16 // longest))
    for rung in rungs:
        run_engine(rung.engine(num_blocks), [TraceRequest(trace[0].token_ids, 2)])
    seconds: dict[str, list[float]] = {rung.name: [] for rung in rungs}
    rows: dict[str, ServingRow] = {}
    for turn in range(rounds):
        for rung in rungs[turn % len(rungs) :] + rungs[: turn % len(rungs)]:
            engine = rung.engine(num_blocks)
            start = time.perf_counter()
            done = run_engine(engine, trace)
            seconds[rung.name].append(time.perf_counter() - start)
            rows[rung.name] = _rung_row(rung.name, engine, done)
    for name, times in seconds.items():
        row, middle = rows[name], median(times)
        assert row.output_tokens is not None
        row.seconds, row.spread = middle, max(abs(t / middle - 1) for t in times)
        row.tokens_per_second = row.output_tokens / middle
    return [rows[rung.name] for rung in rungs]


def _rungs(
    model: "PreTrainedModel", quantized: "PreTrainedModel | None", shipped: "PreTrainedModel | None", reserved: int
) -> list[_Rung]:
    """`reserved`: how many requests fit without paging."""
    naive = {"attention_backend": "reference"}
    unpaged = naive | {"prefix_caching": False, "max_num_seqs": reserved}
    rungs = [
        _Rung("static batches", model, unpaged | {"policy": "static"}),
        _Rung("+ continuous batching", model, unpaged),
        _Rung("+ paging, prefix cache", model, naive),
    ]
    if model.device.type == "cpu":
        rungs.append(_Rung("+ flash attention", model, {"attention_backend": "sdpa"}))
        if cpu.kernels() is not None:
            rungs.append(_Rung("+ compiled steps", model, {}))
    else:
        rungs.append(_Rung("+ flash attention", model, {}))
    if quantized is not None:
        name = getattr(getattr(quantized.config, "quantization_config", None), "scheme", "quantized")
        rungs.append(_Rung(f"+ {name} weights", quantized, {}))
    if shipped is not None:
        rungs.append(_Rung("weights as published (Q4_1)", shipped, {}))
    last = model if quantized is None else quantized
    return [*rungs, _Rung("+ prompt lookup", last, {"draft": "prompt_lookup"})]


def _rung_row(name: str, engine: Engine, done: list[Completion]) -> ServingRow:
    """What does not depend on the clock, and the median time to the first token."""
    return ServingRow(
        suite="ladder",
        peer="optinfer",
        rung=name,
        requests=len(done),
        ttft_p50=median(c.metrics.time_to_first_token or 0.0 for c in done),
        steps=engine.stats.steps,
        computed_tokens=engine.stats.computed_tokens,
        preemptions=engine.stats.preemptions,
        accepted_tokens=engine.stats.accepted_tokens,
        output_tokens=sum(len(c.token_ids) for c in done),
    )
