"""``optinfer export``: what it writes loads elsewhere, and what it cannot write leaves nothing behind."""

import stat
import subprocess
import sys

import pytest
import torch
import transformers

from optinfer import cli, load_model
from optinfer.folders import new_folder
from optinfer.quantization import OptinferConfig

IDS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def logits_and_folders(tmp_path_factory):
    """The default model in this package's own format, by scheme, and its logits."""
    made = {}
    for scheme in ("int4", "nf4"):
        model, tokenizer = load_model(dtype=torch.float32, device="cpu", quantization_config=OptinferConfig(scheme))
        folder = tmp_path_factory.mktemp(scheme) / "ours"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[scheme] = (model(IDS).logits, folder)
    return made


@pytest.mark.parametrize(
    "scheme, format, most",
    [("int4", "compressed-tensors", 1e-3), ("nf4", "bitsandbytes", 1e-3), ("nf4", "transformers", 1e-3)],
)
def test_an_export_loads_elsewhere(logits_and_folders, tmp_path, capsys, scheme, format, most):
    if format != "transformers":
        pytest.importorskip(format.replace("-", "_"))  # what transformers loads it with
    logits, folder = logits_and_folders[scheme]
    out = tmp_path / "a" / "out"
    assert cli.main(["export", str(folder), "--format", format, "--dtype", "float32", "--out", str(out)]) == 0
    assert f"written as {format}" in capsys.readouterr().out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    if format == "bitsandbytes":  # computes in bfloat16; the weights are what is compared
        loaded = loaded.dequantize()
    transformers.AutoTokenizer.from_pretrained(out)
    assert (loaded(IDS).logits - logits).abs().max() < most
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for file in out.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(out.stat().st_mode) & 0o666, file


def test_refused_before_anything_is_written(logits_and_folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", "default", "--out", str(out)]) == 1
    assert "default is not quantized" in capsys.readouterr().err
    assert cli.main(["export", str(logits_and_folders["nf4"][1]), "--format", "awq", "--out", str(out)]) == 1
    assert "try format='bitsandbytes'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    out.mkdir()
    assert cli.main(["export", "default", "--format", "transformers", "--out", str(out)]) == 1
    assert "exists: choose another folder" in capsys.readouterr().err
    assert not list(out.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "here"
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "half").write_text("a")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with new_folder(target) as folder:
        (folder / "file").write_text("first")
    with pytest.raises(FileExistsError, match="choose another folder"), new_folder(target):
        pass
    with pytest.raises(RuntimeError), new_folder(target, replace=True) as folder:
        raise RuntimeError
    assert (target / "file").read_text() == "first"
    with new_folder(target, replace=True) as folder:
        (folder / "other").write_text("second")
    assert [path.name for path in target.iterdir()] == ["other"]


def test_commands_that_need_no_torch_do_not_import_it():
    code = (
        "import sys; from optinfer import cli; cli.parser(['--help']).format_help(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
