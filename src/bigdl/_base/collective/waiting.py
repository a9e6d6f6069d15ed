"""How workers on one host wait for each other: quickly if it is soon, without a core if not.

Standard library only. A *meeting* returns when every worker of the host has come to it, and
what each wrote to shared memory before is then visible to all. Two ways:

- ``FlagMeeting``: each worker counts its meetings in a word of shared memory. Who waits looks at
  the others' words for a moment, if that has paid lately, then sleeps in the kernel until it is
  woken. Looking and counting are plain loads and stores, which is only enough where the
  processor keeps the order of stores (x86).
- ``MessageMeeting``: a byte to the first worker and one back. Slower, and right everywhere.
"""

from __future__ import annotations

import ctypes
import platform
import select
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol

from bigdl._base.collective.links import lost, too_late
from bigdl._base.errors import TimeLimitError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from bigdl._base.gang import Gang

__all__ = ["FlagMeeting", "Meeting", "MessageMeeting", "has_flags", "table_bytes"]

_LINE = 128  # bytes between two workers' words: processors fetch lines of 64 in pairs
_WORD = 4
_MASK = 0xFFFFFFFF
_HALF = 0x80000000

_FUTEX_NUMBER = {"x86_64": 202}  # of the system call
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_ALL = 0x7FFFFFFF

#: Looks at a word before sleeping (a look takes 0.1 µs; to be woken takes some 50 µs).
_LOOKS = 400
#: Looks that come to nothing cost others the core, so after such there are fewer, and every so
#: many waits it is tried whether they pay again.
_FEWER = 4
_TRY_AGAIN = 32
#: A sleeper wakes so often, to hear whether the others still live.
_NAP_S = 0.05


class Meeting(Protocol):
    """Where the workers of one host come together."""

    def meet(self, doing: str) -> None:
        """Return when all have come; ``doing`` is for the text of errors.

        Raises:
            WorkerError: Another worker failed (or ``WorkerLostError``: is gone).
            TimeLimitError: Another worker did not come in time.
        """
        ...

    def close(self) -> None: ...


def has_flags() -> bool:
    """Whether this machine can use ``FlagMeeting``."""
    return (
        sys.platform == "linux"
        and platform.machine() in _FUTEX_NUMBER
        and ctypes.sizeof(ctypes.c_void_p) == 8
    )


def table_bytes(world: int) -> int:
    """Size of the shared memory that ``FlagMeeting`` needs: a word, and a bed, per worker."""
    return world * (_LINE + _beds(world))


