"""The hand-over: export the default model, serve it with vLLM's CPU build, ask it with the course's client cell, and
compare its greedy text with our engine's.

    python scripts/vllm_handover.py --python "$(scripts/vllm_environment.sh)" [--json RESULT.json]

Three checkpoints: the model in fp32, where the texts should be equal; in bf16, where two nearly equal logits may swap;
and W4A16 in compressed-tensors format. Where texts part, the script prints how far apart the two tokens' logits are in
our model: a rounding difference has a small gap, a bug a large one. Exit code 1: a gap above `MOST_GAP`.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import optinfer
from optinfer import data
from optinfer.folders import write_whole
from optinfer.serving import Engine, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
LESSON = ROOT / "notebooks" / "source" / "06_putting_it_together.md"
MOST_GAP = {"fp32": 1e-3, "bf16": 0.25, "W4A16": 0.25}  # in logits: a few roundings of a logit of size 16 to 32
ASK = """
import json
import sys

for prompt in json.load(sys.stdin):
    answer = client.completions.create(model="my-model", prompt=prompt, max_tokens=32, temperature=0)
    print(json.dumps(answer.choices[0].text), flush=True)
"""


def client_cell() -> str:
    """The lesson's cell that makes a client and asks one question."""
    cells = re.findall(r"```python\n(.*?)```", LESSON.read_text(encoding="utf-8"), re.S)
    return next(cell for cell in cells if "from openai import OpenAI" in cell)


def prompts() -> list[str]:
    return ["A cache is", *data.prompts("chat")[:4], *data.prompts("summarize")[:1]]


@contextlib.contextmanager
def served(python: str, folder: Path, log: Path, *options: str) -> Iterator[str]:
    """vLLM's OpenAI server on a folder; yields its address. (The `vllm` command needs a package of that name.)"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "my-model", "--max-model-len", "2048", *options]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}"),
    }
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()


def ask(python: str, address: str) -> list[str]:
    """The texts that vLLM's server gives through the `openai` package."""
    cell = client_cell().replace("http://localhost:8000", address)
    done = subprocess.run(
        [python, "-c", cell + ASK], input=json.dumps(prompts()), capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"the client failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()[-len(prompts()) :]]


@torch.inference_mode()
def compare(model: Any, tokenizer: Any, prompt: str, ours: str, theirs: str) -> dict[str, Any]:
    """Where two continuations part, and how far apart our logits of the two tokens are there."""
    if ours == theirs:
        return {"equal": True}
    start = tokenizer(prompt)["input_ids"]
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ours, theirs))
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    if same == min(len(a), len(b)):  # one is the other's beginning: it ended earlier
        return {"equal": False, "same_tokens": same, "gap": None}
    logits = model(torch.tensor([start + a[:same]])).logits[0, -1].float()
    return {"equal": False, "same_tokens": same, "gap": abs(float(logits[a[same]] - logits[b[same]]))}


def hand_over(python: str, name: str, folder: Path, model: Any, tokenizer: Any, *options: str) -> list[dict[str, Any]]:
    """Serve `folder` by vLLM and compare it with our engine on `model`; one row per prompt."""
    done = Engine(model, tokenizer, num_blocks=256).generate(prompts(), SamplingParams(max_tokens=32))
    with served(python, folder, folder.parent / f"{name}.log", *options) as address:
        texts = ask(python, address)
    rows = []
    for prompt, ours, theirs in zip(prompts(), done, texts):
        row = compare(model, tokenizer, prompt, ours.text or "", theirs)
        rows.append({"checkpoint": name, "prompt": prompt[:40], **row, "ours": ours.text, "vllm": theirs})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of vLLM's environment; scripts/vllm_environment.sh prints it")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", choices=tuple(MOST_GAP), action="append", help="one checkpoint (repeatable)")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.only or MOST_GAP:
            dtype = torch.float32 if name == "fp32" else torch.bfloat16
            model, tokenizer = optinfer.load_model(dtype=dtype, device="cpu")
            folder = Path(temporary) / name
            if name == "W4A16":
                quantized = optinfer.quantize(model, "int4", group_size=64, symmetric=True, progress=False)
                optinfer.save_checkpoint(quantized, folder, "compressed-tensors", tokenizer)
            else:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            vllm_dtype = "float32" if name == "fp32" else "bfloat16"
            rows += hand_over(args.python, name, folder, model, tokenizer, "--dtype", vllm_dtype, "--enforce-eager")
            for row in rows[-len(prompts()) :]:
                verdict = "equal" if row["equal"] else f"{row['same_tokens']} tokens equal, then a gap of {row['gap']}"
                print(f"{name:6} {row['prompt']!r:44} {verdict}", flush=True)
    if args.json:
        write_whole(args.json, json.dumps(rows, indent=1) + "\n")
    bad = [row for row in rows if not row["equal"] and (row["gap"] is None or row["gap"] > MOST_GAP[row["checkpoint"]])]
    print(f"{sum(row['equal'] for row in rows)} of {len(rows)} texts equal; {len(bad)} differ by more than rounding")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
