"""The decoder on a small random model: the same tokens as plain `generate`, whatever drafts."""

import copy

import pytest
import torch
import transformers
from scipy.stats import chisquare
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import optinfer
from optinfer import data
from optinfer.speculative import ChainDraft, Draft, ModelDraft, PromptLookupDraft, Proposal, QuantizedDraft, SelfDraft
from optinfer.speculative.draft_head import DraftHead, HeadDraft
from optinfer.speculative.draft_length import AdaptiveLength
from tests.devices import cpu_only


def llama(seed, vocab=40, layers=3, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    config.update(changes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def target():
    return llama(0)


PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 11, 5, 6]])
LENGTH = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}


class Perfect(Draft):
    """Knows the answer; optionally wrong at every n-th token."""

    def __init__(self, answer, wrong_every=0):
        self.answer, self.wrong_every = answer, wrong_every

    def propose(self, input_ids, num_tokens, sampler):
        start = input_ids.shape[1]
        tokens = self.answer[0, start : start + num_tokens].clone()
        for k in range(len(tokens)):
            if self.wrong_every and (start + k) % self.wrong_every == 0:
                tokens[k] = (tokens[k] + 1) % 40
        return Proposal(tokens)


def head(target, **options):
    torch.manual_seed(3)
    return HeadDraft(DraftHead.for_model(target, torch.arange(0, 40, 2)), **options)


def drafts(target):
    return {
        "another model": ModelDraft(llama(9, layers=1)),
        "terrible": ModelDraft(llama(17, layers=1), min_confidence=0.0),
        "confident": ModelDraft(llama(9, layers=1), min_confidence=0.3),
        "itself": ModelDraft(copy.deepcopy(target)),
        "lookup": PromptLookupDraft(3, 1),
        "int8": QuantizedDraft("int8"),
        "nf4": QuantizedDraft("nf4"),
        "first layer": SelfDraft(1),
        "some layers": SelfDraft([0, 2]),
        "head": head(target, min_confidence=0.0),
        "chain": ChainDraft([PromptLookupDraft(3, 2), head(target, min_confidence=0.0)]),
    }


NAMES = [
    "another model",
    "terrible",
    "confident",
    "itself",
    "lookup",
    "int8",
    "nf4",
    "first layer",
    "some layers",
    "head",
    "chain",
]


def speculate(target, draft, prompt=PROMPT, **options):
    options = {
        "custom_generate": optinfer.speculative_decoding,
        "return_dict_in_generate": True,
        "adaptive_drafts": False,
    } | options
    return target.generate(prompt, draft=draft, **options)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_plain_generate(target, name, cache):
    plain = target.generate(PROMPT, do_sample=False, **LENGTH)
    for num in (1, 4):
        out = speculate(
            target, drafts(target)[name], do_sample=False, num_draft_tokens=num, cache_implementation=cache, **LENGTH
        )
        assert torch.equal(out.sequences, plain)
        if name == "itself":
            assert out.statistics.alpha == 1.0


def test_a_draft_can_be_used_for_a_second_text(target):
    draft = drafts(target)["chain"]
    for prompt in (PROMPT, torch.tensor([[3, 3, 4]]), PROMPT):
        plain = target.generate(prompt, do_sample=False, **LENGTH)
        assert torch.equal(speculate(target, draft, prompt, do_sample=False, **LENGTH).sequences, plain)


def test_paged_cache(target):
    paged = pytest.importorskip("optinfer.kv_cache")
    if not hasattr(paged, "PagedCache"):
        pytest.skip("no paged cache in this version")
    plain = target.generate(PROMPT, do_sample=False, **LENGTH)
    cache = optinfer.PagedCache.for_model(target, num_blocks=32, block_size=4)
    out = speculate(target, drafts(target)["another model"], do_sample=False, past_key_values=cache, **LENGTH)
    assert torch.equal(out.sequences, plain)


@pytest.mark.parametrize("wrong_every", [0, 2, 5])
def test_statistics_count_what_happened(target, wrong_every):
    plain = target.generate(PROMPT, do_sample=False, **LENGTH)
    out = speculate(target, Perfect(plain, wrong_every), do_sample=False, num_draft_tokens=4, **LENGTH)
    assert torch.equal(out.sequences, plain)
    s = out.statistics
    assert s.tokens == 40
    assert [token for r in s.rounds for token in r.emitted] == plain[0, PROMPT.shape[1] :].tolist()
    if wrong_every == 0:
        assert s.passes == 8
        assert s.tokens_per_pass == 5.0
        assert s.acceptance() == [1.0] * 4
    if wrong_every == 2:
        assert max(r.accepted for r in s.rounds) == 1


