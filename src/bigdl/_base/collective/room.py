"""A room that the workers of one host share: memory, and a way to meet in it.

Standard library and NumPy only. ``shared`` says what they do there.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.collective.links import accept_all, reach
from bigdl._base.collective.segment import Segment
from bigdl._base.collective.waiting import (
    FlagMeeting,
    Meeting,
    MessageMeeting,
    has_flags,
    table_bytes,
)
from bigdl._base.errors import ConfigError
from bigdl._base.machine import core_ids, cores

if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bigdl._base.gang import Gang

__all__ = ["NOWHERE", "NoSharedMemoryError", "Place", "Room"]

_PAGE = 4096

# What a worker says when it comes to a call: call, dtype, elements, where they are, root.
_CARD = struct.Struct("=IIQqqq")
_CARD_BYTES = 64
_CALLS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier", "buffer")

#: (number of a buffer, offset in each worker's part of it)
Place = tuple[int, int]
#: The place of an array that lives in no buffer.
NOWHERE: Place = (-1, 0)


class NoSharedMemoryError(ConfigError):
    """This system has no memory that can be handed over without a name."""


class Room:
    """Shared by the workers of one host; all workers of the gang make one at the same time.

    Args:
        gang: The gang.
        group: The ranks that share this room.
        size: Bytes of memory for all, at ``base`` in ``memory``.
        timeout_s: How long to wait for workers that live but do not come.
        by_message: Meet by messages also where words in memory would do.

    Raises:
        NoSharedMemoryError: On some host of the gang this cannot be.
    """

    def __init__(
        self,
        gang: Gang,
        group: tuple[int, ...],
        size: int,
        *,
        timeout_s: float | None,
        by_message: bool,
    ) -> None:
        self._gang = gang
        self._group = group
        self._index = group.index(gang.rank)
        self._timeout_s = timeout_s
        self._links: dict[int, socket.socket] = {}
        self._segment: Segment | None = None
        self._meeting: Meeting | None = None
        self._buffers: list[tuple[weakref.ref[mmap.mmap], int, int]] = []
        self._turn = 0
        world = len(group)
        self._cards_at = _pages(table_bytes(world))
        #: Where the memory for all begins.
        self.base = self._cards_at + _pages(2 * world * _CARD_BYTES)
        try:
            facts = self._connect(self.base + size)
            self._view = memoryview(self.memory)
            self._meeting = self._make_meeting(facts, by_message)
        except BaseException:
            self.close()
            raise

    @property
    def memory(self) -> mmap.mmap:
        if self._segment is None:
            raise ConfigError("This room is closed.")
        return self._segment.map

    def _connect(self, size: int) -> list[tuple[list[int], int]]:
        """Link the group and hand it the memory; (cores, how many of them usable) of each."""
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        first = self._group[0]
        name, door = self._open() if self._index == 0 else (None, None)
        try:
            said = self._gang.share(json.dumps([name, core_ids(), cores()]).encode())
            cards = [json.loads(text) for text in said]
            if any(name == "" for name, _, _ in cards):
                raise NoSharedMemoryError(
                    "This system cannot hand memory over without a name (that takes Linux)."
                )
            if door is not None:
                self._links = accept_all(self._gang, door, self._group[1:], deadline)
            else:
                at = f"\0{cards[first][0]}"
                self._links = {first: reach(self._gang, first, socket.AF_UNIX, at, deadline)}
        finally:
            if door is not None:
                door.close()
        self._segment = self._make_segment(size, deadline)
        return [tuple(cards[rank][1:]) for rank in self._group]

    def _open(self) -> tuple[str, socket.socket | None]:
        """Listen under a random name that only lives in the kernel; "" if that cannot be."""
        if sys.platform != "linux" or not hasattr(os, "memfd_create"):
            return "", None
        name = f"bigdl-{self._gang.ticket.mark}-{secrets.token_hex(8)}"
        door = socket.socket(socket.AF_UNIX)
        try:
            door.bind(f"\0{name}")
            door.listen(len(self._group))
        except OSError:
            door.close()
            return "", None
        return name, door

    def _make_segment(self, size: int, deadline: float | None, *, stride: int = 0) -> Segment:
        is_first = self._index == 0
        return Segment.between(self._gang, self._links, is_first, size, deadline, stride=stride)

    def _make_meeting(self, facts: Sequence[tuple[list[int], int]], by_message: bool) -> Meeting:
        if by_message or not has_flags():
            return MessageMeeting(self._gang, self._group, self._links, timeout_s=self._timeout_s)
        together = len(set().union(*(ids for ids, _ in facts)))
        # a quota on the time of cores, which holds for all, is seen by each as fewer cores
        quotas = [usable for ids, usable in facts if usable < len(ids)]
        return FlagMeeting(
            self._gang,
            self._group,
            self._view[: table_bytes(len(self._group))],
            timeout_s=self._timeout_s,
            is_crowded=min([together, *quotas]) < len(self._group),
        )

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links = {}
        if self._meeting is not None:
            self._meeting.close()
            self._meeting = None
        if self._segment is not None:
            if hasattr(self, "_view"):
                self._view.release()
            self._segment.close()
            self._segment = None

    # --- coming to a call ---

    def meet(self, doing: str) -> None:
        """Return when all have come; what each wrote before is then visible to all."""
        if self._meeting is None:
            raise ConfigError("This room is closed.")
        self._meeting.meet(doing)

    def enter(
        self, call: str, flat: NDArray[Any] | None, place: Place = NOWHERE, root: int = -1
    ) -> bool:
        """Meet at the beginning of a call; whether all have their arrays in the same place.

        Raises:
            ConfigError: Another worker is in another call, or has another array.
        """
        self._turn ^= 1
        kind = 0 if flat is None else flat.itemsize << 8 | ord(flat.dtype.char)
        size = 0 if flat is None else flat.size
        mine = _CARD.pack(_CALLS.index(call), kind, size, *place, root)
        world, view = len(self._group), self._view
        start = self._cards_at + self._turn * world * _CARD_BYTES
        at = start + self._index * _CARD_BYTES
        view[at : at + _CARD.size] = mine
        self.meet(call)
        for at in range(start, start + world * _CARD_BYTES, _CARD_BYTES):
            if view[at : at + _CARD.size] != mine:
                break
        else:
            return True
        cards = [_CARD.unpack_from(view, start + index * _CARD_BYTES) for index in range(world)]
        for index, card in enumerate(cards):
            if card[:3] != cards[0][:3] or card[5] != cards[0][5]:
                raise ConfigError(
                    "Workers do not do the same: "
                    f"worker {self._group[0]} does {_said(cards[0])}, "
                    f"worker {self._group[index]} {_said(card)}."
                )
        return False

    # --- buffers ---

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """This worker's part of new memory, which goes when no array of it is left."""
        self.enter("buffer", None, NOWHERE, nbytes)
        stride = _pages(max(nbytes, 1))
        segment = self._make_segment(stride * len(self._group), None, stride=stride)
        self._buffers.append((weakref.ref(segment.map), segment.base, stride))
        return np.frombuffer(segment.map, np.uint8, nbytes, self._index * stride)

    def place(self, flat: NDArray[Any]) -> Place:
        """Where ``flat`` lives."""
        if not self._buffers:
            return NOWHERE
        address = flat.__array_interface__["data"][0]
        for number, (memory, base, stride) in enumerate(self._buffers):
            offset = address - base - self._index * stride
            if 0 <= offset <= stride - flat.nbytes and memory() is not None:
                return number, offset
        return NOWHERE

    def seats(self, flat: NDArray[Any], place: Place) -> list[NDArray[Any]]:
        """Every worker's array that is at ``place``."""
        memory, _, stride = self._buffers[place[0]]
        held = memory()
        if held is None:
            raise ConfigError("This buffer is gone.")
        return [
            np.frombuffer(held, flat.dtype, flat.size, index * stride + place[1])
            for index in range(len(self._group))
        ]


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _said(card: tuple[int, ...]) -> str:
    """A card in words."""
    call, kind, n, _, _, root = card
    if kind == 0:
        return f"{_CALLS[call]}({root} bytes)" if _CALLS[call] == "buffer" else _CALLS[call]
    array = f"{n} elements of {chr(kind & 0xFF)!r} ({kind >> 8} bytes each)"
    return f"{_CALLS[call]} of {array}" + (f" from {root}" if root >= 0 else "")
