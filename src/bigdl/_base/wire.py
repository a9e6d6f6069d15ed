"""How our processes speak over sockets: frames of bytes, and proof that both know one secret.

Standard library only. Nothing that comes over a network is ever unpickled: payloads are JSON or
plain bytes, and nothing at all is read from a stranger but a few hundred bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import platform
import socket
import struct
import sys
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "NONCE_BYTES",
    "PROOF_BYTES",
    "Frames",
    "frame",
    "host_key",
    "nonce",
    "proof",
    "same",
    "settle",
]

NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size

_HEAD = struct.Struct("!IB")  # length of the payload, kind

# A host that was switched off sends no last word. With these its silence is noticed in 8 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 8000}


class FrameError(ValueError):
    """The other side does not speak our language."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One message as it goes over a socket."""
    return _HEAD.pack(len(payload), kind) + payload


class Frames:
    """Cuts a stream of bytes into messages.

    Args:
        limit: Longest payload that is accepted, in bytes; may be changed between messages.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = bytearray()

    def feed(self, received: bytes) -> None:
        self._held += received

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Every whole message so far, as (kind, payload).

        Raises:
            FrameError: A message is longer than ``limit``.
        """
        while len(self._held) >= _HEAD.size:
            length, kind = _HEAD.unpack_from(self._held)
            if length > self.limit:
                raise FrameError(f"a message of {length} bytes where {self.limit} are allowed")
            end = _HEAD.size + length
            if len(self._held) < end:
                return
            payload = bytes(self._held[_HEAD.size : end])
            del self._held[:end]
            yield kind, payload


def nonce() -> bytes:
    return os.urandom(NONCE_BYTES)


def proof(key: bytes, *parts: bytes) -> bytes:
    """What only a holder of ``key`` can say about ``parts``."""
    mac = hmac.new(key, digestmod="sha256")
    for part in parts:
        mac.update(struct.pack("!I", len(part)))  # so that no two lists of parts look alike
        mac.update(part)
    return mac.digest()


def same(one: bytes, other: bytes) -> bool:
    """Compare two proofs in a time that tells nothing about them."""
    return hmac.compare_digest(one, other)


def settle(sock: socket.socket) -> None:
    """Send small messages at once, and notice a peer whose machine has gone."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)  # they differ by system
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def host_key() -> str:
    """A name that two processes have in common if, and only if, they can share memory.

    That takes one kernel and, since the memory is handed over through a socket that lives in
    it, one network namespace: containers of their own count as hosts of their own.
    """
    if sys.platform == "linux":
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                boot = file.read().strip()
            return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.getuid()}"
        except OSError:  # no /proc here
            pass
    return f"{platform.node()}/{uuid.getnode():x}"