@pytest.mark.parametrize("name", ["another model", "lookup", "itself"])
@pytest.mark.parametrize("position", range(1, 9))
def test_end_of_sequence_and_length_inside_the_draft(target, name, position):
    plain = target.generate(PROMPT, do_sample=False, **LENGTH)
    end = int(plain[0, PROMPT.shape[1] + position])
    ours = [speculate(target, drafts(target)[name], do_sample=False, num_draft_tokens=5, **o).sequences for o in (
        {**LENGTH, "eos_token_id": end}, {**LENGTH, "max_new_tokens": position},
    )]  # fmt: skip
    assert torch.equal(ours[0], target.generate(PROMPT, do_sample=False, **{**LENGTH, "eos_token_id": end}))
    assert torch.equal(ours[1], plain[:, : PROMPT.shape[1] + position])


def test_processors_see_the_text_at_each_position(target):
    options = {
        "do_sample": False,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        **LENGTH,
        "eos_token_id": 7,
    }
    plain = target.generate(PROMPT, **options)
    for name in ("another model", "itself", "lookup", "head"):
        assert torch.equal(speculate(target, drafts(target)[name], num_draft_tokens=4, **options).sequences, plain)


class Counting(LogitsProcessor):
    """Behaves by how often it was asked: forces a token at its third and sixth call, and keeps what it saw."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores):
        self.asked.append(input_ids.shape[1])
        if len(self.asked) in (3, 6):
            scores = torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([len(self.asked)]), 0.0)
        return scores


@pytest.mark.parametrize("name", ["another model", "itself", "lookup", "head", "chain"])
def test_processors_that_remember_are_asked_as_in_plain_decoding(target, name):
    counts = Counting(), Counting()
    options = {"do_sample": False, **LENGTH}
    plain = target.generate(PROMPT, logits_processor=LogitsProcessorList([counts[0]]), **options)
    out = speculate(
        target, drafts(target)[name], logits_processor=LogitsProcessorList([counts[1]]), num_draft_tokens=4, **options
    )
    assert torch.equal(out.sequences, plain) and counts[0].asked == counts[1].asked
    assert any(r.drafted for r in out.statistics.rounds)


def test_guidance_is_plain_decodings(target):
    """Classifier-free guidance runs the model itself, on a cache of its own, once per token."""
    options = {"do_sample": False, "guidance_scale": 1.7, "negative_prompt_ids": PROMPT[:, :2], **LENGTH}
    plain = target.generate(PROMPT, **options)
    assert not torch.equal(plain, target.generate(PROMPT, do_sample=False, **LENGTH))
    for name in ("itself", "lookup"):
        assert torch.equal(speculate(target, drafts(target)[name], **options).sequences, plain)


def test_sampled_texts_under_a_processor_that_remembers_have_the_targets_law():
    """At its second call it leaves one token: so the first token has the target's law, and the second is certain."""

    class SecondIsFive(LogitsProcessor):
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            only_five = torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([5]), 0.0)
            return only_five if self.calls == 2 else scores

    target, n, generator = llama(0, vocab=12), 300, torch.Generator(torch.get_default_device()).manual_seed(3)
    prompt, draft = PROMPT % 12, ModelDraft(llama(9, vocab=12, layers=1))
    counts = torch.zeros(12, dtype=torch.float64)
    for _ in range(n):
        out = speculate(
            target, draft, prompt, do_sample=True, max_new_tokens=2, generator=generator, eos_token_id=None,
            pad_token_id=0, top_k=0, logits_processor=LogitsProcessorList([SecondIsFive()]),
        )  # fmt: skip
        assert out.sequences[0, -1] == 5
        counts[out.sequences[0, -2]] += 1
    law = target(prompt).logits[0, -1].double().softmax(-1) * n
    assert chisquare(counts.tolist(), (law * counts.sum() / law.sum()).tolist()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
        ({"position_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11]])}, "position_ids"),
    ],
)
def test_inputs_that_are_not_text_are_refused(target, inputs, says):
    prompt = None if "inputs_embeds" in inputs else PROMPT[:, :7]
    with pytest.raises(ValueError, match=says):
        speculate(target, "prompt_lookup", prompt, do_sample=False, **inputs, **LENGTH)


def test_pictures_are_refused():
    """A model that would take them: they would be dropped after the first pass."""
    config = transformers.LlavaConfig(
        text_config=llama(0).config,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        image_token_id=39,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    prompt = torch.tensor([[1, 39, 39, 39, 39, 5]])
    options = {"do_sample": False, **LENGTH}
    with pytest.raises(ValueError, match="text alone, no pictures.*(pixel_values|mm_encoder_outputs)"):
        speculate(model, "prompt_lookup", prompt, pixel_values=torch.randn(1, 3, 8, 8), **options)
    plain = model.generate(PROMPT % 39, **options)  # without one it is a text model like any other
    assert torch.equal(speculate(model, "prompt_lookup", PROMPT % 39, **options).sequences, plain)


def test_a_draft_with_a_shorter_context(target):
    short = llama(9, layers=1, max_position_embeddings=PROMPT.shape[1] + 6)
    plain = target.generate(PROMPT, do_sample=False, **LENGTH)
    out = speculate(target, short, do_sample=False, num_draft_tokens=4, **LENGTH)
    assert torch.equal(out.sequences, plain)
    length, rounds = PROMPT.shape[1], out.statistics.rounds
    for r in rounds:
        assert not r.drafted or length + len(r.drafted) - 1 <= short.config.max_position_embeddings
        length += len(r.emitted)
    assert any(r.drafted for r in rounds) and not rounds[-1].drafted


def test_a_draft_that_cannot_forget_is_refused(target):
    config = transformers.MistralConfig(**llama(0).config.to_dict() | {"sliding_window": 4})
    with pytest.raises(ValueError, match="the draft, a MistralForCausalLM, cannot take part"):
        speculate(target, transformers.MistralForCausalLM(config).eval(), do_sample=False, **LENGTH)


def test_padded_prompt(target):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    plain = target.generate(padded, attention_mask=mask, do_sample=False, **LENGTH)
    out = speculate(target, PromptLookupDraft(2, 1), padded, attention_mask=mask, do_sample=False, **LENGTH)
    assert torch.equal(out.sequences, plain)


def test_streamer_and_own_stopping_criterion(target):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended += 1

    class AfterSeven(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= PROMPT.shape[1] + 7], device=input_ids.device)

    streamer = Streamer()
    plain = target.generate(PROMPT, do_sample=False, **LENGTH)[:, : PROMPT.shape[1] + 7]
    out = speculate(
        target, ModelDraft(copy.deepcopy(target)), do_sample=False, stream_to=streamer,
        stopping_criteria=StoppingCriteriaList([AfterSeven()]), **LENGTH,
    )  # fmt: skip
    assert torch.equal(out.sequences, plain)
    assert streamer.tokens == plain[0].tolist()
    assert streamer.ended == 1


def exact_law(target, prompt, options):
    """The law of the next two tokens, with plain transformers' processors, by running every first token."""
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    chain = LogitsProcessorList()
    if "repetition_penalty" in options:
        chain.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    chain.append(TemperatureLogitsWarper(options["temperature"]))
    if options.get("top_k"):
        chain.append(TopKLogitsWarper(options["top_k"]))
    if options.get("top_p", 1.0) < 1.0:
        chain.append(TopPLogitsWarper(options["top_p"]))
    vocab = target.config.vocab_size
    with torch.no_grad():
        first = chain(prompt, target(prompt).logits[:, -1]).softmax(-1)[0]
        texts = torch.cat([prompt.expand(vocab, -1), torch.arange(vocab)[:, None]], dim=1)
        second = chain(texts, target(texts).logits[:, -1]).softmax(-1)
    return (first[:, None] * second).double()


@pytest.mark.parametrize("name", ["another model", "itself", "lookup", "head", "some layers"])
@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 0.6, "top_k": 5, "repetition_penalty": 1.3},
        {"temperature": 1.4, "top_k": 0, "top_p": 0.7},
    ],
)
def test_sampled_texts_have_the_targets_law(name, filters):
    target = llama(0, vocab=12)
    prompt, n = PROMPT % 12, 300
    draft = {
        "another model": ModelDraft(llama(9, vocab=12, layers=1)),
        "itself": ModelDraft(target),
        "lookup": PromptLookupDraft(2, 1),
        "some layers": SelfDraft([0, 2]),
        "head": HeadDraft(DraftHead.for_model(target, torch.arange(0, 12, 2)), min_confidence=0.0),
    }[name]
    generator = torch.Generator(torch.get_default_device()).manual_seed(11)
    counts = torch.zeros(12, 12, dtype=torch.float64)
    for _ in range(n):
        new = speculate(
            target, draft, prompt, do_sample=True, num_draft_tokens=2, max_new_tokens=2, generator=generator, eos_token_id=None,
            pad_token_id=0, **filters,
        ).sequences[0, -2:]  # fmt: skip
        counts[new[0], new[1]] += 1
    law = exact_law(target, prompt, filters)
    assert counts[law == 0].sum() == 0
    expected = law * n
    common = expected >= 5
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, [w * sum(observed) / sum(wanted) for w in wanted]).pvalue > 1e-4


