"""Worker processes as an engine sees them: who they are, their lines, the slots they hold.

Standard library only. Everything here belongs to the engine's one thread (``service``). What
brings processes into being is an engine's own: its ``Places``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bigdl._base import wire
from bigdl._base.errors import ConfigError
from bigdl.orca.engines.host import CARD, FRAME_LIMIT, Entrance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from bigdl.orca.engines.job import Job
    from bigdl.orca.engines.service import Service

__all__ = ["Door", "Handle", "Kind", "Place", "Places", "Process", "every"]

_STRANGER_S = 10.0
_STRANGERS = 256
_LAST_LINES = 8
_LINE_LIMIT = 1 << 16
#: What waits to be sent of a long file.
_FEED_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What makes processes alike, so that one can stand in for the other.

    Args:
        env: Variables that they are started with, over the caller's.
        preload: Modules that are imported before they are.
        around: The caller's own variables when they were asked for.
        once: They take one order only.
    """

    env: frozenset[tuple[str, str]]
    preload: tuple[str, ...] = ()
    around: frozenset[tuple[str, str]]
    once: bool = False


class Handle(Protocol):
    """A process beside its lines: whether it is there, and its end."""

    def is_lost(self) -> bool:
        """Whether the process is known to have ended; does not wait."""

    def end(self, *, kill: bool) -> str | None:
        """Have it end: one that has hung up, or by force.

        Returns:
            How it ended, in words, "" if that says nothing; None while it may still be there:
            to be asked again.
        """


class Place(Protocol):
    """Slots that a job holds: where its process is, or comes to be."""

    #: Cores to run on; None = the system's choice.
    cpus: tuple[int, ...] | None

    def process(self, kind: Kind) -> Process:
        """An idle process of that kind here, or a new one. May raise if none can be started."""

    def release(self) -> None:
        """The slots are free again."""


class Places(Protocol):
    """All slots of an engine, and what brings processes into being there.

    Everything but ``slots`` belongs to the engine's one thread.
    """

    slots: int

    def open(self, service: Service) -> str:
        """Begin; the folder for the engine's files, "" if a first process has to say it."""

    def claim(self, jobs: Sequence[Job]) -> list[Place] | None:
        """A place for each, all or none. None = not now; asked again soon."""

    def want(self, slots: Sequence[int]) -> None:
        """How many slots each job that waits for some needs, in their order; called often."""

    def free_slots(self) -> int:
        """Slots that nothing runs on."""

    def welcome(self, number: int, pid: int, sock: socket.socket) -> None:
        """A third line has come, of one who offers places."""

    def ready(self, process: Process, hello: bytes) -> str:
        """A process has come; the folder as it says, where ``open`` did not know it."""

    def gone(self, process: Process, how: str) -> None:
        """A process has ended."""

    def look_after(self) -> None:
        """Called again and again, at least twice a second."""

    def close(self) -> None:
        """End all processes and give everything back."""


class Process:
    """One worker process: its two lines, and what it does."""

    def __init__(self, kind: Kind, number: int, handle: Handle) -> None:
        self.kind = kind
        self.number = number
        self.handle = handle
        self.pid = 0
        #: Its host's name, where that is not this one.
        self.node = ""
        #: What it works at; None = idle. The service's.
        self.job: Any = None
        #: Whether the order has gone out.
        self.is_ordered = False
        #: The slots that its job holds.
        self.place: Place | None = None
        #: Whether it is on its way out, and if so whether by force.
        self.is_ending: bool | None = None
        #: When it has to be gone by, once it was told to end.
        self.deadline: float | None = None
        #: Since when it is known to have ended, though its lines have not.
        self.lost_since: float | None = None
        self.line: socket.socket | None = None
        self.output: socket.socket | None = None
        #: Whether both lines have come; the second may have ended since.
        self.is_connected = False
        #: Whether nothing more can come over the second.
        self.is_quiet = False
        self.frames = wire.Frames(FRAME_LIMIT)
        self.out = bytearray()
        #: What is sent after ``out``, piece by piece.
        self.feeds: deque[Iterator[bytes]] = deque()
        #: A file that it is sending, and where it will be.
        self.receiving: tuple[BinaryIO, str] | None = None
        self._partial = b""
        self._last: deque[str] = deque(maxlen=_LAST_LINES)

    def read_output(self) -> str:
        """The whole lines that it has written since, "" if none; never waits."""
        received = b""
        while self.output is not None and not self.is_quiet:
            try:
                piece = self.output.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            if not piece:
                self.is_quiet = True
                break
            received += piece
        whole, newline, rest = (self._partial + received).rpartition(b"\n")
        if not newline and len(rest) > _LINE_LIMIT:
            whole, newline, rest = rest, b"\n", b""
        self._partial = rest
        text = (whole + newline).decode(errors="replace")
        self._last.extend(text.splitlines())
        return text

    def flush_output(self) -> str:
        """As ``read_output``, with the line that has no end yet."""
        text = self.read_output()
        rest, self._partial = self._partial.decode(errors="replace"), b""
        if rest:
            self._last.append(rest)
            text += f"{rest}\n"
        return text

    @property
    def last_lines(self) -> str:
        return "\n".join(self._last)

    def flush(self, selector: selectors.BaseSelector) -> None:
        """Send what waits to be sent, as far as that goes without waiting."""
        if self.line is None:
            return
        try:
            sent = self.line.send(self.out) if self.out else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self.out.clear()
            return  # its end is read in a moment
        del self.out[:sent]
        while self.feeds and len(self.out) < _FEED_BYTES:
            piece = next(self.feeds[0], None)
            if piece is None:
                self.feeds.popleft()
            else:
                self.out += piece
        writes = selectors.EVENT_WRITE if self.out else 0
        data = selector.get_key(self.line).data
        selector.modify(self.line, selectors.EVENT_READ | writes, data)

    def hang_up(self, selector: selectors.BaseSelector) -> None:
        """Close the line for orders; what it has written may still come."""
        _close(self.line, selector)
        self.line = None

    def close(self, selector: selectors.BaseSelector) -> None:
        """Close its lines."""
        self.hang_up(selector)
        _close(self.output, selector)
        self.output = None
        self.feeds.clear()
        self.drop_file()

    def drop_file(self) -> None:
        """Forget a file that has not come whole."""
        if self.receiving is not None:
            self.receiving[0].close()
            with contextlib.suppress(OSError):
                os.unlink(self.receiving[0].name)
            self.receiving = None


