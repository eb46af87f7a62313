"""Train the draft head of the default model on text it writes itself: generate, train, ship.

    nice -n 19 python scripts/train_draft_head.py generate --shards 40     # resumes: finished shards are kept
    nice -n 19 python scripts/train_draft_head.py train --minutes 30       # resumes from its last checkpoint
    python scripts/train_draft_head.py ship                                # measures it and writes data/drafts

Each stage can be stopped at any time and started again. On two CPU cores a useful run takes a couple of hours, most of
it generating; on a GPU, minutes. `OMP_NUM_THREADS=1` keeps it to one core.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from optinfer import data
from optinfer.models import cache_directory, load_model
from optinfer.speculative.distillation import batches, distillation_loss, frequent_tokens, read_shards
from optinfer.speculative.draft_head import SHIPPED, DraftHead, HeadDraft
from optinfer.speculative.questions import questions
from optinfer.speculative.self_talk import self_talk

RECIPE = {
    "seed": 0,
    "free_talk_every": 4,  # shards; in the others the user's turns are questions that we made
    "vocabulary": 8192,
    "rows_per_batch": 8,
    "held_out_rows": 16,
    "single_step_share": 0.4,  # of the training time; after it the head is unrolled
    "unrolled_steps": 3,
    "learning_rate_single": 3e-3,
    "learning_rate_unrolled": 2e-3,
    "warmup_steps": 30,
    "weight_decay": 0.01,
    "gradient_norm": 1.0,
}


def generate(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_model(arguments.model, device=arguments.device)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shards = range(arguments.first_shard, arguments.first_shard + arguments.shards)
    for shard in tqdm(shards, desc="self-talk", unit="shard"):
        path = arguments.folder / f"shard-{shard:04d}.safetensors"
        if path.exists():
            continue
        asked = None if shard % RECIPE["free_talk_every"] == 0 else questions(seed=shard)
        talk = self_talk(model, tokenizer, arguments.rows, arguments.length, seed=shard, questions=asked)
        partial = path.with_suffix(".partial")
        save_file({name: tensor.cpu() for name, tensor in talk.items()}, partial)
        partial.rename(path)


def train(arguments: argparse.Namespace) -> None:
    """Until the budget of training time is spent; new shards are picked up at each epoch."""
    model, _ = load_model(arguments.model, device=arguments.device)
    run = Run.resume(arguments.folder / "checkpoint.safetensors", model, read_shards(arguments.folder), arguments.start)
    budget = arguments.minutes * 60
    progress = tqdm(total=int(budget), initial=int(run.seconds), unit="s", desc="training")
    saved = time.monotonic()
    while run.seconds < budget:
        shards, held_out = split(read_shards(arguments.folder))
        for batch in batches(shards, RECIPE["rows_per_batch"], seed=run.step):
            started = time.monotonic()
            run.train_step({k: v.to(model.device) for k, v in batch.items()}, fraction=run.seconds / budget)
            run.seconds += time.monotonic() - started
            progress.update(int(run.seconds) - progress.n)
            if run.step % 50 == 0:
                run.evaluate({k: v.to(model.device) for k, v in held_out.items()})
                progress.set_postfix_str(f"step {run.step}, held out {run.curve[-1]['held_out']}")
            if time.monotonic() - saved > 60:
                run.save()
                saved = time.monotonic()
            if run.seconds >= budget:
                break
    run.evaluate({k: v.to(model.device) for k, v in held_out.items()})
    run.save()


def split(shards: list[dict[str, torch.Tensor]]) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The shards without the rows that are only looked at, and those rows."""
    rows = RECIPE["held_out_rows"]
    first = {name: tensor[rows:] for name, tensor in shards[0].items()}
    return [first, *shards[1:]], {name: tensor[:rows] for name, tensor in shards[0].items()}