def test_seeds_reproduce(target):
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(speculate(target, ModelDraft(llama(9, layers=1)), do_sample=True, **LENGTH).sequences)
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_draft_tokens": 0}, "counts tokens"),
        ({"num_draft_tokens": -3}, "counts tokens"),
        ({"num_draft_tokens": 4000}, "context"),
        ({"num_beams": 3}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "one text at a time"),
        ({"use_cache": False}, "use_cache"),
        ({"draft": llama(1, vocab=33)}, "TextDraft"),
        ({"draft": "prompt_look"}, "prompt_lookup"),
        ({"draft": SelfDraft(99)}, "layers"),
        ({"output_scores": True}, "output_scores"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"draft": []}, "draft must be"),
    ],
)
def test_bad_input(target, options, says):
    options = {"draft": "prompt_lookup", "do_sample": False, **LENGTH} | options
    with pytest.raises(ValueError, match=says):
        speculate(target, **options)


def test_draft_on_another_device(target):
    with pytest.raises(ValueError, match="move it"):
        speculate(target, ModelDraft(llama(9).to("meta")), do_sample=False, **LENGTH)


def test_sliding_window_is_refused():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = MistralConfig(**sizes, num_hidden_layers=1, num_key_value_heads=1, sliding_window=8)
    with pytest.raises(ValueError, match="sliding"):
        speculate(MistralForCausalLM(config).eval(), "prompt_lookup", do_sample=False, **LENGTH)


