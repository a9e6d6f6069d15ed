"""An object with tensors in it, sent to other processes of this machine with one copy of them.

Its plain tensors lie in a memory file, which has no name: nothing of it can be left behind. Each
process maps it; a page that a process writes to becomes its own. All else is pickled.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bigdl._base.nursery import take_over
from bigdl._base.workers import dumps

__all__ = ["SharedModel", "SharedObject"]

_ALIGNED = 64


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies, in elements of its type."""

    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_parameter: bool


class SharedModel:
    """The memory file, and what else a process needs to have the object.

    Args:
        value: Any object; it is not touched, and later changes of it are not seen.

    Raises:
        TypeError, pickle.PicklingError: It cannot be sent.
    """

    def __init__(self, value: Any) -> None:
        self.fd = _memory_file()
        self.close = weakref.finalize(self, os.close, self.fd)
        writer = _Writer(self.fd)
        try:
            content = dumps(value, outside=writer.place)
        except BaseException:
            self.close()
            raise
        self.size = writer.size
        #: To be called by a process that has been handed ``fd`` over; gives the object.
        self.opened = SharedObject(content, tuple(writer.places), writer.size)


class SharedObject:
    """How a process opens what a ``SharedModel`` holds; called once, in that process.

    Args:
        content: The object, pickled without its tensors.
        places: Those tensors.
        size: The memory file's, in bytes.
    """

    def __init__(self, content: bytes, places: tuple[_Place, ...], size: int) -> None:
        self._content, self._places, self._size = content, places, size

    def __call__(self) -> Any:
        fd = take_over()
        try:
            memory = mmap.mmap(fd, self._size, flags=mmap.MAP_PRIVATE)
        finally:
            os.close(fd)
        return _Reader(self._content, self._places, memory).load()


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("bigdl-model")
    with tempfile.TemporaryFile(prefix="bigdl-") as file:
        return os.dup(file.fileno())


class _Writer:
    """Puts the memory of tensors into a file, each piece once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = _ALIGNED  # a file without a byte cannot be mapped
        os.ftruncate(fd, self.size)
        self.places: list[_Place] = []
        self._known: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._held: list[Any] = []  # so that no other tensor gets an address of one seen

    def place(self, item: Any) -> int | None:
        """The number of a tensor that lies in the file; None for all that is not one."""
        if type(item) not in (torch.Tensor, nn.Parameter) or not _is_plain(item):
            return None
        if id(item) not in self._known:
            start = self._start(item.untyped_storage()) // item.element_size()
            self._known[id(item)] = len(self.places)
            self._held.append(item)
            self.places.append(
                _Place(
                    item.dtype,
                    start + item.storage_offset(),
                    tuple(item.shape),
                    item.stride(),
                    isinstance(item, nn.Parameter),
                )
            )
        return self._known[id(item)]

    def _start(self, storage: Any) -> int:
        """Where a storage begins in the file, in bytes."""
        address = storage.data_ptr()
        if address not in self._starts:
            self._held.append(storage)
            self._starts[address] = start = self.size
            memory: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            view, at = memoryview(memory), start
            while view:  # the system takes 2 GB at once
                written = os.pwrite(self._fd, view, at)
                view, at = view[written:], at + written
            self.size = -(-at // _ALIGNED) * _ALIGNED
            os.ftruncate(self._fd, self.size)
        return self._starts[address]


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.numel() > 0
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not vars(tensor)  # attributes of the user's
    )


class _Reader(pickle.Unpickler):
    """Puts the tensors back to their places."""

    def __init__(self, content: bytes, places: tuple[_Place, ...], memory: mmap.mmap) -> None:
        super().__init__(io.BytesIO(content))
        self._places = places
        self._storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, number: Any) -> torch.Tensor:
        if number not in self._made:
            place = self._places[number]
            tensor = torch.empty(0, dtype=place.dtype)
            tensor.set_(self._storage, place.offset, place.shape, place.stride)
            if place.is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=False)
            self._made[number] = tensor
        return self._made[number]
