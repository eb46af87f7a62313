"""One decoding step of a model: how long it takes, and what it had to compute and to move."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from optinfer import hardware, noise
from optinfer.memory import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decode_step(model: "PreTrainedModel", batch: int, context: int = 64, repeats: int = 5) -> dict[str, Any]:
    """Time one token for each of ``batch`` sequences that already hold ``context`` tokens.

    Returns:
        ``label``, ``batch``, ``seconds`` with their ``timing`` (a `noise.Timing`), and the least that any implementation
        must do: ``flops`` (2 per weight and sequence) and ``bytes`` (every weight once, every sequence's KV cache once).
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

        kv_bytes = batch * context * shape.kv_bytes_per_token(8 * itemsize)
        flops = 2.0 * shape.active_parameters * batch
        moved = shape.active_parameters * itemsize + kv_bytes
        least = hardware.this_machine().least_seconds(flops, moved)
        timing = hardware.timing(step, model.device, repeats, least=least)
    return {
        "label": f"batch {batch}",
        "batch": batch,
        "seconds": timing.seconds,
        "timing": timing,
        "flops": flops,
        "bytes": moved,
    }


def decode_steps(model: "PreTrainedModel", batches: list[int], context: int = 64) -> list[dict[str, Any]]:
    """`decode_step` for several batch sizes, with a progress bar; says so where the machine was too busy."""
    from tqdm.auto import tqdm

    steps = [decode_step(model, batch, context) for batch in tqdm(batches, desc="decoding", unit="batch", leave=False)]
    if doubt := noise.doubts(step["timing"] for step in steps):
        print(doubt)
    return steps


def count_calls(model: "PreTrainedModel") -> "Counter[str]":
    """The torch operations of one forward pass over one token, by name; views, which move nothing, count too."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names[operation.overloadpacket.__name__] += 1
            return operation(*args, **(kwargs or {}))

    names: Counter[str] = Counter()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad(), Calls():
        model(token, use_cache=False)
    return names
