"""The stack on which a thread handles signals, kept as it is. Standard library only.

OpenVINO's CPU plugin gives the thread that loads it a new one, with room for the registers of
AMX, and unmaps that when the plugin goes. It puts the old one back only if its own is still in
place and the thread is the same. Several plugins (NNCF loads some) that end in another order, or
by a garbage collection in another thread, leave a stack that is not there any more: the next
signal with a handler, of a DataLoader's worker that has ended, say, then ends the process.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["signal_stack", "signal_stack_kept"]

_DISABLED = 2  # SS_DISABLE of sigaltstack(2)
_LEAST = 51  # AT_MINSIGSTKSZ of getauxval(3): what the kernel itself writes there
_FOR_THE_HANDLER = 4096


class _Stack(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


def signal_stack() -> tuple[int, int] | None:
    """(address, size) of this thread's, None if it has none, or if this is not Linux."""
    found = _read()
    if found is None or found.flags & _DISABLED:
        return None
    return found.address or 0, found.size


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """After the block, this thread's is what it was before, unless that was too small."""
    before = _read()
    try:
        yield
    finally:
        if before is not None and (before.flags & _DISABLED or before.size >= _least()):
            ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)


def _read() -> _Stack | None:
    if not sys.platform.startswith("linux"):
        return None
    found = _Stack()
    return found if ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0 else None


def _least() -> int:
    """A stack of this size takes all registers."""
    ask = ctypes.CDLL(None).getauxval
    ask.restype = ctypes.c_ulong
    return int(ask(_LEAST)) + _FOR_THE_HANDLER