def _close(sock: socket.socket | None, selector: selectors.BaseSelector) -> None:
    if sock is not None:
        with contextlib.suppress(KeyError, ValueError):
            selector.unregister(sock)
        sock.close()


class _Stranger:
    """Whoever has connected and has not shown yet that it is one of ours."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.nonce = wire.nonce()
        self.came = time.monotonic()
        self.said = b""


class Door:
    """Where worker processes connect, and only with the engine's key.

    Args:
        selector: The engine's.
        address: Where to listen; the default is for processes on this machine.

    Raises:
        ConfigError: The address is not this machine's.
    """

    def __init__(self, selector: selectors.BaseSelector, address: str = "127.0.0.1") -> None:
        self._selector = selector
        self._key = secrets.token_bytes(32)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._sock = socket.create_server((address, 0), family=family, backlog=256)
        except OSError as exc:
            raise ConfigError(
                f"Cannot listen at {address}: {exc}. Give one of this machine's own addresses."
            ) from exc
        self._sock.setblocking(False)
        self._strangers: dict[socket.socket, _Stranger] = {}
        port: int = self._sock.getsockname()[1]
        #: All that is needed to come in.
        self.entrance = Entrance(address=address, port=port, key=self._key)
        #: Called with (number, pid, which line, socket) for each of ours.
        self.welcome: Callable[[int, int, int, socket.socket], None] = lambda *_: None
        selector.register(self._sock, selectors.EVENT_READ, lambda _: self._let_in())

    def look_at_clock(self) -> None:
        """Turn away who has not shown in time."""
        now = time.monotonic()
        for stranger in list(self._strangers.values()):
            if now - stranger.came > _STRANGER_S:
                self._forget(stranger).close()

    def close(self) -> None:
        for stranger in list(self._strangers.values()):
            self._forget(stranger).close()
        self._selector.unregister(self._sock)
        self._sock.close()

    def _let_in(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError:  # it has gone again, or this process is out of file descriptors
            return
        if len(self._strangers) >= _STRANGERS:
            sock.close()
            return
        sock.setblocking(False)
        stranger = self._strangers[sock] = _Stranger(sock)
        self._selector.register(sock, selectors.EVENT_READ, lambda _: self._hear(stranger))
        with contextlib.suppress(OSError):  # gone again; read in a moment
            sock.send(stranger.nonce)

    def _hear(self, stranger: _Stranger) -> None:
        wanted = CARD.size + wire.PROOF_BYTES
        try:
            received = stranger.sock.recv(wanted - len(stranger.said))
        except OSError:
            received = b""
        stranger.said += received
        if received and len(stranger.said) < wanted:
            return
        sock = self._forget(stranger)
        card, shown = stranger.said[: CARD.size], stranger.said[CARD.size :]
        if not received or not wire.same(shown, wire.proof(self._key, stranger.nonce, card)):
            sock.close()
            return
        wire.settle(sock)
        number, pid, line = CARD.unpack(card)
        self.welcome(number, pid, line, sock)

    def _forget(self, stranger: _Stranger) -> socket.socket:
        del self._strangers[stranger.sock]
        self._selector.unregister(stranger.sock)
        return stranger.sock


def every(processes: dict[int, Process], kind: Kind) -> Iterator[Process]:
    """Idle processes of a kind."""
    for process in processes.values():
        if process.kind == kind and process.job is None and process.deadline is None:
            yield process
