"""Workers on one host combine arrays in memory that they share.

Standard library and NumPy only. The memory has no name: it is handed from process to process as
an open file, so there is nothing to unlink and nothing is left however a worker ends; and its
size has nothing to do with that of /dev/shm.

Arrays that live in a ``buffer`` are combined where they are. Others pass through a *box* per
worker, in steps of a size that stays in the cache; in each step a worker adds up its part of
this step, puts in its numbers for the next and takes out the sums of the last, so that one
meeting a step is enough.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.collective.arithmetic import BLOCK, add_in_order, split
from bigdl._base.collective.base import Collective, Compress
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
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bigdl._base.gang import Gang

__all__ = ["NoSharedMemoryError", "SharedMemory"]

_PAGE = 4096
#: Largest piece that a worker adds up in a step; smaller where many workers need many boxes.
_PIECE_BYTES = 1 << 18
_PIECE_LEAST_BYTES = 1 << 14
_BOXES_BYTES = 1 << 26
#: While all workers' arrays are smaller than this, each adds up everything: more additions,
#: but half the meetings.
_SMALL_BYTES = 1 << 18

# What a worker says when it comes to a call: call, dtype, elements, segment and offset (-1 =
# passes through the box), root.
_CARD = struct.Struct("=IIQqqq")
_CARD_BYTES = 64
_CALLS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier", "buffer")
_BOXED = (-1, 0)


class NoSharedMemoryError(ConfigError):
    """This system has no memory that can be handed over without a name."""


class SharedMemory(Collective):
    """The collective of workers that share memory.

    Args:
        gang: The gang; all its workers have to make one of these.
        group: The ranks that share memory with this one; None = all.
        owners: How many of the group own parts; None = all, else the first so many.
        timeout_s: How long to wait for workers that live but do not come.
        by_message: Meet by messages also where words in memory would do.
    """

    kind = "shared"

    def __init__(
        self,
        gang: Gang,
        group: tuple[int, ...] | None = None,
        *,
        owners: int | None = None,
        timeout_s: float | None = 600.0,
        by_message: bool = False,
    ) -> None:
        super().__init__(gang, group or tuple(range(gang.world)), timeout_s=timeout_s)
        self._gang: Gang = gang
        self._owners = owners or self.world
        self._piece_bytes = min(
            _PIECE_BYTES,
            max(_PIECE_LEAST_BYTES, _BOXES_BYTES // (2 * self.world * self._owners)),
        )
        self._uses_flags = has_flags() and not by_message
        self._links: dict[int, socket.socket] = {}
        self._segments: list[Segment] = []
        try:
            self._connect()
        except BaseException:
            self.close()
            raise
        self._box_turn = 0
        self._sum_turn = 0
        self._card_turn = 0
        self._areas: dict[np.dtype[Any], tuple[NDArray[Any], NDArray[Any]]] = {}
        self._spares: dict[np.dtype[Any], NDArray[Any]] = {}

    def parts(self, n: int) -> list[slice]:
        own = split(n, self._owners)
        return own + [slice(n, n)] * (self.world - self._owners)

    # --- setting up ---

    def _connect(self) -> None:
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        first = self._group[0]
        place, door = self._open() if self.rank == 0 else (None, None)
        try:
            said = self._gang.share(json.dumps([place, core_ids(), cores()]).encode())
            cards = [json.loads(text) for text in said]
            if any(place == "" for place, _, _ in cards):
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
        owners, world, piece = self._owners, self.world, self._piece_bytes
        self._cards_at = _pages(table_bytes(world))
        self._boxes_at = self._cards_at + _pages(2 * world * _CARD_BYTES)
        self._sums_at = self._boxes_at + 2 * world * owners * piece
        size = self._sums_at + 2 * owners * piece
        segment = Segment.between(self._gang, self._links, self.rank == 0, size, deadline)
        self._segments.append(segment)
        self._memory = memoryview(segment.map)
        self._meeting = self._make_meeting([cards[rank] for rank in self._group])

    def _open(self) -> tuple[str, socket.socket | None]:
        """Listen under a random name that only lives in the kernel; "" if that cannot be."""
        if sys.platform != "linux" or not hasattr(os, "memfd_create"):
            return "", None
        name = f"bigdl-{self._gang.ticket.mark}-{secrets.token_hex(8)}"
        door = socket.socket(socket.AF_UNIX)
        try:
            door.bind(f"\0{name}")
            door.listen(self.world)
        except OSError:
            door.close()
            return "", None
        return name, door

    def _make_meeting(self, cards: Sequence[tuple[str, list[int], int]]) -> Meeting:
        if not self._uses_flags:
            return MessageMeeting(self._gang, self._group, self._links, timeout_s=self._timeout_s)
        together = len(set().union(*(ids for _, ids, _ in cards)))
        # a quota on the time of cores, which holds for all, is seen by each as fewer cores
        quotas = [usable for _, ids, usable in cards if usable < len(ids)]
        return FlagMeeting(
            self._gang,
            self._group,
            self._memory[: table_bytes(self.world)],
            timeout_s=self._timeout_s,
            is_crowded=min([together, *quotas]) < self.world,
        )

    def close(self) -> None:
        super().close()
        for link in self._links.values():
            link.close()
        self._links = {}
        if hasattr(self, "_meeting"):
            self._meeting.close()
            del self._meeting
        if hasattr(self, "_memory"):
            self._areas = {}
            self._memory.release()
            del self._memory
        for segment in self._segments:
            segment.close()
        self._segments = []

    # --- coming to a call ---

    def _place(self, flat: NDArray[Any]) -> tuple[int, int]:
        """(segment, offset in this worker's part of it) if ``flat`` lives in a buffer."""
        if len(self._segments) > 1:
            address = flat.__array_interface__["data"][0]
            for number, segment in enumerate(self._segments[1:], 1):
                offset = address - segment.base - self.rank * segment.stride
                if offset >= 0 and offset + flat.nbytes <= segment.stride:
                    return number, offset
        return _BOXED

    def _enter(
        self, call: str, flat: NDArray[Any] | None, place: tuple[int, int], root: int = -1
    ) -> bool:
        """Meet the others; whether all have come with the same card.

        Raises:
            ConfigError: Another worker is in another call, or has another array.
        """
        self._card_turn ^= 1
        kind = 0 if flat is None else flat.itemsize << 8 | ord(flat.dtype.char)
        size = 0 if flat is None else flat.size
        mine = _CARD.pack(_CALLS.index(call), kind, size, *place, root)
        start = self._cards_at + self._card_turn * self.world * _CARD_BYTES
        at = start + self.rank * _CARD_BYTES
        memory = self._memory
        memory[at : at + _CARD.size] = mine
        self._meeting.meet(self._doing)
        for at in range(start, start + self.world * _CARD_BYTES, _CARD_BYTES):
            if memory[at : at + _CARD.size] != mine:
                break
        else:
            return True
        cards = [
            _CARD.unpack_from(memory, start + rank * _CARD_BYTES) for rank in range(self.world)
        ]
        for rank, card in enumerate(cards):
            if card[:3] != cards[0][:3] or card[5] != cards[0][5]:
                raise ConfigError(
                    "Workers do not do the same: "
                    f"worker {self._group[0]} does {_said(cards[0])}, "
                    f"worker {self._group[rank]} {_said(card)}."
                )
        return False

    def _begin(
        self, call: str, flat: NDArray[Any], put_in: Callable[[], None], root: int = -1
    ) -> tuple[int, int]:
        """Come to a call on ``flat``; where it is worked on: in a buffer, or boxed.

        ``put_in`` puts this worker's first numbers into its box; it is called at once if they
        have to go there, and later if they have to because of another worker.
        """
        place = self._place(flat)
        if place == _BOXED:
            put_in()
        if self._enter(call, flat, place, root):
            return place
        if place != _BOXED:
            put_in()
        self._meeting.meet(self._doing)
        return _BOXED

    # --- memory ---

    def _area(self, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The boxes (turn, worker, owner, element) and the sums (turn, owner, element)."""
        found = self._areas.get(dtype)
        if found is None:
            many = self._piece_bytes // dtype.itemsize
            boxes = (2, self.world, self._owners, many)
            sums = (2, self._owners, many)
            memory = self._segments[0].map
            found = self._areas[dtype] = (
                np.frombuffer(memory, dtype, int(np.prod(boxes)), self._boxes_at).reshape(boxes),
                np.frombuffer(memory, dtype, int(np.prod(sums)), self._sums_at).reshape(sums),
            )
        return found

    def _spare(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        found = self._spares.get(dtype)
        if found is None:
            found = self._spares[dtype] = np.empty(self._piece_bytes // dtype.itemsize, dtype)
        return found

    def _pieces(self, n: int, itemsize: int) -> list[list[slice]]:
        """For each step, the slice of each owner's part that it deals with."""
        many = self._piece_bytes // itemsize
        parts = self.parts(n)[: self._owners]
        longest = max(part.stop - part.start for part in parts)
        return [
            [
                slice(min(part.start + done, part.stop), min(part.start + done + many, part.stop))
                for part in parts
            ]
            for done in range(0, max(longest, 1), many)
        ]

    def _buffer(self, nbytes: int) -> NDArray[np.uint8]:
        self._enter("buffer", None, _BOXED, nbytes)
        if nbytes == 0:
            return np.zeros(0, np.uint8)
        stride = _pages(nbytes)
        first = self.rank == 0
        size = stride * self.world
        segment = Segment.between(self._gang, self._links, first, size, None, stride=stride)
        self._segments.append(segment)
        return np.frombuffer(segment.map, np.uint8, nbytes, self.rank * stride)

    def _seats(self, flat: NDArray[Any], place: tuple[int, int]) -> list[NDArray[Any]]:
        """Every worker's array, where it lives in a buffer."""
        segment = self._segments[place[0]]
        return [
            np.frombuffer(segment.map, flat.dtype, flat.size, rank * segment.stride + place[1])
            for rank in range(self.world)
        ]

    # --- sums ---

    def _all_reduce(self, flat: NDArray[Any], compress: Compress) -> None:
        if flat.nbytes * self.world <= min(_SMALL_BYTES, self._owners * self._piece_bytes):
            self._all_reduce_small(flat)
            return
        pieces = self._pieces(flat.size, flat.itemsize)
        place = self._begin("all_reduce", flat, lambda: self._put_in(flat, pieces[0]))
        if place != _BOXED:
            self._reduce_in_place(flat, place, is_for_all=True)
            return
        for step, piece in enumerate(pieces):
            self._reduce_boxed(flat, piece, is_for_all=True)
            if step + 1 < len(pieces):
                self._put_in(flat, pieces[step + 1])
            if step > 0:
                self._take_out(flat, pieces[step - 1], ago=1)
            self._meeting.meet(self._doing)
        self._take_out(flat, pieces[-1])

    def _all_reduce_small(self, flat: NDArray[Any]) -> None:
        """Every worker adds up everything: one meeting, unless it is in a buffer."""
        n = flat.size
        boxes = self._area(flat.dtype)[0].reshape(2, self.world, -1)

        def put_in() -> None:
            self._box_turn ^= 1
            boxes[self._box_turn, self.rank, :n] = flat

        place = self._begin("all_reduce", flat, put_in)
        if place != _BOXED:
            self._reduce_in_place(flat, place, is_for_all=True)
            return
        with np.errstate(over="ignore", invalid="ignore"):
            add_in_order(list(boxes[self._box_turn, :, :n]), flat)

    def _reduce_scatter(self, flat: NDArray[Any], compress: Compress) -> None:
        pieces = self._pieces(flat.size, flat.itemsize)
        place = self._begin("reduce_scatter", flat, lambda: self._put_in(flat, pieces[0]))
        if place != _BOXED:
            self._reduce_in_place(flat, place, is_for_all=False)
            return
        for step, piece in enumerate(pieces):
            if step > 0:
                self._meeting.meet(self._doing)
            self._reduce_boxed(flat, piece, is_for_all=False)
            if step + 1 < len(pieces):
                self._put_in(flat, pieces[step + 1])

    def _put_in(self, flat: NDArray[Any], piece: Sequence[slice]) -> None:
        """Put what others will add up into this worker's box."""
        self._box_turn ^= 1
        box = self._area(flat.dtype)[0][self._box_turn, self.rank]
        for owner, part in enumerate(piece):
            if owner != self.rank:
                box[owner, : part.stop - part.start] = flat[part]

    def _reduce_boxed(
        self, flat: NDArray[Any], piece: Sequence[slice], *, is_for_all: bool
    ) -> None:
        """Add up this worker's part of a step, and lay it out for all if they need it."""
        self._sum_turn ^= 1
        if self.rank >= self._owners:
            return
        boxes, sums = self._area(flat.dtype)
        own = flat[piece[self.rank]]
        n = own.size
        terms = list(boxes[self._box_turn, :, self.rank, :n])
        terms[self.rank] = own
        with np.errstate(over="ignore", invalid="ignore"):
            add_in_order(terms, own, self._spare(flat.dtype)[:n])
        if is_for_all:
            sums[self._sum_turn, self.rank, :n] = own

    def _take_out(self, flat: NDArray[Any], piece: Sequence[slice], *, ago: int = 0) -> None:
        """Take what others laid out, in this step or in the one before it."""
        sums = self._area(flat.dtype)[1][self._sum_turn ^ ago]
        for owner, part in enumerate(piece):
            if owner != self.rank:
                flat[part] = sums[owner, : part.stop - part.start]

    def _reduce_in_place(
        self, flat: NDArray[Any], place: tuple[int, int], *, is_for_all: bool
    ) -> None:
        """Add up this worker's part, block by block, into its own array or into all."""
        seats = self._seats(flat, place)
        part = self.part(flat.size)
        spare = self._spare(flat.dtype)
        many = min(BLOCK, spare.size)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(part.start, part.stop, many):
                terms = [seat[start : min(start + many, part.stop)] for seat in seats]
                own = terms[self.rank]
                add_in_order(terms, own, spare[: own.size])
                if is_for_all:
                    for term in terms:
                        if term is not own:
                            np.copyto(term, own)
        self._meeting.meet(self._doing)

    # --- copies ---

    def _all_gather(self, flat: NDArray[Any]) -> None:
        self._copy("all_gather", flat, self._pieces(flat.size, flat.itemsize))

    def _broadcast(self, flat: NDArray[Any], root: int) -> None:
        many = self._owners * (self._piece_bytes // flat.itemsize)
        pieces = [
            slice(start, min(start + many, flat.size)) for start in range(0, flat.size, many)
        ]
        sums = self._area(flat.dtype)[1].reshape(2, -1)

        def put_in(step: int = 0) -> None:
            self._sum_turn ^= 1
            if self.rank == root and pieces:
                piece = pieces[step]
                sums[self._sum_turn, : piece.stop - piece.start] = flat[piece]

        place = self._begin("broadcast", flat, put_in, root)
        if place != _BOXED:
            if self.rank != root:
                flat[:] = self._seats(flat, place)[root]
            self._meeting.meet(self._doing)
            return
        for step, piece in enumerate(pieces):
            if self.rank != root:
                flat[piece] = sums[self._sum_turn, : piece.stop - piece.start]
            if step + 1 < len(pieces):
                put_in(step + 1)
                self._meeting.meet(self._doing)

    def _copy(self, doing: str, flat: NDArray[Any], pieces: list[list[slice]]) -> None:
        """Every owner lays out its part, step by step; everybody takes the others'."""
        sums = self._area(flat.dtype)[1]

        def lay_out(step: int = 0) -> None:
            self._sum_turn ^= 1
            if self.rank < self._owners:
                part = pieces[step][self.rank]
                sums[self._sum_turn, self.rank, : part.stop - part.start] = flat[part]

        place = self._begin(doing, flat, lay_out)
        if place != _BOXED:
            for owner, (part, seat) in enumerate(
                zip(self.parts(flat.size), self._seats(flat, place), strict=True)
            ):
                if owner != self.rank:
                    flat[part] = seat[part]
            self._meeting.meet(self._doing)
            return
        for step, piece in enumerate(pieces):
            self._take_out(flat, piece)
            if step + 1 < len(pieces):
                lay_out(step + 1)
                self._meeting.meet(self._doing)

    def _barrier(self) -> None:
        self._enter("barrier", None, _BOXED)


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _said(card: tuple[int, ...]) -> str:
    """A card in words."""
    call, kind, n, _, _, root = card
    if kind == 0:
        return f"{_CALLS[call]}({root} bytes)" if _CALLS[call] == "buffer" else _CALLS[call]
    array = f"{n} elements of {chr(kind & 0xFF)!r} ({kind >> 8} bytes each)"
    return f"{_CALLS[call]} of {array}" + (f" from {root}" if root >= 0 else "")
