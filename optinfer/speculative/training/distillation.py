"""Train a `DraftHead` on text its target wrote, to say what the target would say.

The loss is the cross-entropy against the target's whole distribution over the trimmed vocabulary, plus the squared
distance of the guessed hidden state from the one that the target then had: hundreds of numbers to learn from for each
token (EAGLE regresses so; EAGLE-3, which has data in plenty, does not). After 250 steps on 1,248 conversations the
default model's head had .388 of the held-out tokens right with it and .366 without.

Later in training the head is unrolled: it reads its own guess in place of the target's hidden state, as it will when it
drafts (EAGLE-3 calls this training-time test). Without it the second and third drafted token are much worse than the first.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from optinfer.speculative.draft_head import DraftHead


def frequent_tokens(shards: list[dict[str, Tensor]], size: int, vocab_size: int) -> Tensor:
    """The ``size`` tokens that the target wrote most, filled up with low ids (which are frequent in any text); sorted."""
    device = shards[0]["tokens"].device
    counts = torch.zeros(vocab_size, dtype=torch.float64, device=device)
    for shard in shards:
        counts += torch.bincount(shard["tokens"][shard["answer"]].long(), minlength=vocab_size)
    counts += torch.linspace(0.5, 0.0, vocab_size, dtype=torch.float64, device=device)
    return counts.topk(size).indices.sort().values


def batches(shards: list[dict[str, Tensor]], rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """All conversations once, in random order, ``rows`` at a time."""
    where = [(i, row) for i, shard in enumerate(shards) for row in range(shard["tokens"].shape[0])]
    order = torch.randperm(len(where), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    for start in range(0, len(order) - rows + 1, rows):
        picked = [where[j] for j in order[start : start + rows]]
        yield {name: torch.stack([shards[i][name][row] for i, row in picked]) for name in shards[0]}


def read_shards(folder: Path) -> list[dict[str, Tensor]]:
    """Every finished shard of self-talk in a folder."""
    from safetensors.torch import load_file

    return [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]


def distillation_loss(
    head: DraftHead, batch: dict[str, Tensor], steps: int = 1, decay: float = 0.8, feature_weight: float = 4.0
) -> tuple[Tensor, list[float]]:
    """Weighted mean over the unrolled steps, and for each step the share of tokens guessed right.

    ``feature_weight`` is that of the guess's squared distance from the target's hidden state, in variances of the latter.

    Step k starts at every position t at once: it drafts token t + k + 1 from the target's hidden state at t and k of
    the head's own guesses. Its keys are those of step 1 up to t, which came from the target, and the chain's own.
    """
    tokens, target_hidden, answer = batch["tokens"].long(), batch["hidden"], batch["answer"]
    length = tokens.shape[1]
    hidden: Tensor = target_hidden[:, : length - 1]
    chain_keys: list[Tensor] = []
    chain_values: list[Tensor] = []
    total, shares = torch.zeros((), device=tokens.device), []
    for k in range(steps):
        # Position t reads token t + k + 1 and must say what the target says after it: its distribution at t + k + 1.
        count = length - 1 - k
        x = head.inputs(tokens[:, k + 1 : k + 1 + count], hidden[:, :count])
        positions = torch.arange(k, k + count, device=tokens.device)
        q, keys, values = head.project(x, positions)
        if k == 0:
            chain_keys, chain_values = [keys], [values]
            attended = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        else:
            chain_keys = [c[:, :, :count] for c in chain_keys] + [keys]
            chain_values = [c[:, :, :count] for c in chain_values] + [values]
            attended = _chain_attention(q, chain_keys, chain_values)
        guess = head.finish(x, attended)

        wanted = answer[:, k + 2 : k + 2 + count - 1]  # judged where the target itself chose the next token
        guessed, felt = guess[:, : count - 1][wanted], target_hidden[:, k + 1 : k + count][wanted]
        logits = head.logits(guessed).float()
        with torch.no_grad():
            teacher = head.logits(felt).float()
        loss = F.cross_entropy(logits, teacher.softmax(-1))
        loss = loss + feature_weight * F.mse_loss(guessed.float(), felt.float()) / felt.float().var()
        total = total + decay**k * loss
        shares.append(float((logits.argmax(-1) == teacher.argmax(-1)).float().mean()))
        hidden = guess
    return total / sum(decay**k for k in range(steps)), shares


def _chain_attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Chain t sees the first step's keys up to t, and of each later step only its own."""
    count, dim = q.shape[2:]
    grouped = q.unflatten(1, (keys[0].shape[1], -1))  # [batch, kv_heads, group, count, dim]
    context = grouped @ keys[0].unsqueeze(2).transpose(-1, -2)
    future = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
    scores = [context.masked_fill(future, float("-inf"))]
    scores += [(grouped * k.unsqueeze(2)).sum(-1, keepdim=True) for k in keys[1:]]
    weights = torch.softmax(torch.cat(scores, dim=-1).float() * dim**-0.5, dim=-1).to(q.dtype)
    out = weights[..., :count] @ values[0].unsqueeze(2)
    for i, v in enumerate(values[1:]):
        out = out + weights[..., count + i : count + i + 1] * v.unsqueeze(2)
    return out.flatten(1, 2)
