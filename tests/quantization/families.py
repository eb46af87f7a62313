"""Every model family of the installed transformers, quantized, saved and reloaded: right, or refused with a reason.

python -m tests.quantization.families [CONFIG ...]     # prints one line per family
python -m tests.quantization.families --page           # writes the book's page, notebooks/book/quantized_families.md
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from tests.serving.families import Outcome, tiny_model, try_families

KINDS = {
    "text": "AutoModelForCausalLM",
    "text to text": "AutoModelForSeq2SeqLM",
    "images and text": "AutoModelForImageTextToText",
    "classes": "AutoModelForSequenceClassification",
}


def families(kind):
    import transformers

    mapping = getattr(transformers, KINDS[kind])._model_mapping
    return {config.__name__: config for config in mapping}


def quantize_family(config_class, kind="text", scheme="int8", break_layer=False):
    """Quantize a tiny model; compare with its restored weights in ordinary layers; save, reload, compare again.

    `break_layer` damages the quantized model: it shows that the comparison can fail.
    """
    import transformers

    from optinfer.quantization import QuantizedLinear, quantize
    from optinfer.quantization.experts import QuantizedExperts, quantized_experts

    auto = getattr(transformers, KINDS[kind])
    try:
        model = tiny_model(config_class, auto=auto)
        inputs = _inputs(model)
        before = _logits(model, inputs)
        if _distance(_logits(_reloaded(model, auto), inputs), before) > 1e-5:
            return Outcome("not built", "the unquantized model is another one after reloading")
    except Exception as error:  # what a family needs to be built is not what is tested
        return Outcome("not built", f"{type(error).__name__}: {str(error)[:120]}")
    state = copy.deepcopy(model.state_dict())
    quantized = copy.deepcopy(model)
    try:
        quantize(quantized, scheme, progress=False)
    except ValueError as error:
        same = all(torch.equal(t, state[n]) for n, t in quantized.state_dict().items())
        return Outcome("refused" if same else "wrong", str(error) if same else f"changed though refused: {error}")
    layers = {name: m for name, m in quantized.named_modules() if isinstance(m, QuantizedLinear)}
    for name, layer in layers.items():
        own, restored = model.get_submodule(name), layer.quantized.dequantize()
        own.weight.data = restored if isinstance(own, nn.Linear) else restored.T.contiguous()
    for name, experts in quantized_experts(quantized):
        model.get_parameter(name).data = experts.dequantize()
    if break_layer:
        next(iter(layers.values())).weight.data.neg_()
    after = _logits(quantized, inputs)
    if (error := _distance(after, _logits(model, inputs))) > 1e-3:
        return Outcome(
            "wrong", f"{error:.2g} from the same weights in ordinary layers; {_distance(before, after):.2g} from before"
        )
    again = _reloaded(quantized, auto)
    kinds = [
        {
            n: type(m).__name__
            for n, m in x.named_modules()
            if isinstance(m, (nn.Linear, QuantizedLinear, QuantizedExperts))
        }
        for x in (quantized, again)
    ]
    if kinds[0] != kinds[1]:
        return Outcome("wrong", "other layers are quantized after reloading")
    if (error := _distance(_logits(again, inputs), after)) > 1e-5:
        return Outcome("wrong", f"{error:.2g} from before saving")
    return Outcome("served", f"{len(layers)} layers")


def _reloaded(model, auto):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return auto.from_pretrained(folder, dtype=torch.float32).eval()


def _inputs(model):
    ids = torch.tensor([[5, 6, 7, 8, 9, 11, 12, 2]])
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :5]
    return inputs


@torch.no_grad()
def _logits(model, inputs):
    out = model(**inputs)
    return (out.logits if hasattr(out, "logits") else out[0]).float()


def _distance(a, b):
    """NaN counts as far away."""
    return float(((a - b).norm() / b.norm().clamp_min(1e-30)).nan_to_num(9.9))


def page(outcomes):
    import transformers

    lines = [
        "# Which models are quantized",
        "",
        f"Every family of transformers {transformers.__version__} was built as a tiny random model, quantized to int8,",
        "compared with its own restored weights in ordinary layers, saved in our format, reloaded and compared again. *Right*:",
        "they agree to rounding. *Refused*: `quantize` says why, and the model is unchanged. Experts are counted with their",
        "layers: each matrix of a stack is quantized.",
        "",
    ]
    for kind, found in outcomes.items():
        counts = [sum(o.kind == one for o in found.values()) for one in ("served", "refused", "wrong", "not built")]
        lines += [
            f"## {KINDS[kind]}",
            "",
            "{} right, {} refused, {} wrong; {} could not be built this small.".format(*counts),
            "",
            "| family | outcome | why |",
            "|---|---|---|",
        ]
        for name, outcome in sorted(found.items(), key=lambda item: item[0].lower()):
            word = {"served": "right"}.get(outcome.kind, outcome.kind)
            why = " ".join(outcome.why.replace("|", "/").split()) if outcome.kind == "refused" else ""
            lines.append(f"| `{name.removesuffix('Config')}` | {word} | {why} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = [name for name in sys.argv[1:] if name != "--page"]
    outcomes = {}
    for kind in KINDS:
        known = families(kind)
        chosen = {name: known[name] for name in asked if name in known} if asked else known
        outcomes[kind] = {}
        for name, outcome in try_families(chosen, work=quantize_family, kind=kind):
            print(kind, name, outcome.kind, outcome.why, flush=True)
            outcomes[kind][name] = outcome
    if "--page" in sys.argv:
        target = Path(__file__).parents[2] / "notebooks" / "book" / "quantized_families.md"
        target.write_text(page(outcomes), encoding="utf-8")
