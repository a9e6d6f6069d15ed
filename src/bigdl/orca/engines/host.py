"""Inside a worker process: takes an engine's orders over a socket until there are none.

Standard library only. ``service`` is the other end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import queue
import socket
import struct
import sys
import tempfile
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bigdl._base import wire
from bigdl._base.environment import stay_on
from bigdl._base.errors import DataError
from bigdl.orca.engines import store
from bigdl.orca.engines.outcome import failed
from bigdl.orca.engines.pickling import dumps, search_abroad
from bigdl.orca.engines.store import DONE, PIECE
from bigdl.orca.engines.worker import run_member, sending

if TYPE_CHECKING:
    from bigdl._base.gang import Ticket

__all__ = ["Entrance", "Member", "Order", "host"]

# Kinds of frames: to the worker, from the worker.
ORDER, END = range(2)
HELLO, EVENT, VALUE, FAILED, FETCH, PUT, PUT_PIECE, PUT_DONE = range(16, 24)
#: What is longer is sent in pieces, or its frame says in which file it is.
FRAME_LIMIT = (1 << 32) - 1

# What comes first over a line: a worker's number, its pid, and which of its two lines this is;
# or the number of one who offers places.
CARD = struct.Struct("!IIB")
CONTROL, OUTPUT, SEAT = range(3)
_CONNECT_S = 30.0
_PIECE_BYTES = 4 << 20

# OpenBLAS' function under the names that NumPy's and SciPy's wheels, and systems, give it.
_BLAS_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


@dataclass(frozen=True, kw_only=True)
class Member:
    """Its place, if the order is to be a member of a gang."""

    ticket: Ticket
    rank: int
    cores: int
    marks: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Order:
    """One call, as it travels to a worker process.

    Args:
        fn: The function; like ``args`` pickled and packed.
        args: Its arguments; for a member those after the context; b"" if ``source`` has it.
        source: A stored value's path, the one argument.
        member: Its place in a gang.
        keep: Where to leave the value, instead of sending it; () = send it.
        is_split: The value is a sequence, each item of which has a path of its own.
        cpus: The cores to run on; None leaves them.
        store: Where its long messages lie: the engine's folder, or a part of it.
        search_path: The caller's ``sys.path``.
        folder: The caller's working folder.
    """

    fn: bytes
    args: bytes = b""
    source: str | None = None
    member: Member | None = None
    keep: tuple[str, ...] = ()
    is_split: bool = False
    cpus: tuple[int, ...] | None = None
    store: str = ""
    search_path: tuple[str, ...] = ()
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class Entrance:
    """Where an engine's processes connect, and the secret that they show.

    Args:
        address: The engine's host.
        port: Where it listens there.
        key: The secret, which never travels over these lines.
    """

    address: str
    port: int
    key: bytes = field(repr=False)

    def come_in(self, number: int, line: int) -> socket.socket:
        """Open a line, and show that this is a process of the engine's."""
        sock = socket.create_connection((self.address, self.port), _CONNECT_S)
        nonce = b""
        while len(nonce) < wire.NONCE_BYTES:
            received = sock.recv(wire.NONCE_BYTES - len(nonce))
            if not received:
                raise ConnectionError("The engine has hung up.")
            nonce += received
        card = CARD.pack(number, os.getpid(), line)
        sock.sendall(card + wire.proof(self.key, nonce, card))
        sock.settimeout(None)
        wire.settle(sock)
        return sock


@dataclass(frozen=True)
class Abroad:
    """That a worker was started by a cluster, away from the caller's own environment.

    Args:
        is_near: The caller's files are seen here; else the line brings them.
    """

    is_near: bool


def host(entrance: Entrance, number: int, abroad: Abroad | None = None) -> None:
    """The life of a worker process.

    Args:
        entrance: The engine's.
        number: Which of its processes this one is.
        abroad: How far from the caller this is; None = as if it had started it itself.
    """
    _widen_blas()
    line = _Line(entrance.come_in(number, CONTROL))
    with entrance.come_in(number, OUTPUT) as output:
        for fd in (1, 2):
            os.dup2(output.fileno(), fd)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by something of the user's
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    line.send(HELLO, os.fsencode(tempfile.gettempdir()))
    ground = None if abroad is None else list(sys.path)
    read = line.read
    with contextlib.ExitStack() as stack:
        if abroad is not None and not abroad.is_near:
            far = _Far(line)
            read = far.read
            stack.enter_context(store.reached_by(far))
        while (frame := read()) and frame[0] != END:
            _obey(line, pickle.loads(frame[1]), ground)
    line.close()