class Run:
    """A training run that survives being stopped: weights, optimizer, curve, one safetensors file."""

    def __init__(self, path: Path, head: DraftHead):
        self.path, self.head = path, head
        self.weights = dict(head.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), betas=(0.9, 0.95), weight_decay=RECIPE["weight_decay"]
        )
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self._losses: list[float] = []

    @classmethod
    def resume(cls, path: Path, model: Any, shards: list[dict[str, torch.Tensor]], start: Path | None = None) -> "Run":
        """From the checkpoint at ``path``; without one from the layer of the head at ``start``, or from a random one."""
        if not shards:
            raise SystemExit(f"there is no text in {path.parent}; run the generate stage first")
        if not path.exists():
            torch.manual_seed(RECIPE["seed"])
            chosen = frequent_tokens(shards, RECIPE["vocabulary"], model.config.vocab_size)
            head = DraftHead.for_model(model, chosen)
            if start is not None:  # a layer does not depend on the vocabulary
                head.load_state_dict(DraftHead.load(start).state_dict() | {"vocabulary": chosen})
            return cls(path, head)
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads(file.metadata()["run"])
        run = cls(path, DraftHead.for_model(model, state.pop("vocabulary")))
        run.step, run.seconds, run.curve = facts["step"], facts["seconds"], facts["curve"]
        for name, weight in run.weights.items():
            weight.data.copy_(state[f"weight.{name}"])
            run.optimizer.state[weight] = {
                "step": torch.tensor(float(run.step)),
                "exp_avg": state[f"mean.{name}"].to(weight.device),
                "exp_avg_sq": state[f"square.{name}"].to(weight.device),
            }
        return run

    def save(self) -> None:
        state = {"vocabulary": self.head.vocabulary}
        for name, weight in self.weights.items():
            moments = self.optimizer.state[weight]
            state |= {
                f"weight.{name}": weight.data,
                f"mean.{name}": moments["exp_avg"],
                f"square.{name}": moments["exp_avg_sq"],
            }
        facts = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        partial = self.path.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in state.items()}, partial, metadata={"run": json.dumps(facts)})
        partial.rename(self.path)

    def train_step(self, batch: dict[str, torch.Tensor], fraction: float) -> None:
        """One step; ``fraction`` of the time budget is spent. Each phase's learning rate falls in a line."""
        turn = RECIPE["single_step_share"]
        single = fraction < turn
        done = fraction / turn if single else (fraction - turn) / (1 - turn)
        rate = RECIPE["learning_rate_single" if single else "learning_rate_unrolled"]
        rate *= min(1.0, (self.step + 1) / RECIPE["warmup_steps"]) * (1 - (0.6 if single else 0.97) * done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(batch["tokens"].device.type, torch.bfloat16):
            loss, _ = distillation_loss(self.head, batch, 1 if single else RECIPE["unrolled_steps"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), RECIPE["gradient_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._losses.append(float(loss.detach()))

    @torch.no_grad()
    def evaluate(self, held_out: dict[str, torch.Tensor]) -> None:
        with torch.autocast(held_out["tokens"].device.type, torch.bfloat16):
            loss, shares = distillation_loss(self.head, held_out, RECIPE["unrolled_steps"])
        recent, self._losses = self._losses, []
        self.curve.append(
            {
                "step": self.step,
                "seconds": round(self.seconds),
                "train_loss": round(sum(recent) / max(1, len(recent)), 4),
                "held_out_loss": round(float(loss), 4),
                "held_out": [round(s, 4) for s in shares],
            }
        )


def ship(arguments: argparse.Namespace) -> None:
    """Measure the head on prompts it was not trained on, and write weights, recipe, curve and figures."""
    import optinfer

    model, tokenizer = load_model(arguments.model, device=arguments.device)
    shards = read_shards(arguments.folder)
    run = Run.resume(arguments.folder / "checkpoint.safetensors", model, shards)
    recipe = RECIPE | {
        "data": "self-talk of the target: half of the answers greedy, half at temperature 0.9, top 50",
        "conversations": sum(s["tokens"].shape[0] for s in shards),
        "answer_tokens": int(sum(s["answer"].sum() for s in shards)),
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
                adaptive=False,
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
