"""Values on their way between a caller and its stage processes. Knows no framework.

A message is a head (kind, run, index, number of parts), the parts' lengths, and the parts: first
a pickle, then the large buffers of its arrays, which are neither copied into the pickle nor out
of it. Nobody but the two ends holds the socket that it travels over.
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import struct
import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigdl._base.workers import dumps, is_importable

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

__all__ = ["Inbox", "Message", "Parts", "gathered", "pack", "send", "unpack"]

HEAD = struct.Struct("!BQQI")
_LENGTH = struct.Struct("!Q")
#: Parts that one call of the system takes.
_AT_ONCE = 512

#: How objects of a framework take themselves apart, by the module that has to be loaded for one
#: to exist: a function (object) -> what ``reducer_override`` gives.
_REDUCERS = {"torch": "bigdl.nano.pytorch.inference.tensors:reduced"}

Parts = list[Any]


# --- values -----------------------------------------------------------------------------------


def pack(value: Any) -> Parts:
    """``value`` as parts of a message.

    Raises:
        TypeError, pickle.PicklingError: It cannot be sent.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    try:
        _Quick(file, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append).dump(value)
    except (_ByValueError, pickle.PicklingError, AttributeError, TypeError):
        return [dumps(value)]
    return [file.getbuffer(), *(buffer.raw() for buffer in buffers)]


def unpack(parts: Sequence[Any]) -> Any:
    """The value; its arrays lie in the parts' memory."""
    return pickle.loads(parts[0], buffers=parts[1:])


class _ByValueError(Exception):
    """Met code that the other end cannot import."""


class _Quick(pickle.Pickler):
    """Plain pickle, for what needs no code to travel; gives up as soon as something does."""

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, (type, types.FunctionType)):
            if "<" in item.__qualname__ or not _can_be_had(item.__module__.partition(".")[0]):
                raise _ByValueError
            return NotImplemented
        if isinstance(item, types.ModuleType):
            raise _ByValueError
        reduced = _reducers.get(type(item).__module__.partition(".")[0])
        if reduced is None:
            reduced = _reducer(type(item))
        return NotImplemented if reduced is None else reduced(item)


_reducers: dict[str, Any] = {}


def _reducer(kind: type) -> Any:
    top = kind.__module__.partition(".")[0]
    home = _REDUCERS.get(top)
    if home is None or top not in sys.modules:
        return None
    module, _, name = home.partition(":")
    return _reducers.setdefault(top, getattr(importlib.import_module(module), name))


@functools.cache
def _can_be_had(top: str) -> bool:
    """Whether the other end can import a module by its name, too."""
    return top not in ("__main__", "__mp_main__") and is_importable(top)


# --- messages ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """One value under way.

    Args:
        kind: A word of the two ends'.
        run: Which call it belongs to.
        index: Which input it came from.
        parts: The value, packed.
    """

    kind: int
    run: int
    index: int
    parts: Parts


def gathered(message: Message) -> list[memoryview]:
    """A message as pieces of memory to send, in order."""
    views = [memoryview(part).cast("B") for part in message.parts]
    head = HEAD.pack(message.kind, message.run, message.index, len(views))
    lengths = b"".join(_LENGTH.pack(view.nbytes) for view in views)
    return [memoryview(head + lengths), *(view for view in views if view.nbytes)]


def send(sock: socket.socket, pieces: list[memoryview]) -> None:
    """Send what ``pieces`` hold, as far as the socket takes it; they keep the rest.

    Raises:
        BlockingIOError: A socket that does not wait takes no more.
        OSError: The other end is gone.
    """
    while pieces:
        sent = sock.sendmsg(pieces[:_AT_ONCE])
        done = 0
        while done < len(pieces) and sent >= pieces[done].nbytes:
            sent -= pieces[done].nbytes
            done += 1
        del pieces[:done]
        if sent:
            pieces[0] = pieces[0][sent:]


class Inbox:
    """Puts messages together from what a socket has received."""

    def __init__(self) -> None:
        self._head: tuple[int, int, int, int] | None = None
        self._parts: Parts | None = None
        self._begin(HEAD.size)

    def _begin(self, size: int) -> None:
        self._memory = bytearray(size)
        self._left = memoryview(self._memory)

    def receive(self, sock: socket.socket) -> Message | None:
        """The next whole message; None if there is none yet, and the socket does not wait.

        Raises:
            EOFError: The other end is gone.
        """
        while True:
            while self._left:
                try:
                    count = sock.recv_into(self._left)
                except BlockingIOError:
                    return None
                except ConnectionError:
                    count = 0
                if count == 0:
                    raise EOFError("the line has ended")
                self._left = self._left[count:]
            message = self._next()
            if message is not None:
                return message

    def _next(self) -> Message | None:
        """Take the piece that is whole, and begin the next."""
        if self._head is None:
            self._head = HEAD.unpack(self._memory)
            self._begin(self._head[3] * _LENGTH.size)
            return None
        if self._parts is None:
            self._parts = []
            self._sizes = [size for (size,) in _LENGTH.iter_unpack(self._memory)]
        else:
            self._parts.append(self._memory)
        if len(self._parts) < len(self._sizes):
            self._begin(self._sizes[len(self._parts)])
            return None
        kind, run, index, _ = self._head
        message = Message(kind, run, index, self._parts)
        self._head = self._parts = None
        self._begin(HEAD.size)
        return message
