"""Notices what the owner of a model does to it while an engine runs: weights that move, change, or are replaced."""

from typing import Any

from torch import Tensor, nn


class Watch:
    """What a model's modules and parameters were when it began to look.

    Looking takes some tens of microseconds: it walks over remembered dictionaries, not over modules.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        homes: list[dict[str, Any]] = [home for m in modules for home in (m._parameters, m._buffers)]
        self._slots = [(home, name) for home in homes for name in home]
        self._places = self._find_places()
        self._versions = self._find_versions()

    def same_places(self) -> bool:
        """Whether all modules are the same objects, and all tensors lie where they lay."""
        return all(d.get(name) is child for d, name, child in self._children) and self._places == self._find_places()

    def same_values(self) -> bool:
        """Whether moreover nothing was written to them. (A write through `.data` leaves no trace in torch.)"""
        return self.same_places() and self._versions == self._find_versions()

    def _find_places(self) -> list[int]:
        return [0 if (tensor := d.get(name)) is None else tensor.data_ptr() for d, name in self._slots]

    def _find_versions(self) -> list[int]:
        return [_version(d.get(name)) for d, name in self._slots]


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was written to; inference tensors do not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