def _obey(line: _Line, order: Order, ground: list[str] | None) -> None:
    try:
        _settle(order, ground)
        store.make_room(order.store)
        with sending(lambda event: line.send(EVENT, store.pack(event, order.store))):
            value = _call(order)
        kind, answer = VALUE, b""
        if order.keep or order.is_split:
            _keep(value, order)
        else:
            answer = store.pack(dumps(value), order.store)
    except Exception as exc:  # noqa: BLE001  (it is raised again in the caller)
        kind, answer = FAILED, store.pack(pickle.dumps(failed(exc)), order.store)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    line.send(kind, answer)


def _keep(value: Any, order: Order) -> None:
    """Leave the value where its refs look for it."""
    if order.is_split and len(value) != len(order.keep):
        raise DataError(f"{len(value)} values came where {len(order.keep)} were to be kept.")
    for path, part in zip(order.keep, value if order.is_split else [value], strict=True):
        store.save(dumps(part), path)


def _call(order: Order) -> Any:
    fn = store.unpack(order.fn, keep=True)
    if order.source is not None:
        return pickle.loads(fn)(store.load(order.source))
    args = store.unpack(order.args, keep=True)
    if order.member is None:
        return pickle.loads(fn)(*pickle.loads(args))
    place = order.member
    return run_member(place.ticket, place.rank, fn, args, place.cores, place.marks)


def _settle(order: Order, ground: list[str] | None) -> None:
    """Be where the caller is, on the cores that were given.

    Abroad (``ground`` is the search path there) that is so as far as its folders exist.
    """
    if ground is None:
        sys.path[:] = order.search_path
    else:
        sys.path[:] = search_abroad(ground, order.search_path)
    if os.getcwd() != order.folder and (ground is None or os.path.isdir(order.folder)):
        os.chdir(order.folder)
    stay_on(order.cpus)


def _widen_blas() -> None:
    """Give an OpenBLAS that was loaded before this process was forked its threads.

    A nursery loads it with one thread, so that it can fork.
    """
    threads = int(os.environ.get("OPENBLAS_NUM_THREADS", "1"))
    if threads == 1 or "numpy" not in sys.modules or sys.platform != "linux":
        return
    with open("/proc/self/maps") as file:
        libraries = {line.split()[-1] for line in file if "openblas" in line}
    for library in libraries:
        loaded = ctypes.CDLL(library)
        for name in _BLAS_SETTERS:
            setter = getattr(loaded, name, None)
            if setter is not None:
                setter(threads)
                break


class _Line:
    """The worker's end of its line to the engine."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._frames = wire.Frames(FRAME_LIMIT)
        self._whole: deque[tuple[int, bytes]] = deque()

    def send(self, kind: int, payload: bytes = b"") -> None:
        with self._sending:
            self._sock.sendall(wire.frame(kind, payload))

    def read(self) -> tuple[int, bytes] | None:
        """The next frame; None at the end of the line."""
        while not self._whole:
            received = self._sock.recv(1 << 20)
            if not received:
                return None
            self._frames.feed(received)
            self._whole.extend(self._frames)
        return self._whole.popleft()

    def close(self) -> None:
        self._sock.close()


class _Far:
    """The engine's files, where they are not seen: the line brings and takes them.

    A thread of its own reads the line, as any thread of a user's may ask for a file.
    """

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._asking = threading.Lock()
        self._orders: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        threading.Thread(target=self._sort, name="bigdl-line", daemon=True).start()

    def _sort(self) -> None:
        while True:
            try:
                frame = self._line.read()
            except OSError:
                frame = None
            if frame is None or frame[0] in (ORDER, END):
                self._orders.put(frame)
            if frame is None or frame[0] in (PIECE, DONE):
                self._pieces.put(frame)
            if frame is None:
                return

    def read(self) -> tuple[int, bytes] | None:
        """The next order, or the word to end; None at the end of the line."""
        return self._orders.get()

    def fetch(self, path: str) -> bytearray:
        data = bytearray()
        with self._asking:
            self._line.send(FETCH, os.fsencode(path))
            while piece := self._answer():
                data += piece
        return data

    def put(self, data: bytes, path: str) -> None:
        with self._asking:
            self._line.send(PUT, os.fsencode(path))
            for start in range(0, len(data), _PIECE_BYTES):
                self._line.send(PUT_PIECE, data[start : start + _PIECE_BYTES])
            self._line.send(PUT_DONE)
            self._answer()

    def _answer(self) -> bytes:
        """The next piece; b"" at the end."""
        frame = self._pieces.get()
        if frame is None:
            raise ConnectionError("The engine has hung up.")
        kind, payload = frame
        if kind == DONE and payload:
            number, text = payload.split(b" ", 1)
            raise OSError(int(number), text.decode())  # Python makes it the kind for the number
        return payload if kind == PIECE else b""
