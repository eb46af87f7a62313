"""Serving: a trace of ragged requests through our engine, transformers' `generate`, its continuous batching, vLLM and llama.cpp.

All peers serve the same trace in the same run, taking turns, so that a busy moment of the machine hits all of them.
Throughput runs have every request waiting at the start; latency runs have Poisson arrivals.
"""

import contextlib
import copy
import functools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from optinfer import cpu, data, models
from optinfer.bench.worker import Worker, environment_of
from optinfer.quantization.checkpoints.gguf import load_as_shipped
from optinfer.serving import Completion, Engine, SamplingParams

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
    tokenizer: Any,
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
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if rate is not None:
            now += rng.expovariate(rate)
        length = rng.randint(8, longest) if lengths is None else lengths[i]
        trace.append(TraceRequest(list(tokens), length, now))
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
def run_static(model: Any, trace: list[TraceRequest], batch_size: int = 16) -> list[list[int]]:
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


def run_continuous(model: Any, trace: list[TraceRequest]) -> tuple[list[list[int]], float]:
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


def run(quick: bool = False) -> list[dict[str, Any]]:
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
        rows = []
        for num_requests, rounds in ((8, 1),) if quick else ((16, 3), (64, 2)):
            rows += throughput(model, trace_of(num_requests), rounds, peers)
        rows += latency(model, trace_of(8 if quick else 32, rate=2.0), peers)
    quantized = quantize(copy.deepcopy(model), "int4", progress=False)
    shipped, _ = load_as_shipped()
    return rows + ladder(model, quantized, trace_of(8 if quick else 24), num_blocks=96, shipped=shipped)


def throughput(
    model: Any, trace: list[TraceRequest], rounds: int = 3, others: Sequence[Peer] = ()
) -> list[dict[str, Any]]:
    """Serve the trace with every peer in turn, after a warm-up, `rounds` times; the order rotates.

    Raises RuntimeError if a peer leaves out tokens. One of transformers' ways that cannot run here is `skipped`, with why.
    """
    engines: dict[str, Engine] = {}

    def fresh_engine(name: str, **options: Any) -> tuple[list[Served], float]:
        engines[name] = Engine(model, num_blocks=_NUM_BLOCKS, **options)
        return _timed(lambda: served(run_engine(engines[name], trace)))

    def continuous() -> tuple[list[Served], float]:
        tokens, seconds = run_continuous(model, trace)
        return _counted(tokens), seconds

    # Each peer's own seconds: from the first request handed over to the last answer, its memory ready before.
    peers: dict[str, Callable[[], tuple[list[Served], float]]] = {
        "optinfer": lambda: fresh_engine("optinfer"),
        "optinfer, prompt lookup": lambda: fresh_engine("optinfer, prompt lookup", draft="prompt_lookup"),
        "transformers generate": lambda: _timed(lambda: _counted(run_static(model, trace))),
        "transformers generate_batch": continuous,
    }
    warm_up = [TraceRequest(trace[0].token_ids, 2)] * 2
    run_engine(Engine(model, num_blocks=64), warm_up)
    run_static(model, warm_up)
    for peer in others:
        peers[peer.name] = lambda peer=peer: _timed(lambda: peer.serve(trace))  # type: ignore[misc]
        for _ in range(2):  # compiled for the trace's shapes before it counts
            peer.serve(trace)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    results: dict[str, list[Served]] = {}
    skipped: dict[str, str] = {}
    names = list(peers)
    turns = [names[(turn + i) % len(names)] for turn in range(rounds) for i in range(len(names))]
    with tqdm(turns, desc=f"{len(trace)} requests", unit="run") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            if name in skipped:
                continue
            try:
                results[name], took = peers[name]()
            except Exception as error:  # another library's, of any kind
                if not name.startswith("transformers"):
                    raise
                skipped[name] = f"{type(error).__name__}: {error}".split("\n")[0][:80]
                seconds.pop(name)
                continue
            seconds[name].append(took)
            if [done.num_tokens for done in results[name]] != [request.max_tokens for request in trace]:
                raise RuntimeError(f"{name} did not generate what the trace asks for")
    num_tokens = sum(request.max_tokens for request in trace)
    base = median(seconds.get("transformers generate_batch", [math.nan]))
    measured = [
        {
            "suite": "throughput",
            "peer": name,
            "requests": len(trace),
            "output_tokens": num_tokens,
            "seconds": median(times),
            "samples": times,
            "tokens_per_second": num_tokens / median(times),
            "against_generate_batch": None if math.isnan(base) else base / median(times),
            **_percentiles(results[name]),
            **(_memory(engines[name]) if name in engines else {}),
        }
        for name, times in seconds.items()
    ]
    unmeasured = [
        {"suite": "throughput", "peer": name, "requests": len(trace), "seconds": None, "skipped": why}
        for name, why in skipped.items()
    ]
    return measured + unmeasured


