"""The ladder of lesson 2: the perplexity that each method keeps of the default model, one rung at a time.

    python -m optinfer.bench.calibrated_quantization --bits 3 4 2 --out data/results

Hours on a laptop, so `optinfer bench all` leaves it out. Every rung runs in a process of its own (the peak of memory is
then the method's). As a module, it writes each when it is done; what the file already holds is not measured again.

llm-compressor takes part where the environment variable `OPTINFER_LLMCOMPRESSOR_PYTHON` names the python of its
environment; `scripts/llmcompressor_environment.sh` makes one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from tqdm.auto import tqdm

from optinfer import data, hardware, models, results
from optinfer.bench.rows import CalibratedQuantizationRow, read
from optinfer.quantization.methods.calibrate import calibrate
from optinfer.quantization.methods.ladder import CALIBRATION, EIGHT_BITS, METHODS, Rung, dequantize, rung
from optinfer.quantization.quality import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

SUITE = "calibrated_quantization"
EVALUATION_TOKENS = 8192
GROUP_SIZE = 64
LLM_COMPRESSOR = "llm-compressor"
PeerMethod = Literal["gptq", "awq"]
PEER_METHODS = get_args(PeerMethod)


def measure(method: Rung | Literal["none"], bits: int) -> CalibratedQuantizationRow:
    """The default model quantized by one method of ours: a row without names.

    8-bit activations stay quantized while judged.
    """
    model, tokenizer = models.load_model()
    for parameter in model.parameters():
        parameter.detach().sum()  # mapped from the file: a weight that nobody has read occupies nothing yet
    loaded = hardware.peak_memory_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    if method != "none":
        rung(model, tokenizer, method, bits, GROUP_SIZE)
    row = CalibratedQuantizationRow(
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
        peak_bytes=hardware.peak_memory_bytes(),
        peak_bytes_after_load=loaded,
    )
    return replace(row, **quality(model if method in EIGHT_BITS else dequantize(model), tokenizer))


def measure_llm_compressor(method: PeerMethod, bits: int) -> CalibratedQuantizationRow:
    """The same for llm-compressor's method: same model, same calibration tokens, judged by the same function.

    Raises:
        RuntimeError: it broke off; the end of its log is in the message.
    """
    from safetensors.torch import load_file

    model, tokenizer = models.load_model()
    sequences = calibrate(model, tokenizer, **CALIBRATION).sequences.tolist()
    worker = Path(__file__).with_name("llmcompressor_worker.py")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        order = {
            "model": str(models.default_model_path()), "sequences": sequences, "method": method, "bits": bits,
            "group_size": GROUP_SIZE, "out": str(weights),
        }  # fmt: skip
        command = [os.environ["OPTINFER_LLMCOMPRESSOR_PYTHON"], str(worker)]
        done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise RuntimeError(f"llm-compressor broke off:\n{done.stderr[-3000:]}")
        found = model.load_state_dict(load_file(weights), strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:
        raise RuntimeError(f"llm-compressor's weights are not those of the model: {found}")
    return CalibratedQuantizationRow(**json.loads(done.stdout.splitlines()[-1]), **quality(model, tokenizer))


def quality(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Perplexity on the course's evaluation text."""
    found = perplexity(model, tokenizer, data.text("evaluation"), max_tokens=EVALUATION_TOKENS)
    return {"perplexity": found.value, "stderr": found.stderr, "tokens": found.tokens, "windows": list(found.windows)}


def cases(bits: list[int], methods: list[str]) -> list[tuple[str, str, int]]:
    """What to measure, as (peer, method, bits)."""
    wanted = [("optinfer", "none", 16)]
    wanted += [("optinfer", method, width) for width in bits for method in methods if method in METHODS]
    wanted += [("optinfer", method, 8) for method in methods if method in EIGHT_BITS]
    if "OPTINFER_LLMCOMPRESSOR_PYTHON" in os.environ:
        wanted += [(LLM_COMPRESSOR, method, width) for width in bits for method in methods if method in PEER_METHODS]
    return wanted


def run(quick: bool = False) -> list[CalibratedQuantizationRow]:
    """Rows for `optinfer bench calibrated_quantization`.

    Args:
        quick: rounding to nearest in 4 bits alone, beside the model as it is.
    """
    wanted = cases([4], ["rtn"]) if quick else cases([3, 4, 2], [*METHODS, *EIGHT_BITS])
    return [_in_a_process(*case) for case in tqdm(wanted, desc="rungs", unit="rung")]


def _in_a_process(peer: str, method: str, bits: int) -> CalibratedQuantizationRow:
    """One case of `cases`, measured in a process of its own, with its names, date and load."""
    row = isolated(measure if peer == "optinfer" else measure_llm_compressor, method, bits)
    row = replace(row, peer=peer, method=method, bits=bits, group_size=GROUP_SIZE if method in METHODS else None)
    row.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return row


def isolated(function: Callable[..., T], *args: Any) -> T:
    """The function's result from a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.default_folder())
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 2])
    every = [*METHODS, *EIGHT_BITS]
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    args = parser.parse_args(arguments)
    file = args.out / results.file_name(SUITE, results.provenance())
    rows = read(SUITE, results.read(file).rows) if file.exists() else []
    for peer, method, bits in cases(args.bits, args.methods):
        names: dict[str, Any] = {"peer": peer, "method": method, "bits": bits}
        if any(names.items() <= old.names.items() for old in rows):
            continue
        row = _in_a_process(peer, method, bits)
        rows.append(row)
        results.save(SUITE, [each.as_dict() for each in rows], args.out)
        print({k: v for k, v in row.as_dict().items() if k != "windows"}, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
