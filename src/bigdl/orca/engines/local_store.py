"""Values of the local engine that are too large for a message, or are kept: files of its own.

Standard library only. They lie in a folder that only this user can read, which goes with the
engine however it ends; the system keeps them in memory while there is room.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import uuid
import weakref
from typing import Any

from bigdl._base.errors import ContextError
from bigdl.orca.engines.base import closed

__all__ = [
    "Parcel",
    "StoredRef",
    "discard",
    "load",
    "new_path",
    "pack",
    "remove",
    "save",
    "unpack",
]

#: Longer messages go through a file.
_INLINE_BYTES = 1 << 20


def new_path(folder: str) -> str:
    """Where a value may be saved; nobody else gets the same."""
    return os.path.join(folder, f"kept-{uuid.uuid4().hex}")


def save(data: bytes, path: str) -> None:
    """Write a pickled value to a new file."""
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileNotFoundError as exc:
        raise closed() from exc
    except BaseException:  # no space left, say
        remove(path)
        raise


def load(path: str) -> Any:
    """A new copy of the value in a file that ``save`` has written.

    Raises:
        ContextError: The file is gone, with its last ref or with the engine.
    """
    try:
        with open(path, "rb") as file:
            return pickle.load(file)
    except FileNotFoundError as exc:
        if os.path.exists(path):
            raise  # a user's own, from within the pickle
        raise ContextError(
            "A kept value is gone: the context that kept it was stopped, or the last ref to it "
            "was dropped. Keep the ref, and start a context by init_orca_context()."
        ) from exc


def pack(data: bytes, folder: str) -> bytes:
    """``data`` as a message: itself, or where it is."""
    if len(data) <= _INLINE_BYTES:
        return b"i" + data
    path = new_path(folder)
    save(data, path)
    return b"f" + os.fsencode(path)


def unpack(message: bytes, *, keep: bool = False) -> bytes:
    """What was packed. Its file, if it has one, is removed unless it is to be kept."""
    if message[:1] == b"i":
        return message[1:]
    path = os.fsdecode(message[1:])
    with open(path, "rb") as file:
        data = file.read()
    if not keep:
        remove(path)
    return data


def discard(message: bytes) -> None:
    """Remove the file of a message that nobody will unpack."""
    if message[:1] == b"f":
        remove(os.fsdecode(message[1:]))


def remove(path: str) -> None:
    with contextlib.suppress(OSError):  # with the whole folder, it may be
        os.unlink(path)


class Parcel:
    """Bytes for one worker or several; a file of theirs goes with this object."""

    def __init__(self, data: bytes, folder: str) -> None:
        self.message = pack(data, folder)
        if self.message[:1] == b"f":
            weakref.finalize(self, remove, os.fsdecode(self.message[1:]))

    @staticmethod
    def is_small(data: bytes) -> bool:
        """Whether no folder is needed."""
        return len(data) <= _INLINE_BYTES


class StoredRef:
    """A ``Ref`` as a worker holds it: the path of a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self) -> Any:
        return load(self._path)
