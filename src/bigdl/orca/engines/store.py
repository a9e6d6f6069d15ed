"""Values of an engine that are too large for a message, or are kept: files of its own.

Standard library only. They lie on the caller's machine, in a folder that only this user can
read, which goes with the engine however it ends; the system keeps them in memory while there is
room. A worker on another machine reaches them by its line to the engine (``reached_by``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import uuid
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from bigdl._base import wire
from bigdl._base.errors import ContextError
from bigdl.orca.engines.base import closed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

__all__ = [
    "Parcel",
    "StoredRef",
    "discard",
    "load",
    "make_room",
    "new_path",
    "pack",
    "pieces",
    "reached_by",
    "receive",
    "remove",
    "said",
    "save",
    "unpack",
]

#: Longer messages go through a file.
_INLINE_BYTES = 1 << 20
_PIECE_BYTES = 4 << 20
# Frames to a far worker: a piece of a file, and its end, with words if it failed.
PIECE, DONE = 2, 3
#: And those of a worker that sees no files here, so that little less than a frame is not split.
_FRAME_BYTES = 1 << 28


class Far(Protocol):
    """The way to the engine's files from a machine that does not see them."""

    def fetch(self, path: str) -> bytes | bytearray:
        """A file's content."""

    def put(self, data: bytes, path: str) -> None:
        """Write a new file."""


_far: Far | None = None


@contextlib.contextmanager
def reached_by(far: Far) -> Iterator[None]:
    """Within the block, ``far`` is this process' way to the files."""
    global _far
    before, _far = _far, far
    try:
        yield
    finally:
        _far = before


def make_room(folder: str) -> None:
    """See that files can be written there."""
    if _far is None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)


def new_path(folder: str) -> str:
    """Where a value may be saved; nobody else gets the same."""
    return os.path.join(folder, f"kept-{uuid.uuid4().hex}")


def save(data: bytes, path: str) -> None:
    """Write a pickled value to a new file."""
    try:
        if _far is not None:
            _far.put(data, path)
            return
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
        if _far is not None:
            data = _far.fetch(path)
        else:
            with open(path, "rb") as file:
                return pickle.load(file)
    except FileNotFoundError as exc:
        if os.path.exists(path):
            raise  # a user's own, from within the pickle
        raise ContextError(
            "A kept value is gone: the context that kept it was stopped, or the last ref to it "
            "was dropped. Keep the ref, and start a context by init_orca_context()."
        ) from exc
    return pickle.loads(data)


def pack(data: bytes, folder: str) -> bytes:
    """``data`` as a message: itself, or where it is."""
    if len(data) <= _INLINE_BYTES or (_far is not None and len(data) < _FRAME_BYTES):
        return b"i" + data
    path = new_path(folder)
    save(data, path)
    return b"f" + os.fsencode(path)


def unpack(message: bytes, *, keep: bool = False) -> bytes:
    """What was packed. Its file, if it has one, is removed unless it is to be kept."""
    if message[:1] == b"i":
        return message[1:]
    path = os.fsdecode(message[1:])
    if _far is not None:
        return bytes(_far.fetch(path))
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


# --- the engine's side of a far worker's files ---


def pieces(path: str, folder: str) -> Iterator[bytes]:
    """The frames that bring a file to a far worker."""
    try:
        with open(_within(path, folder), "rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield wire.frame(PIECE, piece)
        yield wire.frame(DONE)
    except OSError as exc:
        yield wire.frame(DONE, said(exc))


def receive(path: str, folder: str) -> tuple[BinaryIO, str]:
    """A new file for what a far worker sends, and the path to give it when it is whole."""
    path = _within(path, folder)
    with contextlib.suppress(FileExistsError):
        os.mkdir(os.path.dirname(path), 0o700)
    return open(f"{path}.part", "xb"), path


def said(exc: OSError) -> bytes:
    """An error as a far worker reads it: number and words."""
    return f"{exc.errno or 0} {exc.strerror or exc}".encode()


def _within(path: str, folder: str) -> str:
    """``path``, if it is a file of the engine's: of its folder, or of a part of it."""
    found = os.path.normpath(path)
    if not folder or os.path.commonpath([found, folder]) != os.path.normpath(folder):
        raise PermissionError(errno.EACCES, f"{path} is no file of this engine's")
    return found


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
