"""Inside a worker process of the local engine: takes orders over a socket until there are none.

Standard library only. ``local_service`` is the other end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import socket
import struct
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigdl._base import wire
from bigdl._base.environment import stay_on
from bigdl._base.errors import DataError
from bigdl.orca.engines import local_store as store
from bigdl.orca.engines.outcome import failed
from bigdl.orca.engines.pickling import dumps
from bigdl.orca.engines.worker import run_member, sending

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl._base.gang import Ticket

__all__ = ["Member", "Order", "host"]

# Kinds of frames: to the worker, from the worker.
ORDER, END = range(2)
HELLO, EVENT, VALUE, FAILED = range(16, 20)
#: A frame holds a message of at most an order's fields, or says in which file it is.
FRAME_LIMIT = 1 << 28

# What a worker says when it connects: its number, its pid, and which of its two lines this is.
CARD = struct.Struct("!IIB")
CONTROL, OUTPUT = range(2)
_CONNECT_S = 30.0

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


def host(port: int, key: bytes, number: int) -> None:
    """The life of a worker process.

    Args:
        port: Where the engine listens on this machine.
        key: The engine's secret.
        number: Which of its processes this one is.
    """
    _widen_blas()
    line = _Line(_connect(port, key, number, CONTROL))
    with _connect(port, key, number, OUTPUT) as output:
        for fd in (1, 2):
            os.dup2(output.fileno(), fd)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by something of the user's
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    line.send(HELLO, os.fsencode(tempfile.gettempdir()))
    for kind, payload in line.frames():
        if kind == END:
            break
        _obey(line, pickle.loads(payload))
    line.close()


def _obey(line: _Line, order: Order) -> None:
    try:
        _settle(order)
        with contextlib.suppress(FileExistsError):
            os.mkdir(order.store, 0o700)
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


def _settle(order: Order) -> None:
    """Be where the caller is, on the cores that were given."""
    sys.path[:] = order.search_path
    if os.getcwd() != order.folder:
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


def _connect(port: int, key: bytes, number: int, line: int) -> socket.socket:
    """Open a line to the engine, and show that this is its process."""
    sock = socket.create_connection(("127.0.0.1", port), _CONNECT_S)
    nonce = b""
    while len(nonce) < wire.NONCE_BYTES:
        received = sock.recv(wire.NONCE_BYTES - len(nonce))
        if not received:
            raise ConnectionError("The engine has hung up.")
        nonce += received
    card = CARD.pack(number, os.getpid(), line)
    sock.sendall(card + wire.proof(key, nonce, card))
    sock.settimeout(None)
    wire.settle(sock)
    return sock


class _Line:
    """The worker's end of its line to the engine."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, kind: int, payload: bytes) -> None:
        with self._sending:
            self._sock.sendall(wire.frame(kind, payload))

    def frames(self) -> Iterator[tuple[int, bytes]]:
        frames = wire.Frames(FRAME_LIMIT)
        while received := self._sock.recv(1 << 20):
            frames.feed(received)
            yield from frames

    def close(self) -> None:
        self._sock.close()
