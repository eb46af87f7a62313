"""Our folders, opened by transformers where nobody imported optinfer: refused, never read as weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optinfer.quantization import SCHEMES, quantize

VARIANTS = [(name, {}) for name in SCHEMES] + [("int8", {"symmetric": False}), ("fp8", {"group_size": "tensor"})]

OPEN_ALL = """
import json, sys
from transformers import AutoModelForCausalLM
assert "optinfer" not in sys.modules
outcome = {}
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        outcome[folder] = "loaded"
    except Exception as error:
        outcome[folder] = f"{type(error).__name__}: {error}"
print(json.dumps(outcome))
"""


def tiny() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64)).eval()


@pytest.mark.thorough
@pytest.mark.parametrize("square", [False, True], ids=["as they are", "with codes in the shape of weights"])
def test_no_scheme_is_taken_for_weights(tmp_path: Path, square: bool) -> None:
    """The second case is the older layout, and shows that the first can fail."""
    for i, (scheme, options) in enumerate(VARIANTS):
        quantize(tiny(), scheme, progress=False, **options).save_pretrained(tmp_path / f"{i}-{scheme}")
    folders = sorted(map(str, tmp_path.iterdir()))
    for folder in folders if square else ():
        file = Path(folder) / "model.safetensors"
        state = {k: v.squeeze(-1) if v.ndim == 3 else v for k, v in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    run = subprocess.run([sys.executable, "-c", OPEN_ALL, *folders], capture_output=True, text=True, cwd=tmp_path)
    outcome = json.loads(run.stdout.splitlines()[-1])
    loaded = [Path(folder).name for folder, how in outcome.items() if how == "loaded"]
    assert bool(loaded) == square, loaded


@pytest.mark.parametrize(("scheme", "options"), VARIANTS)
def test_older_folders_still_load(tmp_path: Path, scheme: str, options: dict) -> None:
    """Those with codes in the shape of weights, and `block_size` for the size of a group."""
    model = quantize(tiny(), scheme, progress=False, **options)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {k: v.squeeze(-1) if v.ndim == 3 else v for k, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    recorded = config["quantization_config"]
    recorded["block_size"] = recorded.pop("group_size")
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
