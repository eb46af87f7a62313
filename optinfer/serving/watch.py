"""Notices what the owner of a model does to it while an engine runs: weights that move or change, modules that are replaced."""

import copy
import itertools
import operator
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_LOOKS_ON = "transformers.utils.output_capturing"  # once asked for hidden states, a model keeps these hooks; they change nothing
_SWITCHES = ("_active_adapter", "_disable_adapters", "scaling")  # of PEFT's layers: they change results, not weights
_POINTER, _VERSION = operator.methodcaller("data_ptr"), operator.attrgetter("_version")


class Watch:
    """What a model's modules and weights were when it began to look.

    Weights are what `state_dict` holds: parameters and persistent buffers. It looks before every step, so it must be
    quick: it walks over remembered dictionaries, not over modules, in loops that Python runs in C.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._children = [m._modules for m in modules]
        self._first_children = [dict(m._modules) for m in modules]
        self._hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._hook_ids, self._num_hooks = self._list_hooks(), self._count_hooks()
        self._switches = [(vars(m), name) for m in modules for name in _SWITCHES if name in vars(m)]
        self._settings = self._read_switches()
        slots: list[tuple[dict[str, Any], str]] = [(m._parameters, name) for m in modules for name in m._parameters]
        slots += [(m._buffers, n) for m in modules for n in m._buffers if n not in m._non_persistent_buffers_set]
        self._slots = [(home, name) for home, name in slots if home[name] is not None]
        self._weights = self._look()

    def same_modules(self) -> bool:
        """Whether all modules are the same objects, with as many hooks and the same adapters switched on."""
        return (
            all(map(operator.eq, self._children, self._first_children))
            and (self._hook_ids == self._list_hooks() or self._num_hooks == self._count_hooks())
            and self._settings == self._read_switches()
        )

    def same_weights(self) -> bool:
        """Whether all weights lie where they lay and nothing was written to them.

        (A write through `.data` leaves no trace in torch.)
        """
        return self._weights == self._look()

    def _look(self) -> list[Any]:
        """Where the weights lie, and how often each was written to."""
        try:
            tensors = [home[name] for home, name in self._slots]
            return [*map(_POINTER, tensors), *map(_VERSION, tensors)]
        except (KeyError, AttributeError, RuntimeError):  # one is gone, or an inference tensor, which does not count
            return [_state(home.get(name)) for home, name in self._slots]

    def _list_hooks(self) -> list[int]:
        return list(itertools.chain.from_iterable(self._hooks))  # torch gives every hook a number of its own

    def _count_hooks(self) -> int:
        return sum(map(num_hooks, self._hooks))

    def _read_switches(self) -> list[str]:
        return [repr(home.get(name)) for home, name in self._switches]


def without_lookers(model: nn.Module) -> nn.Module:
    """The same weights in a model without hooks that only look (they cannot be sent to another process)."""
    twins: dict[nn.Module, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if module not in twins:
            twins[module] = same = copy.copy(module)
            same._forward_hooks = OrderedDict((k, h) for k, h in module._forward_hooks.items() if not _only_looks(h))
            same._modules = {name: child if child is None else twin(child) for name, child in module._modules.items()}
            vars(same).pop("_output_capturing_hooks_installed", None)
        return twins[module]

    return twin(model)


def num_hooks(hooks: Mapping[int, object]) -> int:
    """How many of a module's hooks may change what it computes."""
    return sum(not _only_looks(hook) for hook in hooks.values())


def _only_looks(hook: object) -> bool:
    return getattr(hook, "__module__", None) == _LOOKS_ON


def _state(tensor: Tensor | None) -> tuple[int, int]:
    """Where a tensor lies, and how often it was written to; inference tensors do not count."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
