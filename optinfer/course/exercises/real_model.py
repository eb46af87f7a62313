"""The default model for exercises that end in generated text; loaded once a session."""

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@cache
def default_model(
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and its tokenizer, on the CPU; in float32 different orders of the same sum give the same tokens."""
    import torch

    from optinfer.models import load_model

    return load_model(dtype=getattr(torch, dtype), device="cpu")


@cache
def plain_text(prompt: str, new_tokens: int) -> str:
    """What the model says by itself, in float32."""
    return greedy(*default_model(), prompt, new_tokens)


def greedy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, new_tokens: int, **options: Any
) -> str:
    """The most likely continuation of a chat prompt."""
    import torch

    inputs = chat(tokenizer, prompt)
    with torch.inference_mode():
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            **options,
        )
    return tokenizer.decode(out[0, inputs.shape[1] :])


def chat(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> "Tensor":
    """A prompt as token ids ``[1, length]``, in the model's chat format."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, return_tensors="pt").input_ids
