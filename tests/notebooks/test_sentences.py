"""What lessons say, on machines that do not exist: each cell that speaks is run with made-up measurements.

A cell that speaks measures nothing itself, so it needs no model, and a table below tells when each of its sentences is
true. A sentence that is said where it is not true, or kept back where it is, is a contradiction.
"""

import ast
import builtins
import re
from pathlib import Path
from types import SimpleNamespace as Made
from typing import Any

import nbformat
import pytest
import torch

from optinfer import data, memory
from optinfer.course.lesson import Lesson
from optinfer.course.verdicts import every, judge, side
from optinfer.course.workshop import DESIGNS

ROOT = Path(__file__).resolve().parents[2]
WORLDS = ("fast", "slow", "noise", "reversed")
SPEAKS = ("lesson.say(", "lesson.claim(")


def pick(world: str, fast: Any, slow: Any, noise: Any, reversed_: Any) -> Any:
    return dict(zip(WORLDS, (fast, slow, noise, reversed_)))[world]


def start_here(world):
    growth = pick(world, 1.3, 15.0, 5.0, 0.7)
    return {
        "machine": Made(
            matmul_flops=pick(world, 4e11, 2e9, 1e11, 4e11), bandwidth=3e10, ridge=pick(world, 14, 0.1, 3, 14)
        ),
        "one": {"flops": 2.7e8, "bytes": 2.7e8, "seconds": pick(world, 0.012, 0.2, 0.04, 0.004)},
        "sixteen": {"seconds": growth * pick(world, 0.012, 0.2, 0.04, 0.004)},
        "llama": memory.MODELS["Llama-3-70B"],
        "memory": memory,
    }


