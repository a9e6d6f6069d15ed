"""Memory without a name, handed from one process to others as an open file.

Standard library only, and only for Linux. Since it has no name, nothing of it is left when the
last process that has it ends, however that happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import socket
from typing import TYPE_CHECKING

from bigdl._base.collective.links import lost
from bigdl._base.errors import ConfigError
from bigdl._base.machine import available_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bigdl._base.gang import Gang

__all__ = ["Segment"]


class Segment:
    """One piece of memory that the workers of a host share, zero at first.

    Args:
        fd: The open file; closed here.
        size: Its size in bytes.
        stride: Size of each worker's part of it.
    """

    def __init__(self, fd: int, size: int, stride: int) -> None:
        try:
            self.map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self.stride = stride
        #: Where it begins in this process.
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    @classmethod
    def between(
        cls,
        gang: Gang,
        links: Mapping[int, socket.socket],
        is_first: bool,
        size: int,
        deadline: float | None,
        *,
        stride: int = 0,
    ) -> Segment:
        """Make a segment for a group: the first makes it and hands it to the others.

        Raises:
            ConfigError: There is too little memory; on the first only.
        """
        fd = _create(size, len(links) + 1) if is_first else _take(gang, links, deadline)
        if is_first:
            try:
                for rank, link in links.items():
                    try:
                        socket.send_fds(link, [b"m"], [fd])
                    except OSError:
                        lost(gang, rank)
            except BaseException:
                os.close(fd)
                raise
        return cls(fd, size, stride)

    def close(self) -> None:
        """Give it back; arrays that still live in it keep it until they go."""
        with contextlib.suppress(BufferError):
            self.map.close()


def _create(size: int, workers: int) -> int:
    """An open file of ``size`` bytes, all of which the system has promised."""
    free = available_memory_bytes()
    if free and size > free:
        raise _too_little(size, workers, f"{free:,} bytes of memory are free")
    fd = os.memfd_create("bigdl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # taken now, since memory that is missing later kills the process that touches it
        os.posix_fallocate(fd, 0, size)
        # nobody can cut it off under the others
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as exc:
        os.close(fd)
        raise _too_little(size, workers, str(exc)) from exc
    return fd


def _too_little(size: int, workers: int, why: str) -> ConfigError:
    return ConfigError(
        f"{workers} workers on this host cannot share {size:,} bytes: {why}. "
        "Use fewer workers or smaller arrays, or give them more memory."
    )


def _take(gang: Gang, links: Mapping[int, socket.socket], deadline: float | None) -> int:
    """The open file that the first worker sends."""
    ((first, link),) = links.items()
    gang.wait_for(link, select.POLLIN, deadline, f"for memory from {gang.name(first)}.")
    try:
        received, fds, _, _ = socket.recv_fds(link, 1, 1)
    except OSError:
        received, fds = b"", []
    if not received or not fds:
        lost(gang, first)
    os.set_inheritable(fds[0], False)
    return fds[0]