def latency(model: Any, trace: list[TraceRequest], others: Sequence[Peer] = ()) -> list[dict[str, Any]]:
    """The trace's arrivals in real time: time to first token and time per output token, in seconds."""
    engine = Engine(model, num_blocks=_NUM_BLOCKS)
    peers: dict[str, Callable[[], list[Served]]] = {"optinfer": lambda: served(run_engine(engine, trace))}
    for peer in others:
        peers[peer.name] = functools.partial(peer.serve, trace)
    rows = []
    for name, serve in peers.items():
        done, seconds = _timed(serve)
        num_tokens = sum(d.num_tokens for d in done)
        rows.append(
            {
                "suite": "latency",
                "peer": name,
                "requests": len(trace),
                "output_tokens": num_tokens,
                "seconds": seconds,
                "tokens_per_second": num_tokens / seconds,
                **_percentiles(done),
                **(_memory(engine) if name == "optinfer" else {}),
            }
        )
    return rows


def _counted(tokens: list[list[int]]) -> list[Served]:
    return [Served(len(own)) for own in tokens]


def _timed(serve: Callable[[], list[Served]]) -> tuple[list[Served], float]:
    start = time.perf_counter()
    done = serve()
    return done, time.perf_counter() - start


def _percentiles(done: list[Served]) -> dict[str, float]:
    """Percentiles of the times that the peer tells (transformers tells none)."""
    found: dict[str, float] = {}
    for field in ("ttft", "tpot"):
        values = [getattr(d, field) for d in done if getattr(d, field) is not None]
        if len(values) > 1:
            cuts = quantiles(values, n=100, method="inclusive")
            found |= {f"{field}_p{p}": cuts[p - 1] for p in (50, 90, 99)}
    return found


def _memory(engine: Engine) -> dict[str, int]:
    stats = engine.stats
    return {
        "cached_tokens": stats.cached_tokens,
        "peak_used_blocks": stats.peak_used_blocks,
        "num_blocks": engine.manager.num_blocks,
        "preemptions": stats.preemptions,
    }


def ladder(
    model: Any,
    quantized: Any,
    trace: list[TraceRequest],
    num_blocks: int = 256,
    rounds: int = 1,
    shipped: Any = None,
) -> list[dict[str, Any]]:
    """The same trace and the same KV memory, with one idea more on each rung.

    The first rungs run the formulas of a textbook over copied pages. Without paging every request reserves the longest
    context of the trace, so fewer run at once. The rungs take turns, after a warm-up of each; ``seconds`` is the median
    and ``spread`` the largest distance from it, as a share.

    Args:
        quantized: the same model with quantized weights; None leaves that rung out.
        shipped: the same model in the 4 bits it was published in, one more rung where it is given.
    """
    longest = max(len(request.token_ids) + request.max_tokens for request in trace)
    reserved = max(1, num_blocks * 16 // longest)
    compiled = cpu.kernels() is not None if model.device.type == "cpu" else True
    naive = {"attention_backend": "reference"}
    rungs: list[tuple[str, Any, dict[str, Any]]] = [
        (
            "static batches",
            model,
            naive | {"policy": "static", "prefix_caching": False, "max_num_seqs": reserved},
        ),
        ("+ continuous batching", model, naive | {"prefix_caching": False, "max_num_seqs": reserved}),
        ("+ paging, prefix cache", model, naive),
    ]
    if model.device.type == "cpu":
        rungs.append(("+ flash attention", model, {"attention_backend": "sdpa"}))
        if compiled:
            rungs.append(("+ compiled steps", model, {}))
    else:
        rungs.append(("+ flash attention", model, {}))
    if quantized is not None:
        name = getattr(getattr(quantized.config, "quantization_config", None), "scheme", "quantized")
        rungs.append((f"+ {name} weights", quantized, {}))
    if shipped is not None:
        rungs.append(("weights as published (Q4_1)", shipped, {}))
    rungs.append(("+ prompt lookup", quantized if quantized is not None else model, {"draft": "prompt_lookup"}))
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in rungs}
    rows = {}
    for _, which, options in rungs:
        run_engine(_rung(which, num_blocks, options), [TraceRequest(trace[0].token_ids, 2)])
    for turn in range(rounds):
        for name, which, options in rungs[turn % len(rungs) :] + rungs[: turn % len(rungs)]:
            engine = _rung(which, num_blocks, options)
            start = time.perf_counter()
            done = run_engine(engine, trace)
            seconds[name].append(time.perf_counter() - start)
            rows[name] = {
                "suite": "ladder",
                "peer": "optinfer",
                "rung": name,
                "requests": len(trace),
                "ttft_p50": median(c.metrics.time_to_first_token or 0.0 for c in done),
                "steps": engine.stats.steps,
                "computed_tokens": engine.stats.computed_tokens,
                "preemptions": engine.stats.preemptions,
                "accepted_tokens": engine.stats.accepted_tokens,
                "output_tokens": sum(len(c.token_ids) for c in done),
            }
    for name, times in seconds.items():
        middle = median(times)
        rows[name] |= {
            "seconds": middle,
            "spread": max(abs(t / middle - 1) for t in times),
            "tokens_per_second": rows[name]["output_tokens"] / middle,
        }
    return [rows[name] for name, _, _ in rungs]


def _rung(model: Any, num_blocks: int, options: dict[str, Any]) -> Engine:
    return Engine(model, num_blocks=num_blocks, **{"max_batched_tokens": 512, **options})
