"""Every causal language model family of the installed transformers as a tiny random model, each tried in its own process.

    python -m tests.serving.families [CONFIG ...]     # prints one line per family
    python -m tests.serving.families --page           # writes the book's page, notebooks/book/families.md

`try_families` is for tests: what became of each (served with the tokens of `generate`, refused with a reason, wrong, died).
"""

import contextlib
import multiprocessing
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

# Names that configs give to the same few sizes.
SIZES = {
    64: ["hidden_size", "n_embd", "d_model"],
    4: ["num_hidden_layers", "n_layer", "num_layers", "num_attention_heads", "n_head", "num_heads", "decoder_attention_heads",
        "decoder_layers", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "encoder_layers",
        "encoder_attention_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"],
    2: ["num_key_value_heads", "num_experts_per_tok", "top_k_experts", "linear_num_key_heads"],
    96: ["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "block_ff_dim"],
    120: ["vocab_size", "vocab_size_per_layer_input"],
    256: ["max_position_embeddings", "n_positions", "max_seq_len", "original_max_position_embeddings", "n_ctx"],
    32: ["moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"],
    9: ["sliding_window", "attention_window"],
    16: ["head_dim", "kv_lora_rank", "q_lora_rank", "v_head_dim", "mamba_d_state", "ssm_state_size",
         "hidden_size_per_layer_input", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim"],
    8: ["qk_rope_head_dim", "qk_nope_head_dim", "attention_chunk_size", "index_topk"],
    1: ["first_k_dense_replace", "n_group", "topk_group", "n_shared_experts", "bos_token_id"],
}  # fmt: skip
NEEDED = {"num_experts_per_tok", "num_key_value_heads", "head_dim"}  # where a family's own default is None, too
# Families whose defaults hide what is special about them, or do not go together with these sizes.
SPECIAL = {
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"], "mamba_d_head": 32},
    "GPTJConfig": {"rotary_dim": 16},
    "CodeGenConfig": {"rotary_dim": 16},
    "Mamba2Config": {"head_dim": 32, "n_groups": 1},
    "BambaConfig": {"attn_layer_indices": [1], "mamba_d_head": 32},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Gemma4Config": {"per_layer_config": {}},
    "Gemma4TextConfig": {"per_layer_config": {}},
}
TOKENS = {"pad_token_id": 0, "eos_token_id": 2}
PROMPTS = (1, 5, 17, 30, 41)


@dataclass(frozen=True)
class Outcome:
    """What became of a family: "served", "refused", "wrong", "died" or "not built", and why."""

    kind: str
    why: str = ""


def causal_families():
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return {config.__name__: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}


def tiny_model(config_class, seed=0, auto=None, **changes):
    """A model of this family with a few thousand parameters, in float32; `auto`: its kind, AutoModelForCausalLM by default."""
    from transformers import AutoModelForCausalLM

    auto = auto or AutoModelForCausalLM
    config = config_class()
    text = config.get_text_config()
    lists = _lists_of_layers(text)
    latent = any(_get(text, name) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    for usual, names in SIZES.items():
        for name in names:
            size = usual
            if latent:  # every head has keys of its own, and head_dim is that of the rotated part
                size = {"head_dim": 8, "num_key_value_heads": 4}.get(name, usual)
            if _get(text, name) is not None or (name in NEEDED and _has(text, name)):
                _set(text, name, size)
    for name, value in {**TOKENS, **lists, **SPECIAL.get(config_class.__name__, {}), **changes}.items():
        _set(text, name, value)
    if kinds := _get(text, "layer_types"):
        _set(text, "layer_types", _one_of_each(kinds))
    for name in ("vision_config", "audio_config"):
        if (tower := _get(config, name)) is not None:
            _shrink(tower)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > 100_000_000:
        raise ValueError(f"{size / 1e6:.0f} million parameters: not tiny")
    torch.manual_seed(seed)
    model = auto.from_config(config).float().eval()
    for parameter in model.parameters():  # spread the logits: ties would make "the" greedy text ambiguous
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    return model


def _one_of_each(values):
    """For the four layers of a tiny model: one of every value."""
    return (list(dict.fromkeys(values)) * 4)[:4]


def _lists_of_layers(text):
    """Other lists with an entry for each layer, for four."""
    count = _get(text, "num_hidden_layers")
    return {
        name: _one_of_each(value)
        for name, value in vars(text).items()
        if name != "layer_types" and isinstance(value, (list, tuple)) and len(value) == count
        if all(isinstance(one, (str, int, float)) for one in value)
    }


def _shrink(tower):
    """The parts that see and hear: as small as they get, with depths and widths of their own."""
    sizes = {"hidden_size": 64, "embed_dim": 64, "intermediate_size": 128, "num_hidden_layers": 2, "depth": 2,
             "num_attention_heads": 2, "num_heads": 2, "encoder_layers": 2, "encoder_attention_heads": 2, "d_model": 64,
             "out_hidden_size": 64, "projection_dim": 64, "encoder_ffn_dim": 128}  # fmt: skip
    for name, size in sizes.items():
        if isinstance(_get(tower, name), int):
            _set(tower, name, size)


def _get(config, name):
    try:
        return getattr(config, name, None)
    except Exception:  # attributes that differ by layer have no one value
        return None


def _has(config, name):
    try:
        return hasattr(config, name) or hasattr(type(config), name)
    except Exception:  # as above
        return False


def _set(config, name, value):
    with contextlib.suppress(AttributeError, NotImplementedError):  # a property that follows from others
        setattr(config, name, value)


def greedy(model, prompt, max_tokens):
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def try_family(config_class, break_pages=False, **options) -> Outcome:
    """Serve a few prompts of a tiny model, in chunks and batches, and compare with `generate`.

    `break_pages` swaps the keys and the values of the first layer after every step: it shows that the comparison can fail.
    """
    from optinfer.attention.needs import UnsupportedModel
    from optinfer.serving import Engine, SamplingParams

    try:
        model = tiny_model(config_class)
    except Exception as error:  # what a family needs to be built is not what is tested
        return Outcome("not built", f"{type(error).__name__}: {str(error)[:120]}")
    try:
        engine = Engine(model, num_blocks=60, block_size=4, max_batched_tokens=24, max_model_len=128, **options)
    except UnsupportedModel as error:
        if "cannot compute a plain prompt" in str(
            error
        ):  # our sizes do not go together: nothing is known of the family
            return Outcome("not built", str(error))
        return Outcome("refused", str(error))
    if break_pages:
        run, pool = engine.runner.run, engine.runner.pool

        def run_and_break(*args):
            logits = run(*args)
            pool.keys[0], pool.values[0] = pool.values[0].clone(), pool.keys[0].clone()
            return logits

        engine.runner.run = run_and_break
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    prompts = [torch.randint(3, 120, (n,), generator=generator).tolist() for n in PROMPTS]
    prompts.append([*prompts[-1][:24], 7, 8])  # a prefix hit
    expected = [greedy(model, prompt, 10) for prompt in prompts]
    got = [done.token_ids for done in engine.generate(prompts, SamplingParams(max_tokens=10))]
    right = sum(a == b for a, b in zip(got, expected))
    return (
        Outcome("served")
        if right == len(prompts)
        else Outcome("wrong", f"{len(prompts) - right} of {len(prompts)} texts")
    )


def try_families(families, work=try_family, seconds=300, **options):
    """Yields (name, Outcome). A child process for each family: one that crashes takes nobody with it."""
    warnings.filterwarnings("ignore")
    import optinfer.serving  # noqa: F401  loaded once, for all children

    context = multiprocessing.get_context("fork")
    for name, config_class in families.items():
        answer = context.SimpleQueue()

        def child(config_class=config_class, answer=answer):
            torch.set_num_threads(1)
            try:
                answer.put(work(config_class, **options))
            except BaseException as error:
                answer.put(Outcome("died", f"{type(error).__name__}: {str(error)[:200]}"))

        process = context.Process(target=child)
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            yield name, Outcome("died", f"no answer in {seconds} seconds")
        elif answer.empty():
            yield name, Outcome("died", f"exit code {process.exitcode}")
        else:
            yield name, answer.get()


def table(outcomes):
    """The book's page of what became of all families."""
    import transformers

    kinds = [outcome.kind for outcome in outcomes.values()]
    lines = [
        "# Which models are served",
        "",
        f"Every causal language model family of transformers {transformers.__version__} was built as a tiny random model and",
        "given to the engine: several prompts in chunks, in one batch, with a shared prefix. *Served*: the tokens are those of",
        "`generate`. *Refused*: the engine says what the model needs and we do not do, before anything is computed.",
        "",
        f"{kinds.count('served')} served, {kinds.count('refused')} refused, {kinds.count('wrong')} wrong;",
        f"{kinds.count('not built')} could not be built this small, so nothing is known of them.",
        "",
        "| family | outcome | why |",
        "|---|---|---|",
    ]
    for name, outcome in sorted(outcomes.items(), key=lambda item: item[0].lower()):
        why = " ".join(outcome.why.replace("|", "/").split())
        lines.append(
            f"| `{name.removesuffix('Config')}` | {outcome.kind} | {why if outcome.kind == 'refused' else ''} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    known = causal_families()
    chosen = {name: known[name] for name in sys.argv[1:] if name != "--page"} or known
    found = {}
    for family, outcome in try_families(chosen):
        print(family, outcome.kind, outcome.why, flush=True)
        found[family] = outcome
    if "--page" in sys.argv:
        page = Path(__file__).parents[2] / "notebooks" / "book" / "families.md"
        page.write_text(table(found), encoding="utf-8")
