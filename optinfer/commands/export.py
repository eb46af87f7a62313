"""``optinfer export``: a model, quantized or not, as a folder that others load.

optinfer export MODEL --format compressed-tensors --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from optinfer.commands.models import load_named, refuse_existing
from optinfer.folders import new_folder
from optinfer.quantization.checkpoints.save import FORMATS, save_checkpoint
from optinfer.quantization.linear import QuantizedLinear
from optinfer.quantization.methods.ladder import dequantize

PLAIN = "transformers"  # ordinary weights, nothing packed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``optinfer export``."""
    parser.add_argument("model", help='a hub id, a folder (also one in this package\'s own format), or "default"')
    parser.add_argument(
        "--format", choices=(PLAIN, *FORMATS), default="compressed-tensors", help="transformers: unpacked"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of what is not quantized")
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")


def run(args: argparse.Namespace) -> int:
    """Write a model as a folder that others load: packed as it was quantized, or as ordinary weights."""
    refuse_existing(args.out)
    model, tokenizer = load_named(args.model, dtype=args.dtype, device="cpu")
    if args.format == PLAIN:
        dequantize(model)
        with new_folder(args.out) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    elif any(isinstance(module, QuantizedLinear) for module in model.modules()):
        save_checkpoint(model, args.out, args.format, tokenizer)
    else:
        raise ValueError(
            f"{args.model} is not quantized, and --format {args.format} holds quantized weights: "
            f"use `optinfer quantize {args.model} --export …`, or --format {PLAIN}"
        )
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(f"{args.model} written as {args.format} to {args.out}: {size / 1e6:.1f} MB of weights")
    return 0
