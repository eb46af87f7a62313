"""Compare what came back with what was expected, and say where they differ, in a reader's words."""

from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """What differs: `kind` is ``type``, ``length``, ``shape``, ``dtype``, ``nan`` or ``value``."""

    kind: str
    text: str


def difference(
    expected: object, got: object, rtol: float, atol: float, where: str = "the result", dtypes: bool = True
) -> Difference | None:
    """The first difference in form (type, length, shape, dtype), or else in value, or None.

    A list may stand for a tuple, and a tensor of one number for a number. dtypes=False: only shapes and values count.
    """
    if isinstance(expected, Tensor) and expected.ndim == 0:
        expected = expected.item()  # a tensor without dimensions and a number mean the same
    if isinstance(expected, Tensor):
        return _tensors(expected, got, rtol, atol, where, dtypes)
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return Difference("type", f"{where} should be a dict, not {show(got)}")
        if expected.keys() != got.keys():
            return Difference("length", f"{where} has the keys {sorted(got, key=str)}, not {sorted(expected, key=str)}")
        return _first(
            difference(expected[k], got[k], rtol, atol, _inside(where, k, f"[{k!r}]"), dtypes) for k in expected
        )
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)):
            return Difference("type", f"{where} should be a {type(expected).__name__}, not {show(got)}")
        if len(expected) != len(got):
            return Difference("length", f"{where} has {len(got)} items, expected {len(expected)}")
        return _first(
            difference(e, g, rtol, atol, f"{where}[{i}]", dtypes) for i, (e, g) in enumerate(zip(expected, got))
        )
    if isinstance(expected, Number) and not isinstance(expected, bool):
        return _numbers(expected, got, rtol, atol, where)
    if type(got) is type(expected) and got == expected:
        return None
    return Difference("value", f"{where} is {show(got)}, expected {show(expected)}")


def _first(differences: Any) -> Difference | None:
    """The first that is about form, which explains the others, or else the first of all."""
    found = [d for d in differences if d is not None]
    return next((d for d in found if d.kind in ("type", "length", "shape", "dtype")), found[0] if found else None)


def _inside(where: str, key: Any, index: str) -> str:
    """A dict at the top has names that a reader knows: the text, the block table, …"""
    return f"`{key}`" if where == "the result" and isinstance(key, str) else where + index


def _numbers(expected: Any, got: Any, rtol: float, atol: float, where: str) -> Difference | None:
    if isinstance(got, (Tensor, np.ndarray, np.generic)) and np.prod(got.shape, dtype=int) == 1:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, Number):
        return Difference("type", f"{where} should be a number, not {show(got)}")
    if isinstance(expected, int):
        same = got == expected
    else:
        same = bool(np.isclose(np.asarray(got), expected, rtol=rtol, atol=atol, equal_nan=True))
    if same:
        return None
    kind = "nan" if got != got and expected == expected else "value"
    mine, wanted = _apart(got, expected) if isinstance(got, float) else (show(got), show(expected))
    return Difference(kind, f"{where} is {mine}, expected {wanted}")


def _apart(got: float, expected: float) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to tell them apart."""
    mine, wanted = _number(got), _number(expected)
    return (repr(got), repr(expected)) if mine == wanted else (mine, wanted)


def _tensors(expected: Tensor, got: Any, rtol: float, atol: float, where: str, dtypes: bool) -> Difference | None:
    if not isinstance(got, Tensor):
        return Difference("type", f"{where} should be a tensor, not {show(got)}")
    if expected.shape != got.shape:
        return Difference("shape", f"{where} has shape {list(got.shape)}, expected {list(expected.shape)}")
    if dtypes and expected.dtype != got.dtype:
        return Difference("dtype", f"{where} has dtype {_dtype(got)}, expected {_dtype(expected)}")
    a, b = expected.detach().double(), got.detach().double()
    bad = ~torch.isclose(b, a, rtol=rtol, atol=atol, equal_nan=True)
    if not expected.dtype.is_floating_point and not got.dtype.is_floating_point:
        bad = a != b
    count = int(bad.sum())
    if count == 0:
        return None
    lost = b.isnan() & ~a.isnan()
    index = tuple(torch.nonzero(lost if lost.any() else bad)[0].tolist())
    place = f"{where}{list(index) if index else ''}"
    share = f" ({count} of {bad.numel()} numbers differ)" if bad.numel() > 1 else ""
    got_one, expected_one = _apart(b[index].item(), a[index].item())
    text = f"{place} is {got_one}, expected {expected_one}{share}"
    return Difference("nan" if lost.any() else "value", text)


def show(value: object, width: int = 200) -> str:
    """A value on one line: tensors with dtype and shape, long ones cut."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)[:8].double().tolist()
        dots = ", …" if value.numel() > 8 else ""
        strided = "" if value.is_contiguous() else ", not contiguous"
        numbers = ", ".join(map(_number, flat)) + dots
        return f"{_dtype(value)} {list(value.shape)}{strided}: {numbers}"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values()):
        text = "; ".join(f"{key}: {show(item, 80)}" for key, item in value.items())
    elif isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        text = "(" + "; ".join(show(item, 80) for item in value) + ")"
    else:
        text = getattr(value, "__name__", "") if callable(value) else ""
        text = text or repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _number(value: float) -> str:
    return str(int(value)) if value == value and abs(value) < 1e15 and value == int(value) else f"{value:.6g}"
