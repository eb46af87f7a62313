"""Serving: a trace of ragged requests through our engine, transformers' `generate` and its continuous batching.

All peers serve the same trace in the same run, taking turns, so that a busy moment of the machine hits all of them.
Throughput runs have every request waiting at the start; latency runs have Poisson arrivals.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from optinfer import data
from optinfer.serving import Completion, Engine, SamplingParams

SYSTEM_PROMPT = (
    "You are a patient teacher of computer science. Answer briefly, with one example, and say what you are unsure of."
)


@dataclass(frozen=True)
class TraceRequest:
    """A prompt, how many tokens to generate (exactly), and when it arrives, in seconds."""

    token_ids: list[int]
    max_tokens: int
    arrival: float = 0.0


def make_trace(
    tokenizer: Any, num_requests: int, rate: float | None = None, seed: int = 0, longest: int = 96
) -> list[TraceRequest]:
    """Chat, summary and rewriting prompts under one system prompt, with ragged output lengths of 8 to `longest`.

    Args:
        rate: Poisson arrivals per second; None: all at once.
    """
    rng = random.Random(seed)
    texts = [text for kind in ("chat", "summarize", "rewrite") for text in data.prompts(kind)]
    trace, now = [], 0.0
    for _ in range(num_requests):
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": rng.choice(texts)}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if rate is not None:
            now += rng.expovariate(rate)
        trace.append(TraceRequest(list(tokens), rng.randint(8, longest), now))
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


def run_continuous(model: Any, trace: list[TraceRequest]) -> list[list[int]]:
    """transformers' continuous batching, which `generate_batch` stands on; here with an output length per request."""
    from transformers import GenerationConfig

    attention = model.config._attn_implementation
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
    results: dict[str, list[int]] = {}
    try:
        with model.continuous_batching_context_manager(generation_config=config, warmup=False) as manager:
            for i, request in enumerate(trace):
                manager.add_request(request.token_ids, request_id=str(i), max_new_tokens=request.max_tokens)
            while len(results) < len(trace):
                output = manager.get_result(timeout=600)
                if output is None:
                    raise RuntimeError("transformers' continuous batching returned nothing for ten minutes")
                if output.is_finished():
                    results[output.request_id] = output.generated_tokens
    finally:
        model.set_attn_implementation(attention)
    return [results[str(i)] for i in range(len(trace))]


# ---- the suite


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Throughput of all peers at 16 and 64 requests (quick: 8), then the engine's latency under Poisson arrivals."""
    import optinfer

    model, tokenizer = optinfer.load_model()
    rows = []
    for num_requests in (8,) if quick else (16, 64):
        trace = make_trace(tokenizer, num_requests, longest=24 if quick else 96)
        rows += throughput(model, trace, rounds=1 if quick else 3)
    rows.append(latency(model, make_trace(tokenizer, 8 if quick else 48, rate=2.0, longest=24 if quick else 96)))
    return rows


def throughput(model: Any, trace: list[TraceRequest], rounds: int = 3) -> list[dict[str, Any]]:
    """Serve the trace with every peer in turn, `rounds` times; the order rotates.

    Raises RuntimeError if a peer leaves out tokens.
    """

    def fresh_engine(**options: Any) -> Callable[[], list[list[int]]]:
        return lambda: [c.token_ids for c in run_engine(Engine(model, num_blocks=1024, fuse=False, **options), trace)]

    peers: dict[str, Callable[[], list[list[int]]]] = {
        "optinfer": fresh_engine(),
        "optinfer, prompt lookup": fresh_engine(draft="prompt_lookup"),
        "transformers generate": lambda: run_static(model, trace),
        "transformers generate_batch": lambda: run_continuous(model, trace),
    }
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds):
        names = list(peers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            result = peers[name]()
            seconds[name].append(time.perf_counter() - start)
            if [len(tokens) for tokens in result] != [request.max_tokens for request in trace]:
                raise RuntimeError(f"{name} did not generate what the trace asks for")
    num_tokens = sum(request.max_tokens for request in trace)
    return [
        {
            "suite": "throughput",
            "peer": name,
            "requests": len(trace),
            "output_tokens": num_tokens,
            "seconds": median(times),
            "samples": times,
            "tokens_per_second": num_tokens / median(times),
        }
        for name, times in seconds.items()
    ]


def latency(model: Any, trace: list[TraceRequest], **options: Any) -> dict[str, Any]:
    """The engine under the trace's arrivals: time to first token and time per output token, in seconds."""
    engine = Engine(model, num_blocks=1024, fuse=False, **options)
    start = time.perf_counter()
    done = run_engine(engine, trace)
    seconds = time.perf_counter() - start
    ttft = [c.metrics.time_to_first_token or 0.0 for c in done]
    tpot = [c.metrics.time_per_output_token or 0.0 for c in done]
    num_tokens = sum(len(c.token_ids) for c in done)
    return {
        "suite": "latency",
        "peer": "optinfer",
        "requests": len(trace),
        "output_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        **{f"ttft_p{p}": _percentile(ttft, p) for p in (50, 90, 99)},
        **{f"tpot_p{p}": _percentile(tpot, p) for p in (50, 90, 99)},
        "cached_tokens": engine.stats.cached_tokens,
        "peak_used_blocks": engine.stats.peak_used_blocks,
        "num_blocks": engine.manager.num_blocks,
        "preemptions": engine.stats.preemptions,
    }


def _percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def ladder(model: Any, quantized: Any, trace: list[TraceRequest], num_blocks: int = 256) -> list[dict[str, Any]]:
    """The same trace and the same KV memory, with one idea more on each rung.

    Without paging every request reserves the longest context of the trace, so fewer run at once.

    Args:
        quantized: the same model with quantized weights; None leaves that rung out.
    """
    longest = max(len(request.token_ids) + request.max_tokens for request in trace)
    reserved = max(1, num_blocks * 16 // longest)
    rungs: list[tuple[str, Any, dict[str, Any]]] = [
        ("static batches", model, {"policy": "static", "prefix_caching": False, "max_num_seqs": reserved}),
        ("+ continuous batching", model, {"prefix_caching": False, "max_num_seqs": reserved}),
        ("+ paging, prefix cache", model, {}),
    ]
    if quantized is not None:
        rungs.append(("+ int8 weights", quantized, {}))
    rungs.append(("+ prompt lookup", quantized if quantized is not None else model, {"draft": "prompt_lookup"}))
    rows = []
    for name, which, options in rungs:
        engine = Engine(which, num_blocks=num_blocks, max_batched_tokens=512, fuse=False, **options)
        start = time.perf_counter()
        done = run_engine(engine, trace)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "suite": "ladder",
                "peer": "optinfer",
                "rung": name,
                "requests": len(trace),
                "seconds": seconds,
                "tokens_per_second": sum(len(c.token_ids) for c in done) / seconds,
                "ttft_p50": median(c.metrics.time_to_first_token or 0.0 for c in done),
                "steps": engine.stats.steps,
                "computed_tokens": engine.stats.computed_tokens,
                "preemptions": engine.stats.preemptions,
                "accepted_tokens": engine.stats.accepted_tokens,
            }
        )
    return rows
