"""One decoding step of a model: how long it takes, and what it had to compute and to move."""

from typing import Any

from optinfer.hardware import best_seconds
from optinfer.memory import ModelShape


def decode_step(model: Any, batch: int, context: int = 64, repeats: int = 5) -> dict[str, Any]:
    """Time one token for each of ``batch`` sequences that already hold ``context`` tokens.

    Returns:
        ``label``, ``batch``, ``seconds``, and the least that any implementation must do: ``flops`` (2 per weight and
        sequence) and ``bytes`` (every weight once, every sequence's KV cache once).
    """
    import torch
    from transformers import DynamicCache

    shape = ModelShape.of(model.config)
    itemsize = model.dtype.itemsize
    prompt = torch.randint(0, shape.vocabulary, (batch, context), device=model.device)
    token = prompt[:, -1:]
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, logits_to_keep=1)

        def step() -> None:
            model(token, past_key_values=cache)

        seconds = best_seconds(step, model.device, repeats=repeats)
    kv_bytes = batch * context * shape.kv_bytes_per_token(8 * itemsize)
    return {
        "label": f"batch {batch}",
        "batch": batch,
        "seconds": seconds,
        "flops": 2.0 * shape.active_parameters * batch,
        "bytes": shape.active_parameters * itemsize + kv_bytes,
    }


def decode_steps(model: Any, batches: list[int], context: int = 64) -> list[dict[str, Any]]:
    """`decode_step` for several batch sizes, with a progress bar."""
    from tqdm.auto import tqdm

    return [decode_step(model, batch, context) for batch in tqdm(batches, desc="decoding", unit="batch", leave=False)]
