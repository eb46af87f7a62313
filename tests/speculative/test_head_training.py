"""Training of a draft head on a small random target: it learns, and a run that was stopped goes on as if it had not been."""

import pytest
import torch
import transformers

from optinfer.speculative.draft_head import DraftHead
from optinfer.speculative.training.distillation import distillation_loss
from optinfer.speculative.training.head_training import RECIPE, HeadTraining


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=160, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def shard(target):
    """64 texts that the target continues greedily."""
    start = torch.randint(0, 160, (64, 3), generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    tokens = target.generate(start, max_new_tokens=21, min_new_tokens=21, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        hidden = target.model(tokens).last_hidden_state
    answer = torch.ones_like(tokens, dtype=torch.bool)
    answer[:, :3] = False
    return {"tokens": tokens.int(), "hidden": hidden.clone(), "answer": answer}


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    monkeypatch.setitem(RECIPE, "vocabulary", 128)


def some_steps(run: HeadTraining, shard: dict, first: int, last: int, of: int) -> list[float]:
    losses = []
    for step in range(first, last):
        rows = torch.randperm(64, generator=torch.Generator(torch.get_default_device()).manual_seed(step))[:16]
        losses.append(run.train_step({name: x[rows] for name, x in shard.items()}, step / of))
    return losses


def test_a_head_learns_what_the_target_says(target, shard):
    run = HeadTraining.begin(target, [shard])
    before = run.evaluate(shard)
    some_steps(run, shard, 0, 120, of=120)
    after = run.evaluate(shard)
    assert after["step"] == 120 and after["held_out_loss"] < before["held_out_loss"]
    assert all(new > old + 0.3 for old, new in zip(before["held_out"], after["held_out"]))


def test_both_phases_are_run(target, shard):
    """The unrolled loss is a mean over three steps; before, the loss is that of the first alone."""
    run = HeadTraining.begin(target, [shard])
    rows = {name: x[:16] for name, x in shard.items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        single, unrolled = (float(distillation_loss(run.head, rows, steps)[0]) for steps in (1, 3))
    assert single != pytest.approx(unrolled, rel=1e-3)
    run.step = -1  # a learning rate of zero in the warm-up
    assert run.train_step(rows, 0.0) == pytest.approx(single, rel=1e-3)
    run.step = -1
    assert run.train_step(rows, 0.99) == pytest.approx(unrolled, rel=1e-3)


def test_the_loss_is_least_for_the_targets_own_hidden_states(target, shard):
    """The distance term vanishes for a head that guesses them exactly, and only there."""

    class Knows(DraftHead):
        off = 0.0

        def finish(self, x, attended):
            count = x.shape[1]
            return torch.nn.functional.pad(shard["hidden"][:, 1:count], (0, 0, 0, 1)) + self.off

    head = HeadTraining.begin(target, [shard]).head
    head.__class__ = Knows
    bare, full = (float(distillation_loss(head, shard, feature_weight=w)[0]) for w in (0.0, 5.0))
    assert full == pytest.approx(bare)
    head.off = 0.1
    bare, full = (float(distillation_loss(head, shard, feature_weight=w)[0]) for w in (0.0, 5.0))
    variance = shard["hidden"][:, 1:-1][shard["answer"][:, 2:]].var()
    assert full - bare == pytest.approx(5.0 * 0.01 / float(variance), rel=1e-4)


def test_a_resumed_run_is_the_run(target, shard, tmp_path):
    whole = HeadTraining.begin(target, [shard])
    some_steps(whole, shard, 0, 12, of=12)

    stopped = HeadTraining.begin(target, [shard])
    some_steps(stopped, shard, 0, 8, of=12)
    stopped.seconds = 7.5
    stopped.evaluate(shard)
    stopped.save(tmp_path / "checkpoint.safetensors")
    resumed = HeadTraining.resume(tmp_path / "checkpoint.safetensors", target)
    assert (resumed.step, resumed.seconds, resumed.curve) == (8, 7.5, stopped.curve)
    some_steps(resumed, shard, 8, 12, of=12)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_from_a_trained_head(target, shard):
    trained = HeadTraining.begin(target, [shard])
    some_steps(trained, shard, 0, 5, of=10)
    again = HeadTraining.begin(target, [shard], trained.head)
    for name, weight in trained.weights.items():
        assert torch.equal(weight, again.weights[name])
    assert again.step == 0
    assert (trained.began_from, again.began_from) == ("a random layer", "a trained head")