class Tiny(torch.nn.Module):
    """A model with an embedding and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4)

    def get_input_embeddings(self):
        return self.embedding


def quantization(world):
    kl = pick(world, (0.01, 0.05, 0.2, 0.9), (0.01, 0.05, 0.2, 0.9), (0.01, 0.5, 0.55, 0.6), (0.9, 0.3, 0.1, 0.05))
    error = 0.01 if world != "noise" else 0.1
    names = ("int8", "NF4", "int4", "int3")
    ratio = pick(world, (1.0, 1.02, 1.05, 2), (1.0, 1.1, 1.54, 3), (1.01, 1.1, 1.08, 3), (1.5, 1.3, 1.2, 1))
    times = pick(world, (4, 1), (1, 4), (2, 2.05), (1, 3))
    return {
        "apart": 20, "x": torch.zeros(2, 1536), "with_outliers": {0: 0.0, 1: 0.4},
        "broken": 0.02, "repaired": pick(world, 0.005, 0.019, 0.02, 0.03),
        "errors": {"NF4": 0.1, "FP4": 0.12, "int4, symmetric": pick(world, 0.12, 0.13, 0.1, 0.08), "int4 with zero points": pick(world, 0.13, 0.09, 0.1, 0.05)},
        "model": Tiny(),
        "rows": [{"scheme": n, "kl": k, "kl_stderr": error, "ratio": r, "spread": 0.01} for n, k, r in zip(names, kl, ratio)],
        "timed": [Made(what="token, batch 1", variant=v, peer="optinfer", seconds=s) for v, s in zip(("bf16", "nf4"), times)],
        "counts": {"NF4, look-up in memory": pick(world, 2.0, 22.0, 10.0, 60.0), "NF4, byte permutes": 3.9},
        "asked": {"rows": Made(sectors=pick(world, 16784, 9000, 8864, 8000), instructions=48_040), "groups": Made(sectors=8864, instructions=48_556)},
        "lanes": 132 * 128 * 1.755e9,
        "moved": {"NF4": Made(value=0.25, stderr=0.02)}, "DESIGNS": DESIGNS, "mine": DESIGNS["NF4"],
        "result": Made(value=pick(world, 0.1, 0.7, 0.26, 0.7), stderr=0.02),
        "gigabytes": {"Llama-2-70B": [138, 69.6, 37.4, 39.5, 36.7], "Mistral-7B": [14.48, 7.5, 4.2, 4.45, 4.13]},
    }  # fmt: skip


def calibrated(world):
    ratios = pick(world, (0.6, 0.05), (1.4, 0.05), (0.9, 0.3), (1.5, 0.1))
    four = pick(world, (64.0, 58.0, 52.0), (64.0, 52.0, 58.0), (58.5, 57.9, 57.6), (50.0, 58.0, 64.0))
    two = pick(world, (500.0, 300.0, 90.0), (5e5, 4e3, 7e2), (5e5, 4e3, 7e2), (5e5, 4e3, 7e2))
    names = {"rtn": "nearest", "gptq": "GPTQ", "awq": "AWQ", "qat": "QAT"}
    share = pick(world, 0.6, -0.3, 0.05, -0.5)
    return {
        "paired": lambda one, other: ratios,
        "alphas": [0.25, 0.5], "best_alpha": 0.25, "by_alpha": pick(world, [120, 90, 100], [120, 110, 125], [120, 119, 118], [120, 130, 140]),
        "rungs": {"scaled": pick(world, 90, 110, 118, 120)},
        "distance": pick(world, 1.3, 1.1, 1.0, 0.9),
        "errors": {"GPTQ": pick(world, 0.5, 0.97, 1.0, 1.2), "GPTQ, largest inputs first": pick(world, 0.4, 1.1, 1.0, 1.2)},
        "on_unseen": pick(world, 0.6, 1.4, 1.0, 2.0),
        "counts": 250.0,
        "lines": {n: {4: (a, 2.0), 2: (b, 5.0)} for n, a, b in zip(("nearest", "GPTQ", "AWQ"), four, two)},
        "names": names, "shares": {"GPTQ": share, "AWQ": share, "QAT": share},
        "recorded": Made(caption=lambda: "made up"),
    }  # fmt: skip


def attention(world):
    return {
        "exponent": pick(world, 2.0, 1.2, 1.8, 3.0), "one_layer": 6.4, "ratio": 3.9,
        "low": pick(world, 12.0, 3.0, 9.0, 1.0), "high": pick(world, 60.0, 8.0, 11.0, 2.0),
        "error": {"triton": pick(world, 0.004, 0.011, 0.01, 0.5), "reference": 0.01},
        "executed": pick(world, 425_984, 425_984, 500_000, 425_984), "predicted": 425_984,
        "races": pick(world, 5, 3, 0, 4), "barriers": pick(world, 5, 6, 6, 6), "lucky": pick(world, 2, 0, 0, 4),
        "naive_s": pick(world, 0.02, 0.01, 0.0101, 0.002), "sdpa_s": 0.01, "difference": pick(world, 1e-7, 1e-7, 1e-7, 1e-2),
    }  # fmt: skip


def kv_cache(world):
    def run(batch, wasted):
        return Made(batch=batch, usage=Made(wasted=wasted, reserved=0.6 * wasted * 16_384, external=0.4 * wasted * 16_384))

    peers = {"contiguous": 1.0, "paged: gather, then sdpa": 3.0, "copy": 2.0}
    loops = pick(world, 1.2, None, 2.95, 5.0)
    if loops:
        peers["paged: loops"] = loops
    paged = torch.arange(4)
    return {
        "with_cache": 1.0, "without": pick(world, 5.0, 12.0, 1.0, 0.6),
        "tokens": pick(world, 23_296, 23_296, 11_648, 23_296),
        "outcome": {"max": run(8, 0.78), "oracle": run(19, 0.49), "pages of 16": pick(world, run(37, 0.03), run(10, 0.2), run(8.1, 0.4), run(4, 0.9))},
        "unchanged": world != "reversed",
        "rows": [Made(peer=p, context=2048, over_contiguous=x) for p, x in peers.items()],
        "config": None, "kv_bytes_per_token": lambda *_: 23_040,
        "pool": 16_384,
        "judged": {"4 first and 60 last": Made(kl=0.5), "int4": Made(kl=pick(world, 0.01, 0.01, 0.3, 0.01)), "64 last": Made(kl=pick(world, 4.0, 4.0, 0.6, 0.4))},
        "found_it": {
            "everything": world != "reversed", "4 first and 60 last": world == "noise", "int4": world != "slow", "64 last": False,
        },
        "plain": torch.arange(4), "paged": paged if world != "reversed" else paged + 1,
    }  # fmt: skip


def speculative(world):
    from optinfer.speculative import optimal_gamma

    lookup = pick(world, (5.0, 3.0, 1.3), (0.9, 0.8, 0.7), (1.05, 1.0, 0.97), (0.5, 0.5, 0.5))
    poor = pick(world, (0.6, 0.6, 0.7), (0.3, 0.3, 0.3), (1.0, 0.98, 1.02), (2.0, 2.0, 2.0))
    kinds = ("copy", "summarize", "open")
    modes = {
        "plain": {},
        "transformers prompt lookup": {},
        "prompt lookup": {},
        "first 4 of 30 layers": {},
        "lookup then head": {},
    }
    gains = {name: poor if "layers" in name else lookup for name in modes}
    drafted = {
        0.0: pick(world, (0.8, 0.5, 0.3), (0.7, 0.4, 0.2), (1.0, 1.0, 0.98), (0.3, 0.5, 0.9)),
        1.0: pick(world, (1.5, 2.5, 4.0), (0.8, 0.6, 0.4), (1.0, 1.02, 1.01), (3, 2, 1)),
    }
    return {
        "partly_right": pick(world, [3], [], [1], [2]),
        "cost_of": {1: 1.0, 5: pick(world, 1.2, 5.0, 2.5, 0.7)},
        "modes": modes, "names": list(modes)[1:],
        "results": {kind: {n: Made(speedup=g[i], tokens_per_pass=pick(world, 8.0, 1.1, 1.1, 0.5)) for n, g in gains.items()} for i, kind in enumerate(kinds)},
        "learned": pick(world, 0.7, 0.2, 0.15, 0.1), "unseen": pick(world, 0.15, 0.12, 0.15, 0.3),
        "points": [Made(accuracy=a, gamma=g, speedup=x) for a, xs in drafted.items() for g, x in zip((1, 4, 10), xs)],
        "reached": {1: 1.0, 10: pick(world, 1.0, 1.0, 1.0, 0.5)},
        "verify_cost": pick(world, lambda n: 1.0, lambda n: float(n), lambda n: 0.5 + n / 2, lambda n: 1.0),
        "brought": {1: 1.8, 3: pick(world, 2.6, 1.82, 1.8, 1.5)}, "checked": {1: 1.3, 3: 3.6},
        "cost": {1: 30, 3: pick(world, 22, 41, 31, 60)},
        "served": {1: 1.8, 3: pick(world, 2.6, 1.82, 1.8, 1.5)},
        "optimal_gamma": optimal_gamma, "small_model": {}, "worst": pick(world, 1e-16, 1e-16, 1e-16, 0.1),
    }  # fmt: skip


def together(world):
    rungs = (
        "static batches",
        "+ continuous batching",
        "+ paging, prefix cache",
        "+ flash attention",
        "+ int4 weights",
        "+ prompt lookup",
    )
    step = pick(world, 1.4, 0.9, 1.02, 0.6)
    spread = pick(world, 0.02, 0.02, 0.3, 0.02)
    speed = pick(world, 1.0, 1.0, 1.02, 0.5)
    return {
        "equal": [True, True, world != "reversed"], "hostile": Made(stats=Made(preemptions=pick(world, 2, 3, 0, 1))),
        "lengths": [2, 9, 3, 4, 8, 1], "slots": 4,
        "static": Made(stats=Made(steps=17)), "mixed": Made(stats=Made(steps=pick(world, 9, 12, 17, 17))),
        "ladder": [Made(rung=r, tokens_per_second=50 * step**i, spread=spread) for i, r in enumerate(rungs)],
        "latency": {"16 bits": 0.012, "4 bits": pick(world, 0.007, 0.02, 0.0121, 0.03), "4 bits, prompt lookup": pick(world, 0.003, 0.03, 0.0122, 0.09)},
        "speeds": {256: 10.0, 2048: pick(world, 45.0, 13.0, 10.2, 6.0)}, "together": {256: 2.0, 2048: 12.0},
        "recorded": Made(where=lambda **_: [{"requests": 16, "peer": p, "tokens_per_second": t} for p, t in (("optinfer", 200 * speed), ("optinfer, prompt lookup", 900), ("vLLM 0.32.0, CPU", pick(world, 150, 300, 200, 200)))]),
        "fixed": pick(world, 0.01, 0.001, 0.02, -0.01), "per_token": pick(world, 0.0005, 0.01, 0.001, 0.001),
        "bandwidth": 3e10, "weights": 2.7e8, "lean": pick(world, 0.02, 0.3, 0.07, 0.001),
        "promises": ("above", "tight"), "doubt": dict.fromkeys([(n, b) for n in ("above", "tight") for b in (1.0, 0.2)], 3.0),
        "kept": {("above", 1.0): 98, ("above", 0.2): pick(world, 98, 85, 97, 99), ("tight", 1.0): 95, ("tight", 0.2): pick(world, 85, 60, 94, 100)},
        "tail": {True: Made(ttft={99: 0.2}, tpot={99: 0.027}), False: Made(ttft={99: pick(world, 0.4, 0.5, 0.2, 0.1)}, tpot={99: pick(world, 0.019, 0.02, 0.027, 0.05)})},
    }  # fmt: skip


LESSONS = {
    "00_start_here": start_here, "01_quantization": quantization, "02_calibrated_quantization": calibrated,
    "03_flash_attention": attention, "04_kv_cache": kv_cache, "05_speculative_decoding": speculative,
    "06_putting_it_together": together,
}  # fmt: skip


def speaking_cells(name: str) -> list[str]:
    cells = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4).cells
    return [c.source for c in cells if c.cell_type == "code" and any(word in c.source for word in SPEAKS)]


def run(name: str, world: str, monkeypatch, tmp_path) -> tuple[str, dict[int, tuple[str, str]], dict[str, Any]]:
    """What a lesson says in a world, its verdicts by claim with what was measured, and the names it then knows."""
    monkeypatch.setenv("OPTINFER_PROGRESS", str(tmp_path))
    lesson = Lesson(name, torch.device("cpu"), torch.float32, 0)
    said: list[str] = []
    monkeypatch.setattr(lesson, "_show", lambda card: said.append(card.title))
    known = {"lesson": lesson, "torch": torch, "judge": judge, "side": side, "every": every, **LESSONS[name](world)}
    for source in speaking_cells(name):
        exec(compile(source, name, "exec"), known)
    return "\n".join(said), {n: (line.verdict, line.measured) for n, line in lesson._ledger.items()}, known


def ladder_gain(k, name):
    return next(gain for rung, gain in k["gains"].items() if name in rung)


# (lesson, what is said, when it is true). Every sentence must be said exactly where its condition holds.
TRUTHS = [
    ("00_start_here", r"wall is reading", lambda k: k["one"]["bytes"] / k["machine"].bandwidth > k["one"]["flops"] / k["machine"].matmul_flops and k["one"]["seconds"] > 0.0086),
    ("00_start_here", r"wall is arithmetic", lambda k: k["one"]["bytes"] / k["machine"].bandwidth < k["one"]["flops"] / k["machine"].matmul_flops and k["one"]["seconds"] > 0.0086),
    ("00_start_here", r"faster than the wall", lambda k: k["one"]["seconds"] < 0.0086),
    ("00_start_here", r"Sixteen users took less time than one", lambda k: k["sixteen"]["seconds"] < k["one"]["seconds"]),
    ("00_start_here", r"they share", lambda k: 1 <= k["sixteen"]["seconds"] / k["one"]["seconds"] <= 4),
    ("00_start_here", r"saves next to nothing", lambda k: k["sixteen"]["seconds"] / k["one"]["seconds"] >= 12),
    ("00_start_here", r"memory is the wall up to", lambda k: k["machine"].ridge > 1),
    ("01_quantization", r"in 16 bits makes the error", lambda k: k["repaired"] < 0.8 * k["broken"]),
    ("01_quantization", r"symmetric int4 is better than NF4", lambda k: k["errors"]["int4, symmetric"] < 0.98 * k["errors"]["NF4"]),
    ("01_quantization", r"An affine grid is better", lambda k: k["errors"]["int4 with zero points"] < 0.98 * k["errors"]["NF4"]),
    ("01_quantization", r"An affine grid errs", lambda k: k["errors"]["int4 with zero points"] > 1.02 * k["errors"]["NF4"]),
    ("01_quantization", r"each bit that goes costs more", lambda k: (kl := [r["kl"] for r in k["rows"]]) == sorted(kl) and kl[3] - kl[2] > (kl[2] - kl[0]) / 4),
    ("01_quantization", r"fewer bits, a larger distance", lambda k: (kl := [r["kl"] for r in k["rows"]]) == sorted(kl) and kl[3] - kl[2] < (kl[2] - kl[0]) / 4),
    ("01_quantization", r"no ranking", lambda k: abs(k["by"]["int4"]["kl"] - k["by"]["NF4"]["kl"]) < 2 * 2**0.5 * k["by"]["NF4"]["kl_stderr"]),
    ("01_quantization", r"batch 1: 4 bits are slower", lambda k: k["timed"][1].seconds > 1.2 * k["timed"][0].seconds),
    ("01_quantization", r"batch 1: 4 bits are \S+ times as fast", lambda k: k["timed"][0].seconds > 1.2 * k["timed"][1].seconds),
    ("01_quantization", r"still faster\.", lambda k: k["counts"]["NF4, look-up in memory"] > 12.4),
    ("01_quantization", r"times fewer sectors", lambda k: k["asked"]["rows"].sectors > 1.2 * k["asked"]["groups"].sectors),
    ("01_quantization", r"order of the scales changes little", lambda k: k["asked"]["rows"].sectors <= 1.2 * k["asked"]["groups"].sectors),
    ("01_quantization", r"times as far as NF4", lambda k: k["result"].value > 0.31),
    ("01_quantization", r"moves the model less than NF4", lambda k: k["result"].value < 0.19),
    ("01_quantization", r"this design and NF4 the text cannot decide", lambda k: 0.2 < k["result"].value < 0.3),
    ("02_calibrated_quantization", r"Choosing by activation beats", lambda k: k["paired"]("", "")[0] < 0.9),
    ("02_calibrated_quantization", r"Choosing by activation is worse", lambda k: k["paired"]("", "")[0] > 1.1),
    ("02_calibrated_quantization", r"Too much is worse again", lambda k: k["by_alpha"][-1] > k["rungs"]["scaled"]),
    ("02_calibrated_quantization", r"output is \*closer\*", lambda k: k["errors"]["GPTQ"] < 0.98),
    (
        "02_calibrated_quantization",
        r"large inputs first helps",
        lambda k: k["errors"]["GPTQ, largest inputs first"] < 0.99 * k["errors"]["GPTQ"],
    ),
    ("02_calibrated_quantization", r"\*worse\* than nearest", lambda k: k["on_unseen"] > 1.02),
    ("02_calibrated_quantization", r"every method has lost", lambda k: all(points[2][0] >= k["counts"] for points in k["lines"].values())),
    ("03_flash_attention", r"neither a floor nor a ceiling", lambda k: k["low"] < 10 < k["high"]),
    ("03_flash_attention", r"please report", lambda k: k["error"]["triton"] > 2 * k["error"]["reference"]),
    ("03_flash_attention", r"Equal to the byte", lambda k: k["executed"] == k["predicted"]),
    ("03_flash_attention", r"barriers are needed", lambda k: k["races"] > 0),
    ("03_flash_attention", r"right all the same", lambda k: k["lucky"] > 0),
    ("03_flash_attention", r"also gave another result", lambda k: k["races"] and not k["lucky"]),
    ("03_flash_attention", r"Where nothing is found, the barrier may", lambda k: k["races"] < k["barriers"]),
    ("03_flash_attention", r"slower than the textbook", lambda k: k["naive_s"] < 0.9 * k["sdpa_s"]),
    ("03_flash_attention", r"as fast as the textbook here", lambda k: k["naive_s"] > 1.1 * k["sdpa_s"]),
    ("04_kv_cache", r"no gain that this measurement", lambda k: k["without"] < 1.1 * k["with_cache"]),
    ("04_kv_cache", r"the same count", lambda k: k["tokens"] == 23_296),
    ("04_kv_cache", r"times as many requests at once", lambda k: k["outcome"]["pages of 16"].batch > 1.1 * k["outcome"]["max"].batch),
    ("04_kv_cache", r"every token is the same", lambda k: k["unchanged"]),
    ("04_kv_cache", r"No kernel reads pages in place", lambda k: not any("loops" in r.peer for r in k["rows"])),
    ("04_kv_cache", r"even more than copying", lambda k: any("loops" in r.peer and r.over_contiguous > 3.2 for r in k["rows"])),
    ("04_kv_cache", r"calls them attention sinks", lambda k: k["judged"]["64 last"].kl > 0.75),
    ("04_kv_cache", r"has lost the needle", lambda k: k["found_it"]["everything"] and not k["found_it"]["4 first and 60 last"]),
    ("04_kv_cache", r"and failed by the second: int4", lambda k: k["judged"]["int4"].kl < 0.2 and k["found_it"]["everything"] and not k["found_it"]["int4"]),
    ("04_kv_cache", r"judge here finds the needle too", lambda k: k["found_it"]["everything"] and (k["judged"]["int4"].kl > 0.2 or k["found_it"]["int4"])),
    ("04_kv_cache", r"judges nothing here", lambda k: not k["found_it"]["everything"]),
    ("05_speculative_decoding", r"more, not 400 %", lambda k: 1.1 <= k["cost_of"][5] < 2),
    ("05_speculative_decoding", r"Step to pass", lambda k: bool(k["partly_right"])),
    ("05_speculative_decoding", r"speculation cannot pay", lambda k: k["cost_of"][5] >= 4),
    ("05_speculative_decoding", r"Prompt lookup: faster on copy", lambda k: k["results"]["copy"]["prompt lookup"].speedup > 1.1),
    ("05_speculative_decoding", r"begin with reading the prompt", lambda k: k["copied"].tokens_per_pass > 1.1 * k["copied"].speedup),
    ("05_speculative_decoding", r"First 4 of 30 layers: slower on copy", lambda k: k["results"]["copy"]["first 4 of 30 layers"].speedup < 0.9),
    ("05_speculative_decoding", r"learned its few conversations by heart", lambda k: k["learned"] > k["unseen"] + 0.1),
    ("05_speculative_decoding", r"times the tokens of a pass", lambda k: k["brought"][3] > 1.05 * k["brought"][1]),
    ("05_speculative_decoding", r"bring hardly anything", lambda k: 0.95 < k["brought"][3] / k["brought"][1] < 1.05),
    ("05_speculative_decoding", r"the tree pays", lambda k: k["cost"][1] > 1.1 * k["cost"][3]),
    ("05_speculative_decoding", r"the tree does not pay", lambda k: k["cost"][1] < 0.9 * k["cost"][3]),
    ("05_speculative_decoding", r"tree and chain are level", lambda k: 0.9 < k["cost"][1] / k["cost"][3] < 1.1),
    ("05_speculative_decoding", r"from a pass with its tree", lambda k: k["served"][3] > 1.05 * k["served"][1]),
    ("05_speculative_decoding", r"tree and chain bring about the same", lambda k: 0.95 < k["served"][3] / k["served"][1] < 1.05),
    ("05_speculative_decoding", r"tree brings no more than a chain", lambda k: k["served"][3] < 0.95 * k["served"][1]),
    ("05_speculative_decoding", r"useless draft loses more", lambda k: k["points"][2].speedup < k["points"][0].speedup - 0.05),
    ("05_speculative_decoding", r"perfect one gains", lambda k: k["points"][5].speedup > k["points"][3].speedup + 0.05 and k["reached"][10] == 1),
    ("05_speculative_decoding", r"was not perfect", lambda k: k["reached"][10] < 0.99),
    ("06_putting_it_together", r"although requests were preempted", lambda k: k["hostile"].stats.preemptions and all(k["equal"])),
    ("06_putting_it_together", r"no hard test", lambda k: not k["hostile"].stats.preemptions),
    ("06_putting_it_together", r"saves nothing", lambda k: k["static"].stats.steps <= k["mixed"].stats.steps),
    ("06_putting_it_together", r"Faster than the rung below:.*int4", lambda k: ladder_gain(k, "int4") > 1 + k["noise"]["int4 weights"]),
    ("06_putting_it_together", r"Slower than the rung below:.*int4", lambda k: ladder_gain(k, "int4") < 1 - k["noise"]["int4 weights"]),
    ("06_putting_it_together", r"No difference.*int4", lambda k: abs(ladder_gain(k, "int4") - 1) <= k["noise"]["int4 weights"]),
    ("06_putting_it_together", r"4-bit weights are slower", lambda k: k["latency"]["4 bits"] > 1.06 * k["latency"]["16 bits"]),
    ("06_putting_it_together", r"bytes are what this step waits for", lambda k: k["latency"]["16 bits"] > 1.06 * k["latency"]["4 bits"]),
    ("06_putting_it_together", r"slows these three answers", lambda k: k["latency"]["4 bits, prompt lookup"] > 1.06 * k["latency"]["4 bits"]),
    ("06_putting_it_together", r"Yes: .* share a step", lambda k: k["speeds"][2048] > 1.1 * k["speeds"][256]),
    ("06_putting_it_together", r"larger cache made it slower", lambda k: k["speeds"][2048] < 0.9 * k["speeds"][256]),
    ("06_putting_it_together", r"because eight requests share", lambda k: 8 / k["lean"] > 1.06 * 111 and 8 / k["lean"] < 8 * 111),
    ("06_putting_it_together", r"vLLM's CPU build was \S+ times as fast", lambda k: k["speed"][16, "vLLM"] > 1.06 * k["speed"][16, "optinfer"]),
    ("06_putting_it_together", r"promise above is broken", lambda k: k["kept"]["above", 0.2] < 93),
    ("06_putting_it_together", r"promise above does not feel the bursts", lambda k: 94 < k["kept"]["above", 0.2] < 102),
    ("06_putting_it_together", r"promise tight is kept \S+ times more", lambda k: k["kept"]["tight", 0.2] > 99.5),
    ("06_putting_it_together", r"Cutting brings the slowest first token", lambda k: k["tail"][False].ttft[99] > 0.22),
    ("06_putting_it_together", r"The others pay for it", lambda k: k["tail"][False].tpot[99] < 0.024),
    ("06_putting_it_together", r"found no fixed cost", lambda k: k["fixed"] <= 0),
]  # fmt: skip

# Verdicts that the four worlds must get, in their order.
LEDGER = {
    ("01_quantization", 2): ("holds", "in part", "holds", "in part"),
    ("02_calibrated_quantization", 3): ("holds", "does not hold", "does not hold", "does not hold"),
    ("02_calibrated_quantization", 4): ("holds", "does not hold", "does not hold", "does not hold"),
    ("03_flash_attention", 6): ("holds", "in part", "holds", "in part"),
    ("03_flash_attention", 7): ("holds", "does not hold", "in part", "does not hold"),
    ("03_flash_attention", 8): ("holds", "holds", "holds", "does not hold"),
    ("04_kv_cache", 9): ("in part", "in part", "does not hold", "does not hold"),
    ("04_kv_cache", 10): ("holds", "in part", "in part", "does not hold"),
    ("05_speculative_decoding", 11): ("in part", "does not hold", "does not hold", "does not hold"),
    ("05_speculative_decoding", 12): ("holds", "holds", "holds", "does not hold"),
    ("05_speculative_decoding", 13): ("holds", "in part", "does not hold", "does not hold"),
    ("06_putting_it_together", 9): ("holds", "in part", "does not hold", "does not hold"),
    ("06_putting_it_together", 14): ("holds", "does not hold", "does not hold", "does not hold"),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", LESSONS)
def test_no_sentence_contradicts_the_numbers(name, world, monkeypatch, tmp_path):
    said, ledger, known = run(name, world, monkeypatch, tmp_path)
    for lesson, sentence, true in TRUTHS:
        if lesson == name:
            assert bool(re.search(sentence, said)) == bool(true(known)), (sentence, said)
    for number, (verdict, measured) in ledger.items():
        expected = LEDGER.get((name, number))
        assert measured and verdict == (expected[WORLDS.index(world)] if expected else verdict), (number, verdict)


@pytest.mark.parametrize("name", LESSONS)
def test_every_sentence_of_the_table_can_be_said_and_kept_back(name, monkeypatch, tmp_path):
    texts = [run(name, world, monkeypatch, tmp_path)[0] for world in WORLDS]
    for lesson, sentence, _ in TRUTHS:
        if lesson == name:
            assert len({bool(re.search(sentence, text)) for text in texts}) == 2, sentence


@pytest.mark.parametrize("name", LESSONS)
def test_cells_that_speak_measure_nothing(name):
    """What they know is made up here, and nothing of it is a clock or a model."""
    known = {"lesson", "torch", "judge", "side", "every", *dir(builtins), *LESSONS[name]("fast")}
    for source in speaking_cells(name):
        tree = ast.parse(source)
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
            elif isinstance(node, ast.arg):
                known.add(node.arg)
            elif isinstance(node, ast.FunctionDef):
                known.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                assert node.module == "optinfer.course.verdicts"
                known.update(alias.name for alias in node.names)
        assert used <= known, used - known


def test_all_claims_get_their_verdict_from_a_cell_that_speaks():
    numbers = {
        int(n) for name in LESSONS for cell in speaking_cells(name) for n in re.findall(r"lesson\.claim\((\d+)", cell)
    }
    assert numbers == set(data.claims())
