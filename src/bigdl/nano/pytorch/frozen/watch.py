"""Notices, in microseconds, that a module is no longer what it was. Knows torch."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch

from bigdl.nano.pytorch.frozen.feature_cache import find_hash

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["Watch"]

_version = attrgetter("_version")
_needs_grad = attrgetter("requires_grad")
_mode = itemgetter("training")
_address = torch.Tensor.data_ptr
_values = dict.values


class Watch:
    """The state of modules and their tensors at one moment, to compare with later ones.

    Whole lists are read and compared by C code: some 70 µs for a ResNet-50.

    Args:
        modules: Modules whose modes, hooks and parts count.
        values_of: Those among them whose parameters and buffers count too.
    """

    def __init__(self, modules: Iterable[nn.Module], values_of: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._attributes = [vars(module) for module in modules]
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._parts: list[dict[str, Any]] = [
            parts
            for module in modules
            for parts in (module._modules, module._parameters, module._buffers)
            if parts
        ]
        self._tensors = [t for m in values_of for t in _own_tensors(m)]
        self._parameters = [p for m in values_of for p in m._parameters.values() if p is not None]
        self._modes = self._read_modes()
        self._contents = self._read_contents()
        self.accept_values()

    def _read_modes(self) -> list[bool]:
        return list(map(_mode, self._attributes))

    def _read_contents(self) -> list[Any]:
        return list(chain.from_iterable(map(_values, self._parts)))

    def accept_values(self) -> None:
        """Take the present weights as the known ones."""
        self._versions = list(map(_version, self._tensors))
        self._addresses = list(map(_address, self._tensors))

    def same_form(self) -> bool:
        """Nothing trains that was frozen; modes, hooks and parts are as they were."""
        return (
            self._modes == self._read_modes()
            and not any(self._hooks)
            and True not in map(_needs_grad, self._parameters)
            and self._same_contents()
        )

    def _same_contents(self) -> bool:
        # by identity: tensors would compare themselves element by element
        now = self._read_contents()
        return len(now) == len(self._contents) and all(map(is_, now, self._contents))

    def same_values(self) -> bool:
        """No weight was written or replaced since they were last accepted."""
        return self._versions == list(map(_version, self._tensors)) and self._addresses == list(
            map(_address, self._tensors)
        )

    def fingerprint(self) -> bytes:
        """128 bits of what the weights are, whatever their memory layout."""
        digest = find_hash()
        with torch.no_grad():
            return digest(b"".join(digest(_bytes(tensor)) for tensor in self._tensors))


def _bytes(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().cpu().resolve_neg().resolve_conj().contiguous()
    if not plain.numel():
        return memoryview(b"")
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers.

    Counters too: batch norm writes its statistics unseen (no new version), and counts up.
    """
    values: list[Any] = [*module._parameters.values(), *module._buffers.values()]
    return [value for value in values if value is not None]
