"""Speculative decoding beside plain `generate` and transformers' own assisted generation, on the same prompts.

All modes take turns on every prompt, in rotating order, so that a busy moment of the machine hits all of them.
"""

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from optinfer import data
from optinfer.bench.rows import SpeculativeRow
from optinfer.bench.serving import LlamaCpp, Peer, TraceRequest
from optinfer.bench.worker import environment_of
from optinfer.speculative import ChainDraft, Draft, PromptLookupDraft, Proposal, SelfDraft, speculative_decoding
from optinfer.speculative.drafters import ModelDraft
from optinfer.speculative.sampler import Sampler

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

KINDS: dict[str, data.PromptKind] = {"copy": "rewrite", "summarize": "summarize", "open": "chat", "code": "code"}


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: str, device: "torch.device | str" = "cpu") -> "BatchEncoding":
    """A chat prompt, ready for `generate`."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)


def verify_curve(
    model: "PreTrainedModel",
    widths: Iterable[int] = (1, 2, 3, 4, 5, 6, 8, 11, 16),
    context: int = 128,
    repeats: int = 9,
) -> dict[int, float]:
    """Seconds of one pass over 1, 2, … tokens with ``context`` tokens in the cache: medians of interleaved repeats."""
    from transformers import DynamicCache

    widths = list(widths)
    ids = torch.randint(0, model.config.vocab_size, (1, context + max(widths)), device=model.device)
    cache = DynamicCache(config=model.config)
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    with torch.inference_mode():
        model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
        for repeat in range(repeats + 1):
            for width in widths:
                _synchronize(model)
                start = time.perf_counter()
                model(ids[:, context : context + width], past_key_values=cache)
                _synchronize(model)
                if repeat:  # the first round warms up
                    seconds[width].append(time.perf_counter() - start)
                cache.crop(-width)
    return {width: median(values) for width, values in seconds.items()}


def compare(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    modes: dict[str, dict[str, Any]],
    new_tokens: int = 64,
    others: Sequence[Peer] = (),
) -> list[SpeculativeRow]:
    """Time greedy generation in every mode on every prompt, taking turns.

    Args:
        modes: name -> further arguments of `generate`; one must be called ``"plain"``.
        others: decode as many tokens as plain did, in the same turns; plainly, for scale.

    Returns:
        One row per mode: ``seconds`` (median per prompt), ``seconds_per_token``, ``speedup`` over plain (ratio of the
        times per token, over all prompts), ``slowest`` and ``fastest`` prompt's speed-up, ``equal`` (share of texts equal
        to plain's), and for our decoder ``tokens_per_pass`` and ``acceptance`` by position.
    """
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in modes}
    texts: dict[str, list[torch.Tensor]] = {name: [] for name in modes}
    rounds: dict[str, list[Any]] = {name: [] for name in modes}
    names = list(modes)
    for turn, prompt in enumerate(tqdm(prompts, desc="prompts", leave=False)):
        inputs = encode(tokenizer, prompt, model.device)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _synchronize(model)
            start = time.perf_counter()
            output = model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **modes[name]
            )
            _synchronize(model)
            seconds = time.perf_counter() - start
            new = output.sequences[0, inputs.input_ids.shape[1] :]
            taken[name].append((seconds, len(new)))
            texts[name].append(new)
            rounds[name] += output.statistics.rounds if "statistics" in output else []
        for peer in others:
            start = time.perf_counter()
            (done,) = peer.serve([TraceRequest(inputs.input_ids[0].tolist(), taken["plain"][-1][1])])
            taken.setdefault(peer.name, []).append((time.perf_counter() - start, done.num_tokens))
    rows = [_row(name, taken, texts, rounds[name]) for name in names]
    rows += [replace(_row(peer.name, taken, texts, []), peer=peer.name, mode="plain") for peer in others]
    return [replace(row, dtype=str(model.dtype)) for row in rows]


def _row(
    name: str, taken: dict[str, list[tuple[float, int]]], texts: dict[str, Any], rounds: list[Any]
) -> SpeculativeRow:
    from optinfer.speculative import Statistics

    def per_token(mode: str) -> list[float]:
        return [seconds / count for seconds, count in taken[mode]]

    def overall(mode: str) -> float:
        return sum(s for s, _ in taken[mode]) / sum(n for _, n in taken[mode])

    gains = [plain / own for plain, own in zip(per_token("plain"), per_token(name), strict=True)]
    same = [torch.equal(a, b) for a, b in zip(texts["plain"], texts.get(name, []))]  # others tell no tokens
    row = SpeculativeRow(
        what="generate",
        peer="optinfer" if rounds else "transformers",
        mode=name,
        prompts=len(gains),
        seconds=median(s for s, _ in taken[name]),
        seconds_per_token=overall(name),
        speedup=overall("plain") / overall(name),
        slowest=min(gains),
        fastest=max(gains),
        equal=sum(same) / len(same) if same else None,
        samples=[round(s, 4) for s, _ in taken[name]],
    )
    if rounds:
        statistics = Statistics(rounds)
        row.tokens_per_pass = statistics.tokens_per_pass
        row.alpha = statistics.alpha
        row.acceptance = [round(a, 4) for a in statistics.acceptance()[:8]]
    return row


def ours(draft: Draft, num_draft_tokens: int = 10, adaptive_drafts: bool = True) -> dict[str, Any]:
    """Arguments of `generate` for our decoder."""
    return {
        "custom_generate": speculative_decoding,
        "draft": draft,
        "num_draft_tokens": num_draft_tokens,
        "adaptive_drafts": adaptive_drafts,
    }


def default_modes(model: "PreTrainedModel") -> dict[str, dict[str, Any]]:
    """Plain, transformers' two, and ours; the trained head where it fits this model and is installed."""
    from optinfer.errors import OptinferError
    from optinfer.speculative.draft_head import HeadDraft

    most = model.config.num_hidden_layers
    shallow = SelfDraft([i for i in range(most) if not most // 3 <= i < most // 3 + most // 6])
    shallow.bind(model)
    modes = {
        "plain": {},
        "transformers prompt lookup": {"prompt_lookup_num_tokens": 10},
        "prompt lookup": ours(PromptLookupDraft()),
        "transformers assisted, 5/6 of the layers": {"assistant_model": shallow.model},
        "5/6 of the layers": ours(ModelDraft(shallow.model)),
    }
    try:
        head = HeadDraft.shipped()
        head.bind(model)
    except (OptinferError, ValueError):
        return modes
    modes["head"] = ours(head, 4)
    modes["lookup then head"] = ours(ChainDraft([PromptLookupDraft(min_ngram=2), head]))
    return modes


def run(quick: bool = False) -> list[SpeculativeRow]:
    """Every mode on copying, summarizing, open questions and code, and the verify curve in bf16 and fp32.

    llama.cpp takes part where `OPTINFER_LLAMA_CPP_PYTHON` names the python of its environment.
    """
    from optinfer.models import load_model

    torch.manual_seed(0)
    model, tokenizer = load_model()
    rows: list[SpeculativeRow] = []
    modes = default_modes(model)
    with contextlib.ExitStack() as stack:
        others: list[Peer] = []
        if python := environment_of("llama.cpp", "OPTINFER_LLAMA_CPP_PYTHON"):
            others.append(stack.enter_context(contextlib.closing(LlamaCpp(python))))
        warm_up = data.prompts("chat")[:1]
        compare(model, tokenizer, warm_up, {"plain": modes["plain"]}, new_tokens=8, others=others)
        for kind, source in KINDS.items():
            prompts = data.prompts(source)[: 2 if quick else None]
            found = compare(model, tokenizer, prompts, modes, 32 if quick else 96, others)
            rows += [replace(row, prompts_of=kind) for row in found]
    for dtype in (model.dtype, torch.float32):
        other = model if dtype == model.dtype else load_model(dtype=dtype)[0]
        rows += verify_rows(other, verify_curve(other, repeats=3 if quick else 9))
    return rows


def verify_rows(model: "PreTrainedModel", curve: dict[int, float]) -> list[SpeculativeRow]:
    """A `verify_curve` of the model as rows."""
    names = SpeculativeRow(what="verify", peer="transformers", dtype=str(model.dtype))
    return [replace(names, tokens=width, seconds=seconds) for width, seconds in curve.items()]


class OracleDraft(Draft):
    """A draft of known quality, for drawing the trade-off: it knows the text and errs on purpose.

    Args:
        answer: the whole text, [1, length].
        accuracy: the chance that a drafted token is right, independent of all others.
        seconds_per_token: time that it pretends to need.
    """

    def __init__(self, answer: torch.Tensor, accuracy: float, seconds_per_token: float = 0.0, seed: int = 0):
        self.answer, self.accuracy, self.seconds_per_token = answer, accuracy, seconds_per_token
        self._generator = torch.Generator().manual_seed(seed)

    def propose(self, input_ids: torch.Tensor, num_tokens: int, sampler: Sampler) -> Proposal:
        start = input_ids.shape[1]
        tokens = self.answer[0, start : start + num_tokens].clone()
        wrong = torch.rand(len(tokens), generator=self._generator, device="cpu").to(tokens.device) >= self.accuracy
        tokens[wrong.to(tokens.device)] = 0
        time.sleep(self.seconds_per_token * len(tokens))
        return Proposal(tokens)


def trade_off(
    model: "PreTrainedModel",
    inputs: "BatchEncoding",
    accuracies: Iterable[float] = (0.0, 0.5, 0.8, 1.0),
    lengths: Iterable[int] = (1, 3, 5, 10),
    cost: float = 0.1,
    new_tokens: int = 32,
) -> list[SpeculativeRow]:
    """Measured speed-up of drafts of known quality, each timed next to a plain run; ``cost`` as in the theory.

    ``alpha`` in a row is the acceptance that was reached: in 16 bits a wide pass rounds differently from a narrow one,
    and from where the target leaves the text that the draft knows, even a perfect draft is wrong.
    Everything after the first pass is timed, and compared per token, so that the prompt does not count.
    """
    limit = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    answer = model.generate(**inputs, **limit)
    one_pass = verify_curve(model, [1], context=inputs.input_ids.shape[1], repeats=5)[1]
    names, rows = SpeculativeRow(what="trade-off", peer="optinfer", dtype=str(model.dtype)), []
    for accuracy in accuracies:
        for gamma in lengths:
            seconds, alpha = {}, 0.0
            for name, draft in (
                ("plain", OracleDraft(answer[:, :0], 1.0)),
                ("drafted", OracleDraft(answer, accuracy, cost * one_pass, seed=gamma)),
            ):
                s = model.generate(
                    **inputs, **limit, **ours(draft, gamma, adaptive_drafts=False), return_dict_in_generate=True
                ).statistics
                later = s.tokens - len(s.rounds[0].emitted)
                spent = s.seconds["draft"] + s.seconds["verify"] + s.seconds["overhead"]
                seconds[name], alpha = spent / max(1, later), s.alpha
            gain = seconds["plain"] / seconds["drafted"]
            rows.append(replace(names, accuracy=accuracy, gamma=gamma, alpha=alpha, speedup=gain))
    return rows


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
