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

from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.collective.arithmetic import BLOCK, add_in_order, split
from bigdl._base.collective.base import Collective, Compress
from bigdl._base.collective.room import NOWHERE, NoSharedMemoryError, Place, Room

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bigdl._base.gang import Gang

__all__ = ["NoSharedMemoryError", "SharedMemory"]

#: Largest piece that a worker adds up in a step; smaller where many workers need many boxes.
_PIECE_BYTES = 1 << 20
_PIECE_LEAST_BYTES = 1 << 14
_BOXES_BYTES = 1 << 26
#: While all workers' arrays are smaller than this, each adds up everything: more additions,
#: but half the meetings.
_SMALL_BYTES = 1 << 18


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
        self._owners = owners or self.world
        self._piece_bytes = min(
            _PIECE_BYTES,
            max(_PIECE_LEAST_BYTES, _BOXES_BYTES // (2 * self.world * self._owners)),
        )
        self._boxes_bytes = 2 * self.world * self._owners * self._piece_bytes
        size = self._boxes_bytes + 2 * self._owners * self._piece_bytes
        self._room = Room(gang, self._group, size, timeout_s=timeout_s, by_message=by_message)
        self._box_turn = 0
        self._sum_turn = 0
        self._areas: dict[np.dtype[Any], tuple[NDArray[Any], NDArray[Any]]] = {}
        self._spares: dict[np.dtype[Any], NDArray[Any]] = {}

    def parts(self, n: int) -> list[slice]:
        own = split(n, self._owners)
        return own + [slice(n, n)] * (self.world - self._owners)

    def close(self) -> None:
        super().close()
        self._areas = {}
        self._room.close()

    def _begin(
        self, call: str, flat: NDArray[Any], put_in: Callable[[], None], root: int = -1
    ) -> Place:
        """Come to a call on ``flat``; where it is worked on: in a buffer, or boxed.

        ``put_in`` puts this worker's first numbers into its box; it is called at once if they
        have to go there, and later if they have to because of another worker.
        """
        place = self._room.place(flat)
        if place == NOWHERE:
            put_in()
        if self._room.enter(call, flat, place, root):
            return place
        if place != NOWHERE:
            put_in()
        self._room.meet(self._doing)
        return NOWHERE

    # --- memory ---

    def _area(self, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The boxes (turn, worker, owner, element) and the sums (turn, owner, element)."""
        found = self._areas.get(dtype)
        if found is None:
            many = self._piece_bytes // dtype.itemsize
            boxes = (2, self.world, self._owners, many)
            sums = (2, self._owners, many)
            memory, at = self._room.memory, self._room.base
            end = at + self._boxes_bytes
            found = self._areas[dtype] = (
                np.frombuffer(memory, dtype, int(np.prod(boxes)), at).reshape(boxes),
                np.frombuffer(memory, dtype, int(np.prod(sums)), end).reshape(sums),
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

    # --- sums ---

    def _all_reduce(self, flat: NDArray[Any], compress: Compress) -> None:
        if flat.nbytes * self.world <= min(_SMALL_BYTES, self._owners * self._piece_bytes):
            self._all_reduce_small(flat)
            return
        pieces = self._pieces(flat.size, flat.itemsize)
        place = self._begin("all_reduce", flat, lambda: self._put_in(flat, pieces[0]))
        if place != NOWHERE:
            self._reduce_in_place(flat, place, is_for_all=True)
            return
        for step, piece in enumerate(pieces):
            self._reduce_boxed(flat, piece, is_for_all=True)
            if step + 1 < len(pieces):
                self._put_in(flat, pieces[step + 1])
            if step > 0:
                self._take_out(flat, pieces[step - 1], ago=1)
            self._room.meet(self._doing)
        self._take_out(flat, pieces[-1])

    def _all_reduce_small(self, flat: NDArray[Any]) -> None:
        """Every worker adds up everything: one meeting, and quicker than in a buffer, too."""
        boxes = self._area(flat.dtype)[0].reshape(2, self.world, -1)[:, :, : flat.size]
        self._box_turn ^= 1
        terms = boxes[self._box_turn]
        terms[self.rank] = flat
        self._room.enter("all_reduce", flat, NOWHERE)
        with np.errstate(over="ignore", invalid="ignore"):
            add_in_order(terms, flat)

    def _reduce_scatter(self, flat: NDArray[Any], compress: Compress) -> None:
        pieces = self._pieces(flat.size, flat.itemsize)
        place = self._begin("reduce_scatter", flat, lambda: self._put_in(flat, pieces[0]))
        if place != NOWHERE:
            self._reduce_in_place(flat, place, is_for_all=False)
            return
        for step, piece in enumerate(pieces):
            if step > 0:
                self._room.meet(self._doing)
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

    def _reduce_in_place(self, flat: NDArray[Any], place: Place, *, is_for_all: bool) -> None:
        """Add up this worker's part, block by block, into its own array or into all."""
        seats = self._room.seats(flat, place)
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
        self._room.meet(self._doing)

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
        if place != NOWHERE:
            if self.rank != root:
                flat[:] = self._room.seats(flat, place)[root]
            self._room.meet(self._doing)
            return
        for step, piece in enumerate(pieces):
            if self.rank != root:
                flat[piece] = sums[self._sum_turn, : piece.stop - piece.start]
            if step + 1 < len(pieces):
                put_in(step + 1)
                self._room.meet(self._doing)

    def _copy(self, doing: str, flat: NDArray[Any], pieces: list[list[slice]]) -> None:
        """Every owner lays out its part, step by step; everybody takes the others'."""
        sums = self._area(flat.dtype)[1]

        def lay_out(step: int = 0) -> None:
            self._sum_turn ^= 1
            if self.rank < self._owners:
                part = pieces[step][self.rank]
                sums[self._sum_turn, self.rank, : part.stop - part.start] = flat[part]

        place = self._begin(doing, flat, lay_out)
        if place != NOWHERE:
            for owner, (part, seat) in enumerate(
                zip(self.parts(flat.size), self._room.seats(flat, place), strict=True)
            ):
                if owner != self.rank:
                    flat[part] = seat[part]
            self._room.meet(self._doing)
            return
        for step, piece in enumerate(pieces):
            self._take_out(flat, piece)
            if step + 1 < len(pieces):
                lay_out(step + 1)
                self._room.meet(self._doing)

    def _barrier(self) -> None:
        self._room.enter("barrier", None)

    def _buffer(self, nbytes: int) -> NDArray[np.uint8]:
        return self._room.buffer(nbytes)