def test_a_different_tokenizer_drafts_through_text():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from optinfer.speculative import TextDraft

    def letters(order):
        vocab = {c: i for i, c in enumerate(order)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
    target = llama(0)
    plain = target.generate(PROMPT, do_sample=False, **LENGTH)
    draft = TextDraft(llama(9, layers=1), letters(alphabet[::-1]), letters(alphabet))
    out = speculate(target, draft, do_sample=False, num_draft_tokens=3, **LENGTH)
    assert torch.equal(out.sequences, plain)
    assert any(r.drafted for r in out.statistics.rounds)


def test_lookup_copies_what_followed_the_ngram_before():
    draft = PromptLookupDraft(3, 2)
    text = torch.tensor([[1, 2, 3, 4, 5, 9, 2, 3, 7, 7, 2, 3]])
    assert draft.propose(text, 4, None).tokens.tolist() == [4, 5, 9, 2]  # nothing was copied yet: from the beginning
    longer = torch.cat([text, torch.tensor([[7, 7]])], dim=1)
    assert draft.propose(longer, 2, None).tokens.tolist() == [2, 3]
    assert len(draft.propose(torch.tensor([[1, 2, 3, 4]]), 2, None)) == 0
    assert draft.propose(torch.tensor([[8, 8, 8]]), 3, None).tokens.tolist() == [8, 8, 8]


def test_lookup_goes_on_where_it_was_reading():
    """Of several places with the same word the finger decides, and a changed word (50 for 3) does not lose the place."""
    source = [1, 2, 3, 4, 5, 6, 3, 9, 9, 9, 3, 8]
    draft = PromptLookupDraft(2, 1)
    assert draft.evidence(torch.tensor([[*source, 1]])) == 1
    assert draft.propose(torch.tensor([[*source, 1]]), 2, None).tokens.tolist() == [2, 3]
    text = torch.tensor([[*source, 1, 2, 50, 4, 5]])  # 2 was right, 50 was not
    assert draft.propose(text[:, :-2], 2, None).tokens.tolist() == []  # 50 is new
    assert draft.evidence(text[:, :-1]) == 1
    assert draft.propose(text, 3, None).tokens.tolist() == [6, 3, 9]
    again = torch.cat([text, torch.tensor([[7, 3]])], dim=1)
    assert draft.propose(again, 2, None).tokens.tolist() == [9, 9]  # the second 3: neither the first nor the latest


def test_lookup_is_the_longest_ngram_and_its_length_the_evidence():
    draft = PromptLookupDraft(3, 1)
    text = torch.tensor([[1, 2, 3, 40, 9, 3, 50, 1, 2, 3]])
    assert draft.evidence(text) == 3 and draft.propose(text, 1, None).tokens.tolist() == [40]
    assert draft.evidence(torch.tensor([[7, 8]])) == 0 and ModelDraft(None).evidence(text) is None


def test_adaptive_length_trusts_a_longer_match_more_and_learns_by_match():
    length = AdaptiveLength(8)
    chances = [length.acceptance.chance("lookup", matched) for matched in range(1, 6)]
    assert chances == sorted(chances)
    assert length.acceptance.chance("lookup", 2, position=3) == length.acceptance.chance("lookup", 5)
    assert length.acceptance.chance("model") == length.acceptance.chance("model", None, position=3)
    length.record("", 0, 0, 0.0, 1.0)
    for _ in range(40):
        length.record("lookup", 1, 0, 1e-4, 1.1, 1)  # one matching token is never enough in this text
        length.record("lookup", 3, 3, 3e-4, 1.3, 2)  # two always are
    tried = [length.choose("lookup", 1) for _ in range(100)]
    assert set(tried) == {0, 1} and sum(tried) * 0.1 <= 0.02 * 100  # a tenth of a pass each, 2 % of the passes in all
    assert length.choose("lookup", 2) == 8


def test_adaptive_length_turns_a_bad_draft_off_and_a_good_one_up():
    length = AdaptiveLength(8)
    length.record("", 0, 0, 0.0, 1.0)
    for _ in range(10):
        chosen = length.choose("good")
        length.record("good", max(1, chosen), max(1, chosen), 0.05 * chosen, 1.05)
        length.record("bad", 4, 0, 4 * 0.5, 1.1)
    assert length.choose("good") == 8
    assert length.choose("bad") == 0
    for _ in range(200):
        if length.choose("bad"):
            break
    else:
        raise AssertionError("a drafter that was turned off must be tried again")


def test_adaptive_length_times_a_plain_pass_once_a_draft_was_wrong_and_not_before():
    length = AdaptiveLength(8)
    for _ in range(5):  # always right, and cheap: nothing to doubt
        chosen = length.choose("sure")
        assert chosen > 0
        length.record("sure", chosen, chosen, 1e-4 * chosen, 1.0 + 0.03 * chosen)
    assert chosen == 8
    length.record("sure", 8, 2, 8e-4, 1.24)
    assert length.choose("sure") == 0
    length.record("", 0, 0, 0.0, 1.0)
    assert length.choose("sure") > 0


def test_adaptive_length_doubts_a_slow_draft_before_a_plain_pass_was_timed():
    length = AdaptiveLength(8)
    length.record("slow", 4, 4, 4 * 2.0, 1.12)  # each token took two passes
    assert length.choose("slow") == 0


def test_adaptive_length_leaves_a_draft_alone_that_is_too_slow_to_ever_pay():
    length = AdaptiveLength(4)
    length.record("", 0, 0, 0.0, 1.0)
    used = 0
    for _ in range(1000):
        if chosen := length.choose("slow"):
            used += 1
            length.record("slow", chosen, chosen, 3.0 * chosen, 1.05)  # always right, and three passes for a token
        assert 0.0 <= length.acceptance.chance("slow") <= 1.0
    assert 2 <= used <= 60  # now and then, in case only a busy moment made it slow
    while not (chosen := length.choose("slow")):
        pass
    for _ in range(40):
        length.record("slow", 4, 4, 0.2, 1.05)
    assert length.choose("slow") == 4


@cpu_only
def test_a_head_by_cpu_kernels_says_the_same():
    """As near to what fp32 says as torch's own products in bf16 are."""
    target, _ = optinfer.load_model(dtype=torch.bfloat16, device="cpu")
    path = next((data.root() / "data" / "drafts").glob("*.safetensors"))
    head = DraftHead.load(path).attach(target)
    if not head._cpu_weights:
        pytest.skip("no C++ compiler here")
    tokens, hidden = torch.randint(0, 1000, (1, 7)), torch.randn(1, 7, 576).bfloat16()

    def said(by: DraftHead, hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            x = by.inputs(tokens, hidden)
            q, k, v = by.project(x, torch.arange(7))
            return by.logits(by.finish(x, q * k[:, :1] + v[:, :1])).float()

    exact = said(DraftHead.load(path).attach(copy.deepcopy(target).float()), hidden.float())
    by_kernels = said(head, hidden)
    head._cpu_weights = {}
    by_torch = said(head, hidden)
    ours, theirs = ((by - exact).norm() / exact.norm() for by in (by_kernels, by_torch))
    assert 0 < ours < 1.2 * theirs < 0.05
