"""The guard of a spool's folders on one host: serves its files, and removes them with its owner.

Standard library only, and nothing of this house: a task hands the source of this file to a fresh
interpreter, so that the guard needs no installation, starts in milliseconds and stays small. It
is no child of the task: it outlives the worker, and the executor, that began it, and ends when
the owner's line to it breaks, however the owner ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time

__all__ = ["HOME_FILE", "guard"]

#: Says, in the first folder, where the guard listens and which folders it has.
HOME_FILE = "guard.json"

_NONCE_BYTES = 32
_PROOF_BYTES = 32
_NAME = re.compile(r"[0-9a-z-]+\.arrow")
_LENGTH = struct.Struct("!q")
_MOST_REQUEST_BYTES = 4096
#: Whoever has said nothing for so long before it has proved to know the token is sent away.
_PATIENCE_S = 10.0
_KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 8000}


def guard(*, folders: list[str], owner: tuple[str, int], token: str) -> None:
    """Make the folders, serve what tasks write there, remove them when the owner has gone.

    Args:
        folders: To be made. Of several guards, the one that makes the first of them stays.
        owner: Address and port of the owner's line.
        token: What owner, tasks and readers have in common.
    """
    if not _detached():
        return
    try:
        os.mkdir(folders[0], 0o700)
    except FileExistsError:  # another task's guard is there
        return
    made = [folders[0]]

    def remove(*_: object) -> None:
        for folder in reversed(made):
            shutil.rmtree(folder, ignore_errors=True)

    def end(*_: object) -> None:
        remove()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    try:
        for folder in folders[1:]:
            with contextlib.suppress(OSError):  # a root that cannot be used is not used
                os.mkdir(folder, 0o700)
                made.append(folder)
        line = socket.create_connection(owner, timeout=_PATIENCE_S)
        _settle(line)
        _prove(line, token)
        with socket.create_server((line.getsockname()[0], 0), family=line.family) as door:
            threading.Thread(target=_serve, args=(door, made, token), daemon=True).start()
            _say_where(made, door.getsockname())
            line.settimeout(None)
            with contextlib.suppress(OSError):
                while line.recv(1) not in (b"", b"x"):  # kept for as long as the owner lives
                    pass
        remove()
        line.close()  # the owner waits for it
    finally:
        remove()
    os._exit(0)  # without waiting for readers


def _detached() -> bool:
    """Become nobody's child, and nobody's to wait for; False in the process that was begun."""
    if os.fork():
        return False
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    os.chdir("/")
    return True


def _say_where(folders: list[str], address: tuple[str, int]) -> None:
    path = os.path.join(folders[0], HOME_FILE)
    with open(f"{path}.new", "w") as file:
        json.dump({"address": address[:2], "folders": folders, "pid": os.getpid()}, file)
    os.rename(f"{path}.new", path)


def _settle(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)  # they differ by system
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _prove(sock: socket.socket, token: str) -> None:
    """Answer the other side's question, as only one who has the token can."""
    question = _exactly(sock, _NONCE_BYTES)
    sock.sendall(hmac.new(token.encode(), question, hashlib.sha256).digest())
    if _exactly(sock, 1) != b"+":
        raise OSError("the token was refused")


def _ask(sock: socket.socket, token: str) -> bool:
    """Whether the other side has the token."""
    question = os.urandom(_NONCE_BYTES)
    sock.sendall(question)
    answer = _exactly(sock, _PROOF_BYTES)
    if not hmac.compare_digest(answer, hmac.new(token.encode(), question, "sha256").digest()):
        return False
    sock.sendall(b"+")
    return True


def _exactly(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = sock.recv(count - len(found))
        if not part:
            raise OSError("the line was closed")
        found += part
    return found


def _serve(door: socket.socket, folders: list[str], token: str) -> None:
    while True:
        try:
            caller, _ = door.accept()
        except OSError:
            if door.fileno() < 0:  # the guard ends
                return
            time.sleep(0.05)  # too many open files: one may go
            continue
        threading.Thread(target=_attend, args=(caller, folders, token), daemon=True).start()


def _attend(caller: socket.socket, folders: list[str], token: str) -> None:
    """One reader's requests, a line of JSON each: name, first byte, number of bytes."""
    with contextlib.suppress(OSError, ValueError), caller:
        caller.settimeout(_PATIENCE_S)
        _settle(caller)
        if not _ask(caller, token):
            return
        caller.settimeout(None)
        with caller.makefile("rb") as requests:
            while line := requests.readline(_MOST_REQUEST_BYTES):
                name, start, count = json.loads(line)
                _send(caller, folders, str(name), int(start), int(count))


def _send(caller: socket.socket, folders: list[str], name: str, start: int, count: int) -> None:
    """The length of the whole file, or -1, then the bytes that were asked for."""
    paths = [os.path.join(folder, name) for folder in folders if _NAME.fullmatch(name)]
    path = next((path for path in paths if os.path.exists(path)), None)
    if path is None:
        caller.sendall(_LENGTH.pack(-1))
        return
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        caller.sendall(_LENGTH.pack(size))
        end = min(size, start + count)
        while start < end:
            start += os.sendfile(caller.fileno(), file.fileno(), start, end - start)


def main(words: str) -> None:
    """Begin with the arguments of ``guard`` as JSON."""
    said = json.loads(words)
    guard(folders=said["folders"], owner=tuple(said["owner"]), token=said["token"])
    sys.exit(0)
