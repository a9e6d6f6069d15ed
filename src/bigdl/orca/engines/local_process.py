"""Worker processes of the local engine as the engine sees them: who they are, and their lines.

Standard library only. Everything here belongs to the engine's one thread (``local_service``).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigdl._base import wire
from bigdl._base.errors import BigDLError
from bigdl._base.workers import Worker, Workers
from bigdl.orca.engines.local_worker import CARD, CONTROL, FRAME_LIMIT, host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Cores", "Crew", "Crews", "Door", "Kind", "Process", "every"]

_STRANGER_S = 10.0
_STRANGERS = 256
_LAST_LINES = 8
_LINE_LIMIT = 1 << 16
#: Nurseries with no work that are kept for the next call.
_IDLE_CREWS = 3


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


class Crew:
    """Processes of one kind, and the nursery that they come from."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.used = time.monotonic()
        self._workers = Workers(preload=(*kind.preload, host.__module__), env=dict(kind.env))

    def start(self, port: int, key: bytes, number: int) -> Process:
        self.used = time.monotonic()
        return Process(self, number, self._workers.start(host, port, key, number))

    @property
    def is_alive(self) -> bool:
        """Whether its nursery can still give processes."""
        nursery = self._workers._nursery
        return nursery is None or nursery.poll() is None

    def close(self) -> None:
        self._workers.close()


class Crews:
    """The crews of an engine, by kind; those that are not needed are closed after a while.

    Args:
        home: The kind that is kept as long as the engine.
    """

    def __init__(self, home: Kind) -> None:
        self._home = home
        self._by_kind: dict[Kind, Crew] = {}
        self._dead: list[Crew] = []

    def get(self, kind: Kind, busy: set[Kind]) -> Crew:
        """The crew of a kind; a new one may take the place of one of no busy kind."""
        crew = self._by_kind.get(kind)
        if crew is not None and not crew.is_alive:
            self._dead.append(crew)  # the engine's folder may be its own
            crew = None
        if crew is None:
            self._thin_out(busy | {self._home})
            crew = self._by_kind[kind] = Crew(kind)
        return crew

    def _thin_out(self, busy: set[Kind]) -> None:
        idle = [crew for kind, crew in self._by_kind.items() if kind not in busy]
        idle.sort(key=lambda crew: crew.used)
        for crew in idle[: max(0, len(idle) + 1 - _IDLE_CREWS)]:
            del self._by_kind[crew.kind]
            crew.close()

    def close(self) -> None:
        for crew in [*self._by_kind.values(), *self._dead]:
            crew.close()


class Process:
    """One worker process: its two lines, and what it does."""

    def __init__(self, crew: Crew, number: int, worker: Worker) -> None:
        self.crew = crew
        self.number = number
        self.pid = 0
        #: What it works at; None = idle. The service's.
        self.job: Any = None
        #: Whether the order has gone out.
        self.is_ordered = False
        #: Slots and cores that it holds.
        self.slots = 0
        self.cpus: tuple[int, ...] | None = None
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
        self._worker = worker
        self._partial = b""
        self._last: deque[str] = deque(maxlen=_LAST_LINES)

    def is_lost(self) -> bool:
        """Whether the process has ended; does not wait."""
        self._worker._wait(0.0, None)
        return self._worker._is_lost()

    def end(self, *, kill: bool) -> str:
        """Wait for the end of a process that has hung up, or kill it; how it ended, or ""."""
        if kill:
            self._worker.cancel()
            return ""
        try:
            self._worker.result(timeout_s=5.0)
        except (BigDLError, OSError) as exc:
            return str(exc)
        except Exception as exc:  # noqa: BLE001  (of our own code in the worker; to be seen)
            return f"{type(exc).__name__}: {exc}"
        return ""

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
        writes = selectors.EVENT_WRITE if self.out else 0
        data = selector.get_key(self.line).data
        selector.modify(self.line, selectors.EVENT_READ | writes, data)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Close its lines."""
        for sock in (self.line, self.output):
            if sock is not None:
                with contextlib.suppress(KeyError, ValueError):
                    selector.unregister(sock)
                sock.close()
        self.line = self.output = None


class _Stranger:
    """Whoever has connected and has not shown yet that it is one of ours."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.nonce = wire.nonce()
        self.came = time.monotonic()
        self.said = b""


class Door:
    """Where worker processes connect: on this machine only, and only with the engine's key."""

    def __init__(self, selector: selectors.BaseSelector, key: bytes) -> None:
        self._selector = selector
        self._key = key
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._sock.setblocking(False)
        self._strangers: dict[socket.socket, _Stranger] = {}
        self.port: int = self._sock.getsockname()[1]
        #: Called with (number, pid, is the control line, socket) for each of ours.
        self.welcome: Callable[[int, int, bool, socket.socket], None] = lambda *_: None
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
        self.welcome(number, pid, line == CONTROL, sock)

    def _forget(self, stranger: _Stranger) -> socket.socket:
        del self._strangers[stranger.sock]
        self._selector.unregister(stranger.sock)
        return stranger.sock


class Cores:
    """The cores of this machine that are free, nearest together first.

    Args:
        ids: Cores to give away; () = none, so that the system places everything.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._ids = ids
        self._free = list(ids)

    def take(self, n: int) -> tuple[int, ...] | None:
        if n == 0 or len(self._free) < n:
            return None
        taken, self._free = self._free[:n], self._free[n:]
        return tuple(taken)

    def give_back(self, taken: tuple[int, ...]) -> None:
        self._free = [core for core in self._ids if core in {*self._free, *taken}]


def every(processes: dict[int, Process], kind: Kind) -> Iterator[Process]:
    """Idle processes of a kind."""
    for process in processes.values():
        if process.crew.kind == kind and process.job is None and process.deadline is None:
            yield process
