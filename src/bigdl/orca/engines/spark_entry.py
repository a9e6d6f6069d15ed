"""The first that runs in a Spark task: comes in at the engine, and sees that `bigdl` is there.

Standard library only, and nothing of ours: this file's text travels with the job, to executors
that may not have the package. What it does there after that is in ``spark_seat``.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib
import importlib.util
import json
import os
import select
import socket
import struct
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Kinds of frames: from the driver, from the seat.
START, KILL, END, WELCOME, PACKAGE = range(5)
HELLO, NEED, FAULT, READY, ENDED = range(16, 21)

_HEAD = struct.Struct("!IB")
_CARD = struct.Struct("!IIB")
_SEAT = 2
_NONCE_BYTES = 32
_CONNECT_S = 30.0


def sit(number: int, attempt: int, folder: str, door: tuple[str, int, bytes]) -> None:
    """Be a seat of the engine's until it says that this is enough.

    Args:
        number: Which of its seats this is.
        attempt: How often Spark has tried this task before.
        folder: Where the application's files lie on this machine, and go with it.
        door: (address, port, key) of the engine.
    """
    try:
        line = _come_in(number, door)
    except OSError:  # the engine has gone, and needs no seats
        return
    with line:
        try:
            _send(line, HELLO, {"attempt": attempt})
            welcome = _next(line)
            if welcome is None or welcome[0] != WELCOME:
                return
            wanted = json.loads(welcome[1])
            _see_to_package(line, wanted, folder)
            seat = importlib.import_module("bigdl.orca.engines.spark_seat")
            seat.serve(line, door, wanted)
        except OSError:  # the line broke: the engine has gone
            return
        except Exception as exc:  # noqa: BLE001  (the driver tells it)
            said = {"text": f"{type(exc).__name__}: {exc}", "traceback": traceback.format_exc()}
            with contextlib.suppress(OSError):
                _send(line, FAULT, said)


def digest(folder: str) -> str:
    """What tells one copy of the package from another; "" if there is none."""
    mark = hashlib.sha256()
    found = False
    for name, path in sources(folder):
        found = True
        with open(path, "rb") as file:
            mark.update(f"{name}\n".encode() + file.read())
    return mark.hexdigest()[:16] if found else ""


def sources(folder: str) -> Iterator[tuple[str, str]]:
    """(name within the package, path) of its files, in order."""
    for root, folders, files in sorted(os.walk(folder)):
        folders.sort()
        for file in sorted(files):
            if file.endswith((".py", ".typed")):
                path = os.path.join(root, file)
                yield os.path.relpath(path, folder).replace(os.sep, "/"), path


def _see_to_package(line: socket.socket, wanted: dict[str, Any], folder: str) -> None:
    """Have the driver's own `bigdl` importable here."""
    mark = wanted["digest"]
    zipped = os.path.join(folder, f"bigdl-{mark}.zip")
    found = sys.modules.get("bigdl")
    if not mark or zipped in sys.path:
        return
    places = list(getattr(found, "__path__", ()))
    if not places:
        spec = importlib.util.find_spec("bigdl")
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if places and digest(places[0]) == mark:
        return
    if not os.path.exists(zipped):
        _send(line, NEED, {})
        package = _next(line)
        if package is None or package[0] != PACKAGE:
            raise ConnectionError("The driver has not sent its package.")
        part = f"{zipped}.{os.getpid()}"
        with open(part, "wb") as file:
            file.write(package[1])
        os.replace(part, zipped)
    sys.path.insert(0, zipped)
    for name in [name for name in sys.modules if name.split(".")[0] == "bigdl"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _come_in(number: int, door: tuple[str, int, bytes]) -> socket.socket:
    address, port, key = door
    line = socket.create_connection((address, port), _CONNECT_S)
    nonce = _exactly(line, _NONCE_BYTES)
    card = _CARD.pack(number, os.getpid(), _SEAT)
    mac = hmac.new(key, digestmod="sha256")
    for part in (nonce, card):
        mac.update(struct.pack("!I", len(part)) + part)
    line.sendall(card + mac.digest())
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def _send(line: socket.socket, kind: int, content: dict[str, Any]) -> None:
    payload = json.dumps(content).encode()
    line.sendall(_HEAD.pack(len(payload), kind) + payload)


def _next(line: socket.socket) -> tuple[int, bytes] | None:
    """The next frame, None at the end of the line, or if Spark's own process has gone."""
    parent = os.getppid()
    while not select.select([line], [], [], 0.5)[0]:
        if os.getppid() != parent:
            return None
    try:
        length, kind = _HEAD.unpack(_exactly(line, _HEAD.size))
        return kind, _exactly(line, length)
    except ConnectionError:
        return None


def _exactly(line: socket.socket, wanted: int) -> bytes:
    data = bytearray()
    while len(data) < wanted:
        received = line.recv(min(1 << 20, wanted - len(data)))
        if not received:
            raise ConnectionError("The engine has hung up.")
        data += received
    return bytes(data)
