"""``optinfer quantize``: from a hub id or folder to one that can be served.

optinfer quantize MODEL --method awq --bits 4 --group-size 64 --export compressed-tensors --out DIR
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from optinfer import data
from optinfer.commands.models import load_named, refuse_existing
from optinfer.quantization.checkpoints.save import FORMATS, save_checkpoint
from optinfer.quantization.methods.ladder import METHODS, dequantize, rung
from optinfer.quantization.quality import perplexity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``optinfer quantize``."""
    parser.add_argument("model", help='a hub id, a folder, or "default"')
    parser.add_argument("--method", choices=METHODS, default="awq")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--grid", choices=("symmetric", "affine"), help="affine for awq files, else symmetric")
    parser.add_argument("--export", choices=[f for f in FORMATS if f != "bitsandbytes"], default="compressed-tensors")
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    parser.add_argument("--evaluate", type=int, default=8192, metavar="TOKENS", help="for perplexity (0: skip it)")


def run(args: argparse.Namespace) -> int:
    """Load, quantize, write, and say what it cost: size, perplexity before and after, seconds."""
    refuse_existing(args.out)
    # Files with zero points are the rule for AWQ; in the other formats fewer programs load them, see `save_checkpoint`.
    grid = args.grid or ("affine" if args.export == "awq" else "symmetric")
    model, tokenizer = load_named(args.model)

    def quality() -> str:
        if not args.evaluate:
            return "not measured"
        found = perplexity(model, tokenizer, data.text("evaluation"), max_tokens=args.evaluate, progress=True)
        return f"{found.value:.2f} ± {found.stderr:.2f}"

    before = sum(p.numel() * p.element_size() for p in model.parameters())
    quality_before = quality()
    start = time.perf_counter()
    rung(model, tokenizer, args.method, args.bits, args.group_size, symmetric=grid == "symmetric")
    seconds = time.perf_counter() - start
    folder = save_checkpoint(model, args.out, args.export, tokenizer)
    after = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    dequantize(model)
    quality_after = quality()
    print(f"{args.method}, {args.bits} bits, {grid} groups of {args.group_size}, written as {args.export} to {folder}")
    print(f"{'':12}{'before':>18}{'after':>18}")
    print(f"{'size':12}{before / 1e6:>15.1f} MB{after / 1e6:>15.1f} MB")
    print(f"{'perplexity':12}{quality_before:>18}{quality_after:>18}")
    print(f"{'seconds':12}{'':>18}{seconds:>18.1f}")
    return 0