def _beds(world: int) -> int:
    return -(-world // _LINE) * _LINE


class FlagMeeting:
    """A meeting by words of shared memory.

    Args:
        gang: For the others' fate.
        group: The gang's ranks that meet.
        table: ``table_bytes`` of shared memory, zero when the first begins.
        timeout_s: How long to wait for workers that live.
        is_crowded: There are more workers than cores: then looking only keeps others from coming.
    """

    def __init__(
        self,
        gang: Gang,
        group: tuple[int, ...],
        table: memoryview,
        *,
        timeout_s: float | None,
        is_crowded: bool,
    ) -> None:
        self._gang = gang
        self._group = group
        self._timeout_s = timeout_s
        self._most_looks = 0 if is_crowded else _LOOKS
        self._looks = self._most_looks
        self._waits = 0
        me, world = group.index(gang.rank), len(group)
        self._me = me
        self._words = table.cast("I")
        self._mine = me * _LINE // _WORD
        self._others = [(peer, peer * _LINE // _WORD) for peer in range(world) if peer != me]
        # a bed in each other's row: 1 while its owner sleeps until that other comes
        first, row = world * _LINE, _beds(world)
        self._beds = table
        self._bed = {peer: first + peer * row + me for peer in range(world)}
        self._row = table[first + me * row : first + me * row + world]
        self._empty = bytes(world)
        self._turn = 0
        self._fence = threading.Lock()
        self._anchor = ctypes.c_char.from_buffer(table)
        self._base = ctypes.addressof(self._anchor)
        # waking is quick and keeps the interpreter; waiting lets other threads have it
        self._wake, self._sleep = _futex(ctypes.PyDLL(None)), _futex(ctypes.CDLL(None))

    def meet(self, doing: str) -> None:
        words = self._words
        self._turn = turn = (self._turn + 1) & _MASK
        words[self._mine] = turn
        # A locked instruction: the word is out before the beds are looked at. A sleeper makes
        # its bed before the kernel looks at the word; so one of the two sees the other.
        self._fence.acquire()
        self._fence.release()
        if self._row != self._empty:
            self._wake(self._base + self._mine * _WORD, _FUTEX_WAKE, _ALL, None)
        for peer, word in self._others:
            if (words[word] - turn) & _MASK >= _HALF:
                self._await(peer, word, turn, doing)

    def _await(self, peer: int, word: int, turn: int, doing: str) -> None:
        words = self._words
        self._waits += 1
        looks = self._looks if self._waits % _TRY_AGAIN else self._most_looks
        for _ in range(looks):
            if (words[word] - turn) & _MASK < _HALF:
                self._looks = self._most_looks
                return
        self._looks = looks // _FEWER
        bed = self._bed[peer]
        self._beds[bed] = 1
        try:
            self._await_asleep(peer, word, turn, doing)
        finally:
            self._beds[bed] = 0

    def _await_asleep(self, peer: int, word: int, turn: int, doing: str) -> None:
        words = self._words
        nap = _Timespec(0, int(_NAP_S * 1e9))
        started = time.monotonic()
        while True:
            seen = words[word]
            if (seen - turn) & _MASK < _HALF:
                return
            self._sleep(self._base + word * _WORD, _FUTEX_WAIT, seen, ctypes.byref(nap))
            if (words[word] - turn) & _MASK < _HALF:
                return
            self._gang.check()
            if self._group[peer] in self._gang.left:
                if (words[word] - turn) & _MASK < _HALF:  # it came, and then it left
                    return
                lost(self._gang, self._group[peer])
            if self._timeout_s is not None and time.monotonic() - started > self._timeout_s:
                raise self._late(turn, doing)

    def _late(self, turn: int, doing: str) -> TimeLimitError:
        late = [
            self._group[peer]
            for peer, word in self._others
            if (self._words[word] - turn) & _MASK >= _HALF
        ]
        return too_late(self._gang, doing, late, self._timeout_s)

    def close(self) -> None:
        del self._anchor
        self._words.release()
        self._row.release()
        self._beds.release()


class MessageMeeting:
    """A meeting by bytes through sockets.

    Args:
        gang: For the others' fate.
        group: The gang's ranks that meet.
        links: To each other worker from the first, and to the first from each other.
        timeout_s: How long to wait for workers that live.
    """

    def __init__(
        self,
        gang: Gang,
        group: tuple[int, ...],
        links: Mapping[int, socket.socket],
        *,
        timeout_s: float | None,
    ) -> None:
        self._gang = gang
        self._links = dict(sorted(links.items()))
        self._timeout_s = timeout_s
        self._is_first = gang.rank == group[0]

    def meet(self, doing: str) -> None:
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        if not self._is_first:
            self._say()
        self._hear(deadline, doing)
        if self._is_first:
            self._say()

    def _say(self) -> None:
        for rank, link in self._links.items():
            try:
                link.send(b"!")
            except OSError:
                lost(self._gang, rank)

    def _hear(self, deadline: float | None, doing: str) -> None:
        for rank, link in self._links.items():
            try:
                self._gang.wait_for(link, select.POLLIN, deadline, doing)
                heard = link.recv(1)
            except TimeLimitError:
                raise too_late(self._gang, doing, [rank], self._timeout_s) from None
            except OSError:
                heard = b""
            if not heard:
                lost(self._gang, rank)

    def close(self) -> None:
        self._links.clear()


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _futex(library: ctypes.CDLL) -> Callable[[int, int, int, object], int]:
    """``futex(address, operation, value, timeout)`` of the kernel."""
    call = library["syscall"]
    call.restype = ctypes.c_long
    call.argtypes = [
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
    ]
    number = _FUTEX_NUMBER[platform.machine()]
    return lambda address, operation, value, timeout: call(
        number, address, operation, value, timeout
    )
