"""The table of instructions: for each name, a function that turns one instruction into an action.

    @instruction("shl", "shr", operands=3)
    def shift(m, i): ...            # m: the Machine, with its registers; i: the Instruction
        return lambda mask: ...     # what happens for the threads in `mask`, all at once

`mask` is True for all threads of the block, or an array of booleans. The longest dotted name wins: `cp.async.bulk` before
`cp.async`. An instruction, a modifier or a number of operands that nobody declared is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import PACKED, TYPES
from .ptx import Instruction

if TYPE_CHECKING:
    from .machine import Machine

Mask = np.ndarray | bool  # True, or booleans [threads]: what NumPy takes for `where`
Action = Callable[[Mask], Any]


class Unsupported(NotImplementedError):
    """An instruction, or a form of one, that the emulator does not know."""


_table: dict[str, tuple[Callable, tuple[int, ...], frozenset[str]]] = {}
_types = {*TYPES, *PACKED, "tf32", "b128"}


def instruction(*names: str, operands: int | tuple[int, ...], modifiers: str = "") -> Callable:
    """Register a function for instructions of these names, with so many operands, and these modifiers besides types."""

    def register(function: Callable) -> Callable:
        counts = (operands,) if isinstance(operands, int) else operands
        _table.update(dict.fromkeys(names, (function, counts, frozenset(modifiers.split()))))
        return function

    return register


def compile_instruction(m: Machine, i: Instruction) -> Action | None:
    """The action of one instruction, its guard included; None if it has no effect here."""
    name = next((n for k in range(len(i.parts), 0, -1) if (n := ".".join(i.parts[:k])) in _table), None)
    if name is None:
        raise Unsupported(f"{i.where}: the emulator does not know this instruction")
    function, counts, modifiers = _table[name]
    rest = set(i.op.removeprefix(name).strip(".").split(".")) - {""} - _types - modifiers
    if rest:
        raise Unsupported(f"{i.where}: the emulator does not know .{', .'.join(sorted(rest))} of {name}")
    if len(i.operands) not in counts:
        raise Unsupported(f"{i.where}: the emulator does not know {name} with {len(i.operands)} operands")
    try:
        action = function(m, i)
    except (Unsupported, KeyError, AttributeError, IndexError, StopIteration, TypeError) as error:
        raise Unsupported(f"{i.where}: {error!r}") from error
    return action if action is None or i.guard is None else _guarded(action, m.registers[i.guard.name], i.negated)


def _guarded(action: Action, predicate: np.ndarray, negated: bool) -> Action:
    def run(mask: Mask) -> None:
        chosen = (predicate != negated) & mask
        if chosen.any():
            action(True if chosen.all() else chosen)

    return run


def last_type(i: Instruction) -> str:
    """The type that stands last in the instruction's name, and says what it computes in."""
    return next(part for part in reversed(i.parts) if part in _types)
