"""Train the draft head of the default model on text it writes itself: generate, train, ship.

    nice -n 19 python scripts/train_draft_head.py generate --shards 40     # resumes: finished shards are kept
    nice -n 19 python scripts/train_draft_head.py train --minutes 30       # resumes from its last checkpoint
    python scripts/train_draft_head.py ship                                # measures it and writes data/drafts

Each stage can be stopped at any time and started again. On two CPU cores a useful run takes a couple of hours, most of
it generating; on a GPU, minutes. `OMP_NUM_THREADS=1` keeps it to one core.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from optinfer import data
from optinfer.folders import cache_directory, new_file
from optinfer.models import load_model
from optinfer.speculative.draft_head import SHIPPED, DraftHead, HeadDraft
from optinfer.speculative.training.distillation import batches, read_shards
from optinfer.speculative.training.head_training import RECIPE, HeadTraining
from optinfer.speculative.training.questions import questions
from optinfer.speculative.training.self_talk import self_talk

FREE_TALK_EVERY = 4  # shards; in the others the user's turns are questions that we made
HELD_OUT_ROWS = 16


def generate(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_model(arguments.model, device=arguments.device)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shards = range(arguments.first_shard, arguments.first_shard + arguments.shards)
    for shard in tqdm(shards, desc="self-talk", unit="shard"):
        path = arguments.folder / f"shard-{shard:04d}.safetensors"
        if path.exists():
            continue
        asked = None if shard % FREE_TALK_EVERY == 0 else questions(seed=shard)
        talk = self_talk(model, tokenizer, arguments.rows, arguments.length, seed=shard, questions=asked)
        with new_file(path) as work:
            save_file({name: tensor.cpu() for name, tensor in talk.items()}, work)


def train(arguments: argparse.Namespace) -> None:
    """Until the budget of training time is spent; new shards are picked up at each epoch."""
    model, _ = load_model(arguments.model, device=arguments.device)
    checkpoint = arguments.folder / "checkpoint.safetensors"
    if checkpoint.exists():
        run = HeadTraining.resume(checkpoint, model)
    else:
        run = HeadTraining.begin(
            model, shards_in(arguments.folder), arguments.start and DraftHead.load(arguments.start)
        )
    budget = arguments.minutes * 60
    progress = tqdm(total=int(budget), initial=int(run.seconds), unit="s", desc="training")
    saved = time.monotonic()
    while run.seconds < budget:
        shards, held_out = split(shards_in(arguments.folder))
        for batch in batches(shards, RECIPE["rows_per_batch"], seed=run.step):
            started = time.monotonic()
            run.train_step(batch, fraction=run.seconds / budget)
            run.seconds += time.monotonic() - started
            progress.update(int(run.seconds) - progress.n)
            if run.step % 50 == 0:
                progress.set_postfix_str(f"step {run.step}, held out {run.evaluate(held_out)['held_out']}")
            if time.monotonic() - saved > 60:
                run.save(checkpoint)
                saved = time.monotonic()
            if run.seconds >= budget:
                break
    run.evaluate(held_out)
    run.save(checkpoint)


def shards_in(folder: Path) -> list[dict[str, torch.Tensor]]:
    shards = read_shards(folder)
    if not shards:
        raise SystemExit(f"there is no text in {folder}; run the generate stage first")
    return shards


def split(shards: list[dict[str, torch.Tensor]]) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The shards without the rows that are only looked at, and those rows."""
    first = {name: tensor[HELD_OUT_ROWS:] for name, tensor in shards[0].items()}
    return [first, *shards[1:]], {name: tensor[:HELD_OUT_ROWS] for name, tensor in shards[0].items()}


def ship(arguments: argparse.Namespace) -> None:
    """Measure the head on prompts it was not trained on, and write weights, recipe, curve and figures."""
    import optinfer

    model, tokenizer = load_model(arguments.model, device=arguments.device)
    shards = read_shards(arguments.folder)
    run = HeadTraining.resume(arguments.folder / "checkpoint.safetensors", model)
    recipe = RECIPE | {
        "free_talk_every": FREE_TALK_EVERY,
        "held_out_rows": HELD_OUT_ROWS,
        "data": "self-talk of the target: half of the answers greedy, half at temperature 0.9, top 50",
        "conversations": sum(s["tokens"].shape[0] for s in shards),
        "answer_tokens": int(sum(s["answer"].sum() for s in shards)),
        "began_from": run.began_from,
        "steps": run.step,
        "training_seconds": round(run.seconds),
        "curve": run.curve,
        "target": "SmolLM2-135M-Instruct, bf16",
    }
    run.head.save(arguments.out, SHIPPED, recipe)
    draft = HeadDraft(DraftHead.load(arguments.out / f"{SHIPPED}.safetensors"), min_confidence=0.0)
    recipe["measured"] = {"greedy": True, "draft_tokens": 4, "new_tokens": arguments.new_tokens}
    for kind in ("chat", "summarize", "rewrite", "code"):
        rounds = []
        for prompt in tqdm(data.prompts(kind), desc=kind):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            output = model.generate(
                **inputs,
                max_new_tokens=arguments.new_tokens,
                do_sample=False,
                custom_generate=optinfer.speculative_decoding,
                draft=draft,
                num_draft_tokens=4,
                adaptive_drafts=False,
                return_dict_in_generate=True,
            )
            rounds += output.statistics.rounds
        statistics = optinfer.speculative.Statistics(rounds)
        recipe["measured"][kind] = {
            "prompts": len(data.prompts(kind)),
            "acceptance_by_position": [round(a, 4) for a in statistics.acceptance()],
            "tokens_per_pass": round(statistics.tokens_per_pass, 4),
        }
        print(kind, recipe["measured"][kind], flush=True)
        path = run.head.save(arguments.out, SHIPPED, recipe)  # after each kind: it can be stopped here too
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the embedded model")
    parser.add_argument("--device", default=None)
    parser.add_argument("--folder", type=Path, default=cache_directory() / "self_talk", help="text and checkpoint")
    stages = parser.add_subparsers(required=True)
    stage = stages.add_parser("generate", help="let the target talk to itself")
    stage.add_argument("--shards", type=int, default=40)
    stage.add_argument("--first-shard", type=int, default=0, help="so that two processes can share the work")
    stage.add_argument("--rows", type=int, default=96, help="conversations per shard")
    stage.add_argument("--length", type=int, default=192, help="tokens per conversation")
    stage.set_defaults(run=generate)
    stage = stages.add_parser("train", help="distill the head")
    stage.add_argument("--minutes", type=float, default=30.0, help="training time in all, over every resumption")
    stage.add_argument("--start", type=Path, help="a trained head to go on from, in place of a random layer")
    stage.set_defaults(run=train)
    stage = stages.add_parser("ship", help="measure and write the result")
    stage.add_argument("--out", type=Path, default=data.root() / "data" / "drafts")
    stage.add_argument("--new-tokens", type=int, default=96)
    stage.set_defaults(run=ship)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
