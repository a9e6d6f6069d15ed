"""Rows that are taken out of order, laid out so that a row is one place in memory. NumPy only.

A table keeps each column apart: a shuffled batch of eleven columns then goes to memory eleven
times a row, and nearly each time to a place that no cache holds. Here narrow columns lie side by
side in one record a row; a batch takes whole records, which fit the cache, and splits those.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bigdl._base.trees import concat, filler, leaves, map_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bigdl._base.trees import Tree

__all__ = ["Packed", "batch_of"]

#: Bytes of a column's row up to which it lies beside others: two lines of a cache. A wider one
#: costs as much to copy twice as a place of its own saves.
_NARROW = 128
_ALIGNMENT = 8
#: One piece is copied for so many narrow columns, and up to so many bytes: it may be of memory
#: that other workers share.
_WORTH_COLUMNS = 3
_WORTH_BYTES = 1 << 28
#: One part in so many of room beyond the rows, for who comes next; untouched, it costs nothing.
_SLACK = 16


class Packed:
    """Rows of a nest of arrays, in memory of their own.

    Args:
        pieces: Nests of one structure with the rows in order, at least one; each may be let go
            once the next is asked for. Leaves are NumPy arrays, of one type and shape of row in
            all pieces, else all pieces are held until they are put together.
        rows: How many they have together.
        spare: Rows of the same structure that nobody asks for any more: their memory is used
            again where it serves, which saves the system from clearing as much anew.
    """

    def __init__(self, pieces: Iterable[Tree], rows: int, spare: Packed | None = None) -> None:
        self._rows = rows
        pieces = iter(pieces)
        first = next(pieces)
        second = next(pieces, None)
        self._layout: _Layout | None = None
        self._whole: Tree = None
        if second is None and not _is_worth_packing(first):
            self._whole = first
            return
        waiting = [first] if second is None else [first, second]
        room = None if spare is None else spare._layout
        if room is None or room.rows < rows or not room.fits(first):
            room = _Layout(first, rows + rows // _SLACK)
        layout, at = room, 0
        del first, second, spare, room
        for piece in itertools.chain(_emptied(waiting), pieces):
            if not layout.fits(piece):
                done = [layout.rows_of(slice(0, at))] if at else []
                self._whole = concat([*done, piece, *_emptied(waiting), *pieces])
                return
            at = layout.put(piece, at)
        self._layout = layout

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, which: slice | np.ndarray) -> Tree:
        """A nest of some rows, in memory of their own."""
        if self._layout is None:
            return batch_of(self._whole, which)
        return self._layout.rows_of(which)


class _Layout:
    """Where each leaf of a nest has its values.

    Args:
        like: A nest; its leaves tell types and shapes of rows.
        rows: For how many there is to be room.
    """

    def __init__(self, like: Tree, rows: int) -> None:
        self._fill = filler(like)
        #: For how many there is room.
        self.rows = rows
        found = leaves(like)
        self._kinds = [_kind(leaf) for leaf in found]
        if None in self._kinds:  # nothing fits
            found = []
        narrow = [i for i, leaf in enumerate(found) if _is_narrow(leaf)]
        narrow = narrow if len(narrow) > 1 else []
        # widest numbers first, so that each lies where its type wants to lie
        narrow.sort(key=lambda i: -found[i].dtype.itemsize)
        fields: dict[str, Any] = {"names": [], "formats": [], "offsets": [], "itemsize": 0}
        for i in narrow:
            kind = np.dtype((found[i].dtype, found[i].shape[1:]))
            fields["names"].append(str(i))
            fields["formats"].append(kind)
            fields["offsets"].append(fields["itemsize"])
            fields["itemsize"] += kind.itemsize
        fields["itemsize"] = -(-fields["itemsize"] // _ALIGNMENT) * _ALIGNMENT
        records: Any = np.dtype(cast("Any", fields))
        self._records: Any = np.empty(rows, records) if narrow else None
        self._alone = {
            i: np.empty((rows, *leaf.shape[1:]), leaf.dtype)
            for i, leaf in enumerate(found)
            if i not in narrow
        }

    def fits(self, piece: Tree) -> bool:
        """Whether rows of this nest can be put beside the others as they are."""
        kinds = [_kind(leaf) for leaf in leaves(piece)]
        return None not in kinds and kinds == self._kinds

    def put(self, piece: Tree, at: int) -> int:
        """Copy rows in, from place ``at`` on; the place after them."""
        found = leaves(piece)
        after = at + (len(found[0]) if found else 0)
        for i, leaf in enumerate(found):
            if i in self._alone:
                self._alone[i][at:after] = leaf
            elif self._records is not None:
                self._records[str(i)][at:after] = leaf
        return after

    def rows_of(self, which: slice | np.ndarray) -> Tree:
        """A nest of some rows, in memory of their own."""
        records = self._records
        if records is not None:
            records = records[which] if isinstance(which, slice) else records.take(which)
        return self._fill(
            _copied(self._alone[i], which)
            if records is None or i in self._alone
            else records[str(i)].copy()
            for i in range(len(self._kinds))
        )


def batch_of(data: Tree, which: slice | np.ndarray) -> Tree:
    """Rows of every array, in memory of their own."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return _copied(np.asarray(leaf), which)  # a mapped file's rows become plain arrays
        return leaf[which].clone() if isinstance(which, slice) else leaf[which]

    return map_leaves(copied, data)


def _copied(array: np.ndarray, which: slice | np.ndarray) -> np.ndarray:
    return array[which].copy() if isinstance(which, slice) else array.take(which, axis=0)


def _emptied(waiting: list[Tree]) -> Iterator[Tree]:
    """Each, which is then no longer held here."""
    while waiting:
        yield waiting.pop(0)


def _is_worth_packing(data: Tree) -> bool:
    """Whether rows that lie in one piece are better laid out anew than taken from there."""
    found = leaves(data)
    if not all(isinstance(leaf, np.ndarray) for leaf in found):
        return False
    return (
        sum(map(_is_narrow, found)) >= _WORTH_COLUMNS
        and sum(leaf.nbytes for leaf in found) <= _WORTH_BYTES
    )


def _kind(leaf: Any) -> tuple[np.dtype, tuple[int, ...]] | None:
    """Type and shape of a row; None for what is no array of NumPy's."""
    return (leaf.dtype, leaf.shape[1:]) if isinstance(leaf, np.ndarray) else None


def _is_narrow(leaf: np.ndarray) -> bool:
    return (
        leaf.ndim > 0
        and not leaf.dtype.hasobject
        and 0 < leaf.dtype.itemsize * int(np.prod(leaf.shape[1:])) <= _NARROW
    )
