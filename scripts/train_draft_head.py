"""Train the draft head of the default model on text it writes itself: generate, train, evaluate, ship.

    nice -n 19 python scripts/train_draft_head.py generate --shards 40      # resumes: finished shards are kept
    nice -n 19 python scripts/train_draft_head.py train --minutes 20        # resumes from its last checkpoint

Each stage can be stopped at any time and started again. On two CPU cores a useful run takes a couple of hours, most of
it generating; on a GPU, minutes.
"""

import argparse
from pathlib import Path

import torch

from optinfer.models import cache_directory, load_model
from optinfer.speculative.self_talk import self_talk


def generate(arguments: argparse.Namespace) -> None:
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    model, tokenizer = load_model(arguments.model, device=arguments.device)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for shard in tqdm(range(arguments.shards), desc="self-talk", unit="shard"):
        path = arguments.folder / f"shard-{shard:04d}.safetensors"
        if path.exists():
            continue
        talk = self_talk(model, tokenizer, arguments.rows, arguments.length, seed=shard)
        partial = path.with_suffix(".partial")
        save_file({name: tensor.cpu() for name, tensor in talk.items()}, partial)
        partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the embedded model")
    parser.add_argument("--device", default=None)
    parser.add_argument("--folder", type=Path, default=cache_directory() / "self_talk")
    stages = parser.add_subparsers(required=True)
    stage = stages.add_parser("generate", help="let the target talk to itself")
    stage.add_argument("--shards", type=int, default=40)
    stage.add_argument("--rows", type=int, default=96, help="conversations per shard")
    stage.add_argument("--length", type=int, default=256, help="tokens per conversation")
    stage.set_defaults(run=generate)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
