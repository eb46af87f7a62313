"""One model in several processes: each holds a part of every matrix (Megatron-LM, arXiv:1909.08053).

The first matrix of a pair is cut by its rows (q, k, v; gate, up), so that a process computes some heads and some columns of
the MLP on its own; the second by its columns (o; down), so that what comes out are summands. One all-reduce after each pair
adds them: two per layer. The embedding is cut by tokens of the vocabulary, one more all-reduce; the head is the same matrix, and
each process's logits are gathered.

KV heads that do not divide: a group of query heads stays with its KV head, and some processes hold one head more. SmolLM2 has
three: with two processes, two and one. The step then takes as long as with four, one of them idle. vLLM refuses such a model;
to give each process a copy of a KV head (as vLLM does where there are fewer heads than processes) would not help here.
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass
class Traffic:
    """What this process sent: all-reduces and gathers, and their bytes."""

    all_reduces: int = 0
    gathers: int = 0
    reduce_bytes: int = 0
    gather_bytes: int = 0


def ring_bytes(nbytes: int, processes: int) -> int:
    """Bytes that each process sends for an all-reduce of `nbytes`, around a ring: 2 (n - 1) / n of them, in whole pieces.

    In n - 1 rounds everybody passes a piece on and adds what comes; in as many rounds the sums go around.
    """
    return 2 * (processes - 1) * -(-nbytes // processes)


def all_reduce_bytes(config: "PreTrainedConfig", tokens: int, processes: int, itemsize: int) -> int:
    """Bytes that a process sends in a forward pass of `tokens` tokens: two all-reduces per layer and one for the embedding."""
    numbers = tokens * config.hidden_size
    piece = -(-numbers // processes)
    return (2 * config.num_hidden_layers + 1) * 2 * (processes - 1) * piece * itemsize


def parts(total: int, processes: int) -> list[range]:
    """Whole things dealt out as evenly as they go, neighbours together; the first get one more.

    >>> parts(3, 2)
    [range(0, 2), range(2, 3)]
    """
    size, more = divmod(total, processes)
    starts = [rank * size + min(rank, more) for rank in range(processes + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


class Ring:
    """All-reduce by hand, over sends and receives to neighbours, so that every byte is counted."""

    def __init__(self, rank: int, processes: int):
        self.rank, self.processes, self.sent = rank, processes, Traffic()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of everybody's x; the same bits in every process."""
        n, rank = self.processes, self.rank
        if n == 1:
            return x
        piece = -(-x.numel() // n)
        pieces = torch.zeros(n, piece, dtype=x.dtype)
        pieces.view(-1)[: x.numel()] = x.reshape(-1)
        for round in range(n - 1):  # piece i is complete at process i - 1
            self._pass_on(pieces, (rank - round) % n, (rank - round - 1) % n, add=True)
        for round in range(n - 1):
            self._pass_on(pieces, (rank + 1 - round) % n, (rank - round) % n, add=False)
        self.sent.all_reduces += 1
        return pieces.view(-1)[: x.numel()].view(x.shape)

    def _pass_on(self, pieces: Tensor, outgoing: int, incoming: int, add: bool) -> None:
        received = torch.empty_like(pieces[0])
        n = self.processes
        sending = dist.isend(pieces[outgoing].contiguous(), (self.rank + 1) % n)
        dist.recv(received, (self.rank - 1) % n)
        assert sending is not None
        sending.wait()
        pieces[incoming] = pieces[incoming] + received if add else received
        self.sent.reduce_bytes += received.nbytes

    def all_gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Everybody's x [..., size], side by side."""
        widest = max(sizes)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[-1])).contiguous()
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        self.sent.gathers += 1
        self.sent.gather_bytes += padded.nbytes * (self.processes - 1)
        return torch.cat([part[..., :size] for part, size in zip(found, sizes)], -1)


class SummedLinear(nn.Module):
    """The second matrix of a pair: this process's columns, and the sum over all processes."""

    def __init__(self, linear: nn.Linear, columns: slice, ring: Ring):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach()[:, columns].clone(), requires_grad=False)
        self.ring = ring

    def forward(self, x: Tensor) -> Tensor:
        return self.ring.all_reduce(nn.functional.linear(x, self.weight))


class PartOfEmbedding(nn.Module):
    """Rows of the embedding for this process's tokens of the vocabulary; the others' rows are zero, and the sum has all."""

    def __init__(self, weight: Tensor, mine: range, ring: Ring):
        super().__init__()
        self.part = nn.Parameter(weight.detach()[mine.start : mine.stop].clone(), requires_grad=False)
        self.mine, self.shape, self.ring = mine, weight.shape, ring

    @property
    def weight(self) -> Tensor:
        """Of the whole embedding's shape, for those who ask for it or for the device: it holds nothing."""
        return self.part.new_zeros(()).expand(self.shape)

    def forward(self, token_ids: Tensor) -> Tensor:
        inside = (token_ids >= self.mine.start) & (token_ids < self.mine.stop)
        rows = nn.functional.embedding((token_ids - self.mine.start).where(inside, 0), self.part)
        return self.ring.all_reduce(rows * inside[..., None])


class GatheredHead(nn.Module):
    """Logits of this process's tokens of the vocabulary, and everybody's side by side."""

    def __init__(self, weight: nn.Parameter, sizes: list[int], ring: Ring):
        super().__init__()
        self.weight, self.sizes, self.ring = weight, sizes, ring

    def forward(self, x: Tensor) -> Tensor:
        return self.ring.all_gather(nn.functional.linear(x, self.weight), self.sizes)


def shard(model: "PreTrainedModel", rank: int, processes: int) -> Ring:
    """Keep this process's part of a Llama-like model, in place; the others must run the same steps.

    Returns: the ring, which counts what is sent.

    Raises ValueError: the model is of another kind, or has fewer KV heads than there are processes.
    """
    config = model.config
    if config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"model must be Llama-like (llama, mistral, qwen2, qwen3), not {config.model_type}")
    if config.num_key_value_heads < processes:
        raise ValueError(f"{config.num_key_value_heads} KV heads cannot be dealt to {processes} processes")
    ring = Ring(rank, processes)
    heads = parts(config.num_key_value_heads, processes)[rank]
    group = config.num_attention_heads // config.num_key_value_heads
    width = model.model.layers[0].self_attn.head_dim
    own_keys = slice(heads.start * width, heads.stop * width)
    own_queries = slice(own_keys.start * group, own_keys.stop * group)
    columns = parts(config.intermediate_size, processes)[rank]
    own_columns = slice(columns.start, columns.stop)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for name, rows in (("q_proj", own_queries), ("k_proj", own_keys), ("v_proj", own_keys)):
            _keep_rows(getattr(attention, name), rows)
        for name in ("gate_proj", "up_proj"):
            _keep_rows(getattr(mlp, name), own_columns)
        attention.o_proj = SummedLinear(attention.o_proj, own_queries, ring)
        mlp.down_proj = SummedLinear(mlp.down_proj, own_columns, ring)
    vocabulary = parts(config.vocab_size, processes)
    table = model.model.embed_tokens.weight
    tied = model.lm_head.weight is table
    model.model.embed_tokens = PartOfEmbedding(table, vocabulary[rank], ring)
    own = model.model.embed_tokens if tied else PartOfEmbedding(model.lm_head.weight, vocabulary[rank], ring)
    model.lm_head = GatheredHead(own.part, [len(part) for part in vocabulary], ring)
    return ring


def _keep_rows(linear: nn.Linear, rows: slice) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[rows].clone(), requires_grad=False)
    linear.out_features = linear.weight.shape[0]
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].clone(), requires_grad=False)
