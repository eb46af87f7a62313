"""Draft, verify, accept: speculative decoding as a decoding method of ``model.generate``.

model.generate(**inputs, custom_generate=optinfer.speculative_decoding, draft="prompt_lookup", num_draft_tokens=5)
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optinfer.speculative.by_name import DraftLike, as_draft
from optinfer.speculative.draft_length import AdaptiveLength, FixedLength
from optinfer.speculative.drafters import Draft, Proposal, context_length, names
from optinfer.speculative.rollback import cached_tokens, check_can_truncate, truncate
from optinfer.speculative.sampler import Sampler
from optinfer.speculative.statistics import Round, SpeculativeOutput, Statistics
from optinfer.upload import upload

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

# What `generate` prepares for a text; all of it is understood here, and nothing else is.
_INPUTS_OF_TEXT = {"attention_mask", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}


def speculative_decoding(
    model: "PreTrainedModel",
    input_ids: Tensor,
    logits_processor: "LogitsProcessorList | None" = None,
    stopping_criteria: "StoppingCriteriaList | None" = None,
    generation_config: "GenerationConfig | None" = None,
    draft: DraftLike = "prompt_lookup",
    num_draft_tokens: int = 5,
    adaptive_drafts: bool = True,
    stream_to: "BaseStreamer | None" = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Tensor | SpeculativeOutput:
    """Generate as ``model.generate`` would, several tokens per pass of the model; the output's law is the same.

    Args:
        draft: who guesses, see `as_draft`: a name such as ``"prompt_lookup"``, a smaller model, a drafter, or a list.
        num_draft_tokens: how many tokens are drafted per pass, at most.
        adaptive_drafts: draft fewer, or none, where measured times and acceptance say so.
        stream_to: a streamer, which gets each token once it is final. (transformers hands `generate`'s own ``streamer``
            to no decoding method from outside.)
        generator: random numbers of the sampling; torch's global ones when None.

    Returns:
        Token ids [1, length]; with ``return_dict_in_generate=True`` a `SpeculativeOutput` whose ``statistics`` say how
        many tokens were accepted at each position and where the time went.

    Raises:
        ValueError: a mode that cannot be combined (beams, several texts, no cache), an input that is not text, or a draft
            that does not fit.
    """
    cache: Any = model_kwargs.get("past_key_values")
    _check_mode(model, input_ids, generation_config, cache, num_draft_tokens)
    _check_inputs(input_ids, model_kwargs)
    draft = as_draft(draft)
    for part in draft.members:
        part.bind(model)
    sampler = Sampler(logits_processor, not generation_config.do_sample, generator)
    length = (AdaptiveLength if adaptive_drafts else FixedLength)(num_draft_tokens)
    longest = min(generation_config.max_length, context_length(model))
    statistics, finished = Statistics(), False
    read = input_ids.cpu()  # the text where Python reads it: then a round waits for the device once, for its tokens
    if stream_to is not None:
        stream_to.put(read)

    while not finished:
        room = longest - input_ids.shape[1] - 1  # the target adds one token to every draft
        with _timed() as drafting:
            member, evidence, proposal = _propose(draft, input_ids, read, length, room, sampler)
        with _timed() as verifying:
            already = cached_tokens(cache)
            text = torch.cat([input_ids, proposal.tokens[None]], dim=1)
            logits, hidden = _target_pass(model, text, cache, len(proposal) + 1, draft.needs_hidden, model_kwargs)
            judged = sampler.accept(text, proposal.tokens, proposal.probs, logits)
            both = torch.cat([proposal.tokens, judged]).tolist()
            drafted, emitted = both[: len(proposal)], [token for token in both[len(proposal) :] if token >= 0]
            accepted = len(emitted) - 1
        with _timed() as rest:
            read, emitted, finished = _append(read, emitted, stopping_criteria, stream_to)
            input_ids = torch.cat([input_ids, judged[None, : len(emitted)]], dim=1)
            truncate(cache, input_ids.shape[1] - 1)  # all but the newest token, which nobody has run yet
            if hidden is not None:
                draft_sees = hidden[:, : input_ids.shape[1] - 1 - already]
                for other in draft.members:
                    other.observe(draft_sees)
            if statistics.rounds:
                length.record(member, len(proposal), accepted, drafting[0], verifying[0], evidence)
        _account(statistics, drafting, verifying, rest)
        statistics.rounds.append(Round(member, drafted, accepted, emitted))

    if stream_to is not None:
        stream_to.end()
    if generation_config.return_dict_in_generate:
        return SpeculativeOutput(sequences=input_ids, statistics=statistics)
    return input_ids


def _propose(
    draft: Draft, input_ids: Tensor, read: Tensor, length: FixedLength, room: int, sampler: Sampler
) -> tuple[str, int | None, Proposal]:
    """The first member of the chain that has something to say, its evidence, and what it says."""
    for name, member in zip(names(draft.members), draft.members):
        text = read if member.on_host else input_ids
        evidence = member.evidence(text)
        if evidence == 0:
            continue
        most = min(length.choose(name, evidence), room, member.max_tokens or room)
        if most > 0 and len(proposal := member.propose(text, most, sampler)):
            if proposal.tokens.device != input_ids.device:
                proposal.tokens = upload(proposal.tokens, input_ids.device)
            return name, evidence, proposal
    return "", None, Proposal(input_ids.new_empty(0))


def _target_pass(
    model: Any, text: Tensor, cache: Any, positions: int, needs_hidden: bool, model_kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Run what the cache does not hold; logits of the last ``positions`` tokens [positions, vocab], hidden states."""
    cached, inputs = cached_tokens(cache), {}
    if (mask := model_kwargs.get("attention_mask")) is not None:  # the prompt was padded
        mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, cached:]}
    outputs = model(
        text[:, cached:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=positions,
        output_hidden_states=needs_hidden,
        **inputs,
    )
    return outputs.logits[0], outputs.hidden_states[-1] if needs_hidden else None


def _append(
    read: Tensor, emitted: list[int], stopping_criteria: "StoppingCriteriaList | None", stream_to: "BaseStreamer | None"
) -> tuple[Tensor, list[int], bool]:
    """Add the tokens one by one, as plain decoding would: any of them may be the last."""
    for count, token in enumerate(emitted, start=1):
        read = torch.cat([read, read.new_tensor([[token]])], dim=1)
        if stream_to is not None:
            stream_to.put(read[0, -1:])
        if stopping_criteria is not None and bool(stopping_criteria(read, None).all()):
            return read, emitted[:count], True
    return read, emitted, False


@contextmanager
def _timed() -> Iterator[list[float]]:
    """A list that holds the seconds the block took, once it is over."""
    seconds, start = [0.0], time.perf_counter()
    yield seconds
    seconds[0] = time.perf_counter() - start


def _account(statistics: Statistics, drafting: list[float], verifying: list[float], rest: list[float]) -> None:
    statistics.seconds["draft"] += drafting[0]
    statistics.seconds["verify" if statistics.rounds else "prefill"] += verifying[0]
    statistics.seconds["overhead"] += rest[0]


def _check_mode(model: Any, input_ids: Tensor, config: Any, cache: Any, num_draft_tokens: int) -> None:
    if not isinstance(num_draft_tokens, int) or num_draft_tokens < 1:
        raise ValueError(
            f"num_draft_tokens counts tokens: 1, 2, …, got {num_draft_tokens!r}; to decode plainly leave custom_generate out"
        )
    if num_draft_tokens >= context_length(model):
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens} is more than the model's context of {context_length(model)} tokens holds; "
            f"drafts of 2 to 16 tokens pay"
        )
    if config.num_beams > 1 or config.get_generation_mode().name not in ("GREEDY_SEARCH", "SAMPLE"):
        raise ValueError(
            f"speculative decoding is greedy or samples; it cannot be combined with {config.get_generation_mode().value!r}. "
            f"Drop custom_generate for that mode, or the option that asks for it (num_beams, prompt_lookup_num_tokens, …)"
        )
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"speculative decoding works on one text at a time, got {input_ids.shape[0]} (several prompts, or "
            f"num_return_sequences); call generate once per text, or use optinfer.Engine for many"
        )
    if cache is None:
        raise ValueError("speculative decoding keeps a key-value cache; leave out use_cache=False")
    if model.config.is_encoder_decoder:
        raise ValueError("speculative decoding is for decoder-only models; this one has an encoder")
    unkept = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if asked := [name for name in unkept if getattr(config, name, False)]:
        raise ValueError(f"{', '.join(asked)}: not kept while decoding speculatively; use plain generate")
    check_can_truncate(cache)


def _check_inputs(input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Text alone, at the positions that text has: whatever else the model was given would be lost on the way."""
    given = {
        name for name, value in model_kwargs.items() if not (value is None or (isinstance(value, dict) and not value))
    }
    if unknown := sorted(given - _INPUTS_OF_TEXT):
        raise ValueError(
            f"speculative decoding runs the model on text alone, no pictures or embeddings; it does not pass on "
            f"{', '.join(unknown)}. Leave it out, or leave custom_generate out"
        )
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if positions is None:
        return
    mask = torch.ones_like(input_ids) if mask is None else mask
    usual, mask = ((m[:, -positions.shape[-1] :]) for m in ((mask.cumsum(-1) - 1), mask))
    if positions.shape[-1] <= input_ids.shape[1] and bool(((positions != usual) & (mask != 0)).any()):
        raise ValueError("position_ids other than 0, 1, 2, … are not supported by speculative decoding; leave them out")
