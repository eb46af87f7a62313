"""A trained draft of one layer that reads the target's mind (after EAGLE, Li et al. 2024, and EAGLE-3, 2025).

At position t the head sees two things: the target's last hidden state, which holds what the target was about to say, and
the embedding of token t + 1, which is what was then chosen. One decoder layer turns them into a guess of the target's
*next* hidden state; the target's own output rows turn that into a token. To draft further, the head reads its own guess.

Embeddings and output rows are the target's, so the file holds only the layer. Logits are computed for a trimmed
vocabulary, the tokens that occur most (after FR-Spec, Zhao et al. 2025): the full output matrix would cost more than
the layer.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optinfer import cpu
from optinfer.errors import OptinferError
from optinfer.speculative.drafters import Draft, Proposal
from optinfer.speculative.sampler import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHIPPED = "smollm2-135m-instruct-head"


class DraftHead(nn.Module):
    """One Llama-style layer between the target's hidden states and its output rows.

    Args:
        hidden_size, num_heads, num_kv_heads, intermediate_size: of the layer, as in the target's config.
        vocabulary: int64 [trimmed], the target's tokens that the head can draft.
    """

    vocabulary: Tensor
    frequency: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        intermediate_size: int,
        vocabulary: Tensor,
        rope_theta: float = 10_000.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.sizes = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "intermediate_size": intermediate_size,
            "rope_theta": rope_theta,
            "eps": eps,
        }
        self.num_heads, self.num_kv_heads, self.eps = num_heads, num_kv_heads, eps
        self.head_dim = hidden_size // num_heads
        width = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.fuse = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.qkv = nn.Linear(hidden_size, width, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.norms = nn.ParameterDict(
            {
                name: nn.Parameter(torch.ones(hidden_size))
                for name in ("embedding", "hidden", "attention", "mlp", "final")
            }
        )
        self.register_buffer("vocabulary", vocabulary)
        frequency = rope_theta ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        self.register_buffer("frequency", frequency, persistent=False)
        self.embedding: Tensor | None = None  # the target's, set by `attach`
        self.rows: Tensor | None = None  # its output rows for our vocabulary
        self._cpu_weights: dict[str, cpu.CpuWeight] = {}

    @classmethod
    def for_model(cls, target: "PreTrainedModel", vocabulary: Tensor) -> "DraftHead":
        """A new head, random but for its last norm, attached to ``target``."""
        c = target.config
        theta = (getattr(c, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        head = cls(
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.intermediate_size,
            vocabulary,
            theta,
            c.rms_norm_eps,
        )
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        head.norms["final"].data.copy_(target.model.norm.weight.float())
        return head.attach(target)

    def attach(self, target: "PreTrainedModel") -> "DraftHead":
        """Share the target's embeddings and output rows; after this the layer's weights stay where and as they are."""
        if (
            target.config.hidden_size != self.sizes["hidden_size"]
            or int(self.vocabulary.max()) >= target.config.vocab_size
        ):
            raise ValueError(
                f"this draft head is for a model of hidden size {self.sizes['hidden_size']}; the target's is "
                f"{target.config.hidden_size}. Train one for it with scripts/train_draft_head.py, or use 'prompt_lookup'"
            )
        self.to(target.device)
        self.embedding = target.get_input_embeddings().weight.detach()
        self.rows = target.get_output_embeddings().weight.detach()[self.vocabulary]
        self._cpu_weights = {}
        if self.rows.device.type == "cpu" and self.rows.dtype != torch.float32 and cpu.kernels() is not None:
            weights = {name: m.weight for name, m in self.named_children() if isinstance(m, nn.Linear)}
            found = {name: cpu.CpuWeight.plain(w) for name, w in {**weights, "rows": self.rows}.items()}
            self._cpu_weights = {name: weight for name, weight in found.items() if weight is not None}
        return self

    def inputs(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Fuse the embedding of token t + 1 with a hidden state at t, [..., hidden_size]."""
        assert self.embedding is not None
        dtype = self.fuse.weight.dtype
        embedded = self._norm(F.embedding(tokens, self.embedding).to(dtype), "embedding")
        return self._product("fuse", torch.cat([embedded, self._norm(hidden.to(dtype), "hidden")], dim=-1))

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [batch, heads, length, head_dim], keys and values [batch, kv_heads, length, head_dim]."""
        batch, length, _ = x.shape
        heads = self._product("qkv", self._norm(x, "attention")).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        qk = self._rotate(torch.cat([q, k], dim=1), positions)
        return qk[:, : self.num_heads], qk[:, self.num_heads :], v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer; the guess of the target's next hidden state, [batch, length, hidden_size]."""
        x = x + self._product("out", attended.transpose(1, 2).flatten(2))
        gate, up = self._product("gate_up", self._norm(x, "mlp")).chunk(2, dim=-1)
        return self._norm(x + self._product("down", F.silu(gate) * up), "final")

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the trimmed vocabulary, [..., trimmed]."""
        assert self.rows is not None
        return self._product("rows", hidden.to(self.rows.dtype))

    def _product(self, name: str, x: Tensor) -> Tensor:
        """With a layer of this name, or the output rows."""
        if name in self._cpu_weights and not torch.is_grad_enabled():
            return cpu.linear(x, self._cpu_weights[name])
        return F.linear(x, self.get_parameter(f"{name}.weight") if name != "rows" else self.rows)  # type: ignore[arg-type]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norms[name].to(x.dtype), self.eps)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None].float() * self.frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def save(self, folder: str | os.PathLike[str], name: str, recipe: dict[str, Any]) -> Path:
        """Write ``name.safetensors`` (bf16) and ``name.json`` (sizes and recipe), each whole or not at all."""
        from safetensors.torch import save_file

        from optinfer.folders import new_file, write_whole

        folder = Path(folder)
        weights = {
            k: (v if k == "vocabulary" else v.bfloat16()).cpu().contiguous() for k, v in self.state_dict().items()
        }
        weights["vocabulary"] = weights["vocabulary"].int()
        target = folder / f"{name}.safetensors"
        with new_file(target) as work:
            save_file(weights, work)
        write_whole(folder / f"{name}.json", json.dumps({"sizes": self.sizes, "recipe": recipe}, indent=1) + "\n")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DraftHead":
        """Read what `save` wrote; ``path`` is the safetensors file. Attach it to its target before use."""
        from safetensors.torch import load_file

        path = Path(path)
        if not path.is_file():
            raise OptinferError(f"there is no draft head at {str(path)!r}; train one with scripts/train_draft_head.py")
        weights = load_file(path)
        sizes = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sizes"]
        weights["vocabulary"] = weights["vocabulary"].long()
        head = cls(vocabulary=weights["vocabulary"], **sizes)
        head.load_state_dict(weights)
        return head.bfloat16_layers()

    def bfloat16_layers(self) -> "DraftHead":
        """Run in bf16; the rotary frequencies stay in float32."""
        frequency = self.frequency
        self.to(torch.bfloat16)
        self.frequency = frequency
        return self


class HeadDraft(Draft):
    """Drafts with a `DraftHead`.

    Args:
        head: a trained head.
        min_confidence: stop when the chance that the whole draft survives, by the head's own reckoning, falls below it.
    """

    needs_hidden = True
    max_tokens = 6

    def __init__(self, head: DraftHead, min_confidence: float = 0.15):
        self.head, self.min_confidence = head, min_confidence

    @classmethod
    def shipped(cls) -> "HeadDraft":
        """The head of the default model that comes with the course.

        Raises:
            OptinferError: the installation holds none.
        """
        from optinfer import data

        try:
            path = data.path(f"drafts/{SHIPPED}.safetensors")
        except FileNotFoundError as error:
            raise OptinferError(
                "this installation holds no trained draft head; train one with scripts/train_draft_head.py, "
                "or use draft='prompt_lookup'"
            ) from error
        return cls(DraftHead.load(path))

    def bind(self, target: "PreTrainedModel") -> None:
        self.head.attach(target)
        self._vocab_size = target.config.vocab_size
        self._hidden: list[Tensor] = []  # of final tokens, not yet run through the head
        self._length = 0  # tokens in the head's own cache
        self._keys = self._values = None  # [1, kv_heads, capacity, head_dim]

    def observe(self, hidden: Tensor) -> None:
        self._hidden.append(hidden)

    def propose(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> Proposal:
        tokens, laws, sure = self._draft(input_ids, num_tokens, sampler)
        kept = int(sure.sum()) if self.min_confidence else len(tokens)
        return Proposal(tokens[:kept], None if laws is None or not kept else laws[:kept])

    def propose_marked(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> Tensor:
        tokens, _, sure = self._draft(input_ids, num_tokens, sampler)
        return tokens.masked_fill(~sure, -1)

    @torch.no_grad()
    def _draft(self, input_ids: Tensor, num_tokens: int, sampler: Sampler) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens, their laws, and which of them, the first ones, it is sure of. On a GPU nothing is waited for."""
        nothing = input_ids.new_empty(0), None, input_ids.new_empty(0, dtype=torch.bool)
        known = self._length + sum(h.shape[1] for h in self._hidden)
        if not self._hidden or known != input_ids.shape[1] - 1 or num_tokens < 1:
            return nothing  # the target has not run yet, or its cache was filled elsewhere
        hidden = torch.cat(self._hidden, dim=1)
        self._hidden = []
        guess = self._run(input_ids[:, self._length + 1 :], hidden, self._length)[:, -1:]
        self._length = known
        text, survival = input_ids, torch.ones((), device=input_ids.device)
        tokens: list[Tensor] = []
        laws: list[Tensor | None] = []
        sure: list[Tensor] = []
        for k in range(num_tokens):
            logits = self.head.logits(guess[:, 0])
            survival = survival * logits.float().softmax(-1).amax(-1)
            sure.append(~(survival < self.min_confidence))
            if survival.device.type == "cpu" and not sure[-1]:  # asking costs nothing here
                return (torch.cat(tokens), _joined(laws), torch.cat(sure[:-1])) if tokens else nothing
            token, law = self._choose(text, logits, sampler)
            tokens.append(token)
            laws.append(law)
            if k + 1 < num_tokens:
                text = torch.cat([text, token[:, None]], dim=1)
                guess = self._run(token[:, None], guess, known + k)
        return torch.cat(tokens), _joined(laws), torch.cat(sure)

    def _choose(self, text: Tensor, logits: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor | None]:
        if sampler.drafts_greedily:  # a draft needs no penalties: the target applies them
            return self.head.vocabulary[logits.argmax(-1)], None
        full = logits.new_full((1, self._vocab_size), float("-inf"), dtype=torch.float32)
        return sampler.choose(text, full.index_copy_(1, self.head.vocabulary, logits.float()))

    def _run(self, tokens: Tensor, hidden: Tensor, start: int) -> Tensor:
        """The head over ``tokens`` at positions from ``start``, written over what was drafted there before."""
        x = self.head.inputs(tokens, hidden)
        end = start + x.shape[1]
        q, k, v = self.head.project(x, torch.arange(start, end, device=x.device))
        self._reserve(k, end)
        assert self._keys is not None and self._values is not None
        self._keys[:, :, start:end], self._values[:, :, start:end] = k, v
        keys, values = self._keys[:, :, :end], self._values[:, :, :end]
        if x.shape[1] == 1:  # the query heads of one KV head are rows of one small attention
            grouped = q.view(1, keys.shape[1], -1, q.shape[-1])
            attended = F.scaled_dot_product_attention(grouped, keys, values).view(q.shape)
        else:
            mask = torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(start)
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return self.head.finish(x, attended)

    def _reserve(self, like: Tensor, length: int) -> None:
        capacity = 0 if self._keys is None else self._keys.shape[2]
        if length <= capacity:
            return
        shape = (like.shape[0], like.shape[1], max(2 * capacity, length + 256), like.shape[3])
        for name in ("_keys", "_values"):
            old, new = getattr(self, name), like.new_zeros(shape)
            if old is not None:
                new[:, :, :capacity] = old
            setattr(self, name, new)


def _joined(laws: list[Tensor | None]) -> Tensor | None:
    return None if laws[0] is None else torch.cat(laws)  # type: ignore[arg-type]
