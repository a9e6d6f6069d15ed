"""Moves bytes over many links at once, while it listens to the fate of the gang.

Standard library and NumPy only.
"""

from __future__ import annotations

import select
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.collective.links import lost, too_late
from bigdl._base.errors import ConfigError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from bigdl._base.gang import Gang

__all__ = ["CARD_BYTES", "Stream", "Streams"]

#: Bytes read or written at a time, so that all links get their turn.
_MOUTHFUL = 1 << 20
#: Seconds of looking for news before it sleeps in the kernel.
_LOOK_S = 5e-5
#: A sleeper looks so often whether its time is up.
_NAP_MS = 200

# What each rank says first in every call: call, dtype, compressed, bytes an element, elements,
# root.
_CARD = struct.Struct("!BBHIQq")
CARD_BYTES = _CARD.size
_CALLS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier", "buffer")


class Stream:
    """What one link has to send and to receive in this call, in order."""

    def __init__(self, rank: int, link: socket.socket) -> None:
        self.rank = rank
        self.link = link
        self.out: deque[memoryview] = deque()
        self.into: deque[memoryview] = deque()
        self.received = 0

    def will_send(self, array: NDArray[Any]) -> None:
        """Send the memory of ``array``, as it is when its turn comes."""
        if array.size:
            self.out.append(array.view(np.uint8).data)

    def will_receive(self, array: NDArray[Any]) -> None:
        """Fill ``array``."""
        if array.size:
            self.into.append(array.view(np.uint8).data)

    def send(self) -> bool:
        """Send what the link takes; whether it took any."""
        moved = False
        while self.out:
            head = self.out[0]
            try:
                sent = self.link.send(head[:_MOUTHFUL])
            except BlockingIOError:
                break
            moved = True
            if sent == len(head):
                self.out.popleft()
            else:
                self.out[0] = head[sent:]
        return moved

    def receive(self) -> bool:
        """Take what is there; whether there was any.

        Raises:
            EOFError: The link has ended.
        """
        moved = False
        while self.into:
            head = self.into[0]
            try:
                received = self.link.recv_into(head[:_MOUTHFUL])
            except BlockingIOError:
                break
            if received == 0:
                raise EOFError
            moved = True
            self.received += received
            if received == len(head):
                self.into.popleft()
            else:
                self.into[0] = head[received:]
        return moved


class Streams:
    """The links of one worker to all others of its group.

    Args:
        gang: For the others' fate.
        links: By index in the group: (rank in the gang, connected socket).
        timeout_s: How long to wait for workers that live but do not come.
    """

    def __init__(
        self,
        gang: Gang,
        links: Mapping[int, tuple[int, socket.socket]],
        timeout_s: float | None,
    ) -> None:
        self._gang = gang
        self._timeout_s = timeout_s
        self.of = {index: Stream(rank, link) for index, (rank, link) in links.items()}
        self._card = b""
        self._cards: dict[int, bytearray] = {}

    def close(self) -> None:
        for stream in self.of.values():
            stream.link.close()
        self.of = {}

    def begin(
        self,
        call: str,
        flat: NDArray[Any] | None,
        *,
        is_compressed: bool = False,
        root: int = -1,
    ) -> None:
        """Put everybody's card before everything else in both directions of every link."""
        kind, size, n = (
            (0, 0, 0) if flat is None else (ord(flat.dtype.char), flat.itemsize, flat.size)
        )
        self._card = _CARD.pack(_CALLS.index(call), kind, is_compressed, size, n, root)
        self._cards = {}
        for index, stream in self.of.items():
            stream.received = 0
            stream.out.append(memoryview(self._card))
            self._cards[index] = bytearray(CARD_BYTES)
            stream.into.append(memoryview(self._cards[index]))

    @property
    def received(self) -> int:
        """Bytes that have come from every one since ``begin``, cards included."""
        return min((stream.received for stream in self.of.values()), default=0)

    def run(self, doing: str, advance: Callable[[], bool] | None = None) -> None:
        """Move bytes until all are sent, all are here, and ``advance`` has no more to do.

        Raises:
            ConfigError: Another worker is in another call, or has another array.
            WorkerError: Another worker failed (or ``WorkerLostError``: is gone).
            TimeLimitError: Another worker did not come in time.
        """
        unchecked = dict(self.of)
        started = looked = time.monotonic()
        poll = select.poll()
        poll.register(self._gang, select.POLLIN)
        while True:
            moved = self._move()
            for index, stream in list(unchecked.items()):
                if stream.received >= CARD_BYTES:
                    self._check_card(stream.rank, self._cards[index])
                    del unchecked[index]
            # nothing is worked on before it is known that all mean the same
            is_done = not unchecked and (advance is None or advance())
            busy = [stream for stream in self.of.values() if stream.out or stream.into]
            if is_done and not busy:
                return
            now = time.monotonic()
            if moved:
                looked = now
            elif now - looked > _LOOK_S:
                self._sleep(poll, busy, started, doing)

    def _move(self) -> bool:
        """One turn for each link; whether anything moved."""
        moved = False
        for stream in self.of.values():
            if stream.out or stream.into:
                try:
                    moved = stream.send() | stream.receive() | moved
                except (ConnectionError, TimeoutError, EOFError):
                    lost(self._gang, stream.rank)
        return moved

    def _sleep(
        self, poll: select.poll, busy: Sequence[Stream], started: float, doing: str
    ) -> None:
        for stream in busy:
            wanted = (select.POLLIN if stream.into else 0) | (select.POLLOUT if stream.out else 0)
            poll.register(stream.link, wanted)
        ready = poll.poll(_NAP_MS)
        for stream in busy:
            poll.unregister(stream.link)
        if any(fd == self._gang.fileno() for fd, _ in ready):
            self._gang.check()
        if self._timeout_s is not None and time.monotonic() - started > self._timeout_s:
            late = [stream.rank for stream in busy]
            raise too_late(self._gang, doing, late, self._timeout_s)

    def _check_card(self, rank: int, card: bytearray) -> None:
        if card != self._card:
            raise ConfigError(
                "Workers do not do the same: "
                f"worker {self._gang.rank} does {_said(self._card)}, "
                f"worker {rank} {_said(card)}."
            )


def _said(card: bytes | bytearray) -> str:
    """A card in words."""
    call, kind, is_compressed, itemsize, n, root = _CARD.unpack(card)
    name = _CALLS[call] if call < len(_CALLS) else f"call {call}"
    if kind == 0:
        return f"{name}({root} bytes)" if name == "buffer" else name
    text = f"{name} of {n} elements of {chr(kind)!r} ({itemsize} bytes each)"
    return text + (" as bf16" if is_compressed else "") + (f" from {root}" if root >= 0 else "")
