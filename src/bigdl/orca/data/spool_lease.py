"""The owner's end of a spool: as long as it is held, the guards on all hosts keep the files.

Standard library only. A guard calls when it begins; the line stays open and says nothing. When
the owner lets go, or dies in any way, the line ends and the guards remove what they guard.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass

from bigdl._base import wire
from bigdl._base.errors import ConfigError

__all__ = ["Lease", "Ticket", "call"]

#: Guards have so long to remove what they keep before the owner goes on without waiting.
_REMOVAL_S = 10.0
_PATIENCE_S = 10.0
_AGAIN_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What tasks need to know of a spool. Its ``repr`` keeps the secret.

    Args:
        name: Random; folders are called by it.
        address: Of the owner.
        port: Of the owner.
        token: What owner, guards and readers have in common.
    """

    name: str
    address: str
    port: int
    token: str

    def __repr__(self) -> str:
        return f"Ticket(name={self.name!r}, address={self.address!r}, port={self.port})"


class Lease:
    """Holds the files of one spool on every host.

    Args:
        address: One of this machine's addresses, which guards can reach.

    Raises:
        ConfigError: The address is not this machine's.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        try:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._door = socket.create_server((address, 0), family=family)
        except OSError as exc:
            raise ConfigError(
                f"Guards of spooled data cannot call at {address!r}: {exc}. It is Spark's "
                "spark.driver.host, which has to be an address of this machine."
            ) from exc
        self.ticket = Ticket(
            name=secrets.token_hex(8),
            address=address,
            port=self._door.getsockname()[1],
            token=secrets.token_hex(32),
        )
        self._pid = os.getpid()
        self._lines: list[socket.socket] = []
        self._is_closed = self._is_sealed = False
        self._changing = threading.Lock()
        threading.Thread(target=self._hear, name="spool-lease", daemon=True).start()

    @property
    def guards(self) -> int:
        """How many have called."""
        with self._changing:
            return len(self._lines)

    def seal(self) -> None:
        """No further guard may call: all is written."""
        self._is_sealed = True
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes who waits for a call
        self._door.close()

    def close(self) -> None:
        """Let go: the files are removed. A second call, or one in a forked child, does nothing."""
        if self._pid != os.getpid():
            return
        self.seal()
        with self._changing:
            self._is_closed = True
            lines, self._lines = self._lines, []
        for line in lines:
            with contextlib.suppress(OSError):
                line.sendall(b"x")
        for line in lines:
            with contextlib.suppress(OSError), line:
                line.settimeout(_REMOVAL_S)
                line.recv(1)

    def _hear(self) -> None:
        while True:
            try:
                line, _ = self._door.accept()
            except OSError:
                if self._is_sealed:
                    return
                time.sleep(_AGAIN_S)  # no file descriptor was free, or the caller has gone
                continue
            threading.Thread(target=self._greet, args=(line,), daemon=True).start()

    def _greet(self, line: socket.socket) -> None:
        try:
            line.settimeout(_PATIENCE_S)
            wire.settle(line)
            question = wire.nonce()
            line.sendall(question)
            answer = _exactly(line, wire.PROOF_BYTES)
        except OSError:
            line.close()
            return
        if not wire.same(answer, _proof(self.ticket.token, question)):
            line.close()
            return
        with self._changing:
            is_late = self._is_closed
            if not is_late:
                self._lines.append(line)
        if is_late:
            line.close()
            return
        with contextlib.suppress(OSError):
            line.settimeout(None)
            line.sendall(b"+")


def call(address: tuple[str, int], token: str) -> socket.socket:
    """A line to a guard that knows who calls.

    Raises:
        OSError: Nobody is there, or the token was refused.
    """
    line = socket.create_connection(address, timeout=_PATIENCE_S)
    try:
        wire.settle(line)
        line.sendall(_proof(token, _exactly(line, wire.NONCE_BYTES)))
        if _exactly(line, 1) != b"+":
            raise ConnectionError("the guard does not know this token")
        line.settimeout(None)
    except OSError:
        line.close()
        raise
    return line


def _proof(token: str, question: bytes) -> bytes:
    return hmac.new(token.encode(), question, hashlib.sha256).digest()


def _exactly(line: socket.socket, count: int) -> bytes:
    """So many bytes.

    Raises:
        ConnectionError: The line ended before.
    """
    found = b""
    while len(found) < count:
        part = line.recv(count - len(found))
        if not part:
            raise ConnectionError("the line was closed")
        found += part
    return found
