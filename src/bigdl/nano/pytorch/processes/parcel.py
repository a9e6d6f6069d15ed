"""Objects on their way between processes, as files that only these processes read.

Tensors lie in a file of their own, which every reader maps: a data set in memory is there once,
however many workers read it. Objects that both sides have travel as their names.
"""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.workers import dumps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Parcel", "pack", "unpack"]

_OBJECTS, _TENSORS = "objects", "tensors"


class Parcel:
    """What a file of tensors held: for telling those that somebody has written to since."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._numbers = {id(one): number for number, one in enumerate(tensors)}
        self.tensors = tensors  # alive, so that the ids stay theirs

    def number(self, tensor: torch.Tensor) -> int | None:
        """Its number, if it came with the parcel and nobody has written to it."""
        number = self._numbers.get(id(tensor))
        return number if number is not None and tensor._version == 0 else None


def pack(
    value: Any, folder: Path, *, known: Callable[[Any], Any] | None = None
) -> list[torch.Tensor]:
    """Write ``value`` into ``folder``, which is made.

    Args:
        value: Whatever cloudpickle can send.
        folder: A new one.
        known: Gives the name of an object that the reader has, else None.

    Returns:
        The tensors, as they are numbered.
    """
    tensors: list[torch.Tensor] = []
    numbers: dict[int, int] = {}

    def outside(item: Any) -> Any:
        name = None if known is None else known(item)
        if name is not None:
            return "known", name
        if type(item) is not torch.Tensor or not _is_plain(item):
            return None
        if id(item) not in numbers:
            numbers[id(item)] = len(tensors)
            tensors.append(item)
        return "tensor", numbers[id(item)]

    content = dumps(value, outside=outside)
    folder.mkdir()
    (folder / _OBJECTS).write_bytes(content)
    torch.save([_compact(one) for one in tensors], folder / _TENSORS)
    return tensors


def unpack(folder: Path, *, named: Callable[[Any], Any] | None = None) -> tuple[Any, Parcel]:
    """What ``pack`` wrote; ``named`` gives the object of a name."""
    tensors = torch.load(folder / _TENSORS, weights_only=True, mmap=True)

    class Reader(pickle.Unpickler):
        def persistent_load(self, name: Any) -> Any:
            kind, which = name
            if kind == "tensor":
                return tensors[which]
            assert named is not None
            return named(which)

    value = Reader(io.BytesIO((folder / _OBJECTS).read_bytes())).load()
    return value, Parcel(tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_neg()
        and not tensor.is_conj()
        and tensor.is_leaf
        and not vars(tensor)
    )


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Without the rest of a larger memory that it is a small view of."""
    if tensor.numel() * tensor.element_size() * 2 < tensor.untyped_storage().nbytes():
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return tensor
