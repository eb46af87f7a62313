"""One training run of a `DraftHead`: optimizer, learning rates, curve, and a checkpoint that it goes on from.

The head first learns from the target's hidden states alone; for the rest of the time it is unrolled, see
`distillation`. Progress is counted as a fraction of a budget, so that a run may be measured in steps or in minutes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.folders import new_file
from optinfer.hardware import has_fast_half
from optinfer.speculative.draft_head import DraftHead
from optinfer.speculative.training.distillation import distillation_loss, frequent_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECIPE: dict[str, Any] = {
    "seed": 0,
    "vocabulary": 8192,
    "rows_per_batch": 8,
    "single_step_share": 0.6,  # of the budget; after it the head is unrolled
    "unrolled_steps": 3,
    "learning_rate_single": 3e-3,
    "learning_rate_unrolled": 1.5e-3,
    "warmup_steps": 30,
    "weight_decay": 0.01,
    "gradient_norm": 1.0,
}


class HeadTraining:
    """A head that learns, with its optimizer and its curve.

    Attributes:
        head: the head.
        began_from: a random layer, or a trained head.
        step: batches seen so far.
        seconds: spent training, kept by whoever runs it; saved and read back.
        curve: one dict per `evaluate`: ``step``, ``seconds``, ``train_loss``, ``held_out_loss``, and ``held_out``, the
            share of held-out tokens guessed right at each unrolled step.
    """

    _FACTS = ("began_from", "step", "seconds", "curve")  # what a checkpoint holds beside tensors

    def __init__(self, head: DraftHead):
        self.head = head
        self.weights = dict(head.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), betas=(0.9, 0.95), weight_decay=RECIPE["weight_decay"]
        )
        self.began_from = "a random layer"
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self._losses: list[float] = []

    @classmethod
    def begin(
        cls, model: "PreTrainedModel", shards: list[dict[str, Tensor]], trained: DraftHead | None = None
    ) -> "HeadTraining":
        """For the tokens that are frequent in ``shards``: from a random layer, or from that of a ``trained`` head."""
        torch.manual_seed(RECIPE["seed"])
        chosen = frequent_tokens(shards, RECIPE["vocabulary"], model.config.vocab_size)
        run = cls(DraftHead.for_model(model, chosen))
        if trained is not None:  # a layer does not depend on the vocabulary
            run.head.load_state_dict(trained.state_dict() | {"vocabulary": chosen})
            run.began_from = "a trained head"
        return run

    @classmethod
    def resume(cls, path: Path, model: "PreTrainedModel") -> "HeadTraining":
        """From a checkpoint that `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads(file.metadata()["run"])
        run = cls(DraftHead.for_model(model, state.pop("vocabulary")))
        for name in cls._FACTS:
            setattr(run, name, facts[name])
        for name, weight in run.weights.items():
            weight.data.copy_(state[f"weight.{name}"])
            run.optimizer.state[weight] = {
                "step": torch.tensor(float(run.step)),
                "exp_avg": state[f"mean.{name}"].to(weight.device),
                "exp_avg_sq": state[f"square.{name}"].to(weight.device),
            }
        return run

    def save(self, path: Path) -> None:
        """Weights, optimizer and curve in one safetensors file, whole or not at all. After at least one step."""
        from safetensors.torch import save_file

        state = {"vocabulary": self.head.vocabulary}
        for name, weight in self.weights.items():
            moments = self.optimizer.state[weight]
            state |= {
                f"weight.{name}": weight.data,
                f"mean.{name}": moments["exp_avg"],
                f"square.{name}": moments["exp_avg_sq"],
            }
        facts = {name: getattr(self, name) for name in self._FACTS}
        with new_file(path) as work:
            save_file({k: v.contiguous() for k, v in state.items()}, work, metadata={"run": json.dumps(facts)})

    def train_step(self, batch: dict[str, Tensor], fraction: float) -> float:
        """One step when ``fraction`` of the budget is spent; the loss. Each phase's learning rate falls in a line."""
        turn = RECIPE["single_step_share"]
        single = fraction < turn
        done = fraction / turn if single else (fraction - turn) / (1 - turn)
        rate = RECIPE["learning_rate_single" if single else "learning_rate_unrolled"]
        rate *= min(1.0, (self.step + 1) / RECIPE["warmup_steps"]) * (1 - (0.6 if single else 0.97) * done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, _ = self._loss(batch, 1 if single else RECIPE["unrolled_steps"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), RECIPE["gradient_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._losses.append(float(loss.detach()))
        return self._losses[-1]

    @torch.no_grad()
    def evaluate(self, held_out: dict[str, Tensor]) -> dict[str, Any]:
        """Add a point to the curve, and return it."""
        loss, shares = self._loss(held_out, RECIPE["unrolled_steps"])
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
        return self.curve[-1]

    def _loss(self, batch: dict[str, Tensor], steps: int) -> tuple[Tensor, list[float]]:
        device = self.head.vocabulary.device
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_half(device)):
            return distillation_loss(self.head, {name: x.to(device) for name, x in batch.items()}, steps)
