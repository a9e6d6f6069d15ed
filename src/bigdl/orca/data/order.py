"""In which order rows are met: a keyed permutation that is known at any place without a table.

The permutation is a Feistel network on the bits that ``rows`` needs; what falls outside is sent
through again until it falls inside (cycle walking, less than twice on average). NumPy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from bigdl._base.errors import ConfigError, DataError
from bigdl._base.rows import check_start

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MOST_ROWS", "Order", "Permutation", "check_start"]

#: More rows than this are not ordered.
MOST_ROWS = 1 << 62

# Rounds come in pairs. Few bits are mixed slowly: small tables get as many as make all orders
# equally likely, which a chi-square test watches.
_PAIRS = 3
_PAIRS_OF_SMALL = 12
_SMALL_BITS = 12
_CHUNK = 1 << 14  # what the working arrays of one pass hold stays in the processor's cache
_AHEAD = 1 << 14  # small calls cost as much as this many places do
_Words: TypeAlias = "npt.NDArray[np.uint32] | npt.NDArray[np.uint64]"

# Multipliers and shifts of two finalisers that mix well: of MurmurHash3 for 32 bits (Appleby),
# of SplitMix64 for 64 (Steele, Lea, Flood 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


class Permutation:
    """A bijection of ``range(rows)``, the same on every machine for the same key.

    Args:
        rows: Size, 0 to 2**62.
        key: Whole numbers that choose the permutation: seed, epoch, ….

    Raises:
        ConfigError: ``rows`` is out of range.
    """

    def __init__(self, rows: int, *key: int) -> None:
        if not 0 <= rows <= MOST_ROWS:
            raise ConfigError(f"rows={rows} cannot be put in an order (need 0 to 2**62).")
        self.rows = rows
        bits = max(2, (rows - 1).bit_length())
        kind = self._kind = np.uint32 if bits < 32 else np.uint64
        self._low = kind(bits - bits // 2)
        self._low_mask = kind((1 << (bits - bits // 2)) - 1)
        self._high_mask = kind((1 << (bits // 2)) - 1)
        words = _words(rows, key, 2 * (_PAIRS_OF_SMALL if bits <= _SMALL_BITS else _PAIRS))
        most = int(np.iinfo(kind).max)
        pairs = zip(words[::2], words[1::2], strict=True)
        self._keys = [(kind(one & most), kind(other & most)) for one, other in pairs]
        self._hash = _mixed_32 if kind is np.uint32 else _mixed_64

    def rows_at(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The rows that stand at ``positions``, each in ``range(rows)``. Shape (n,) both."""
        return self._walked(positions, self._forward)

    def positions_of(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Where ``rows`` stand: the inverse of ``rows_at``."""
        return self._walked(rows, self._backward)

    def __getitem__(self, span: slice) -> npt.NDArray[np.int64]:
        """The rows at positions ``start`` up to ``stop``."""
        return self.rows_at(np.arange(*span.indices(self.rows), dtype=np.int64))

    def _walked(
        self, values: npt.ArrayLike, step: Callable[[_Words], _Words]
    ) -> npt.NDArray[np.int64]:
        given = np.asarray(values, dtype=np.int64)
        if given.size and (given.min() < 0 or given.max() >= self.rows):
            raise DataError(f"No such row: of {self.rows}, {given.min()} to {given.max()} asked.")
        out = np.empty(given.shape, dtype=np.int64)
        for first in range(0, len(given), _CHUNK):
            span = slice(first, first + _CHUNK)
            words: Any = step(cast("_Words", given[span].astype(self._kind)))
            outside = np.flatnonzero(words >= self.rows)
            while outside.size:
                words[outside] = again = step(words[outside])
                outside = outside[again >= self.rows]
            out[span] = words
        return out

    def _forward(self, words: _Words) -> _Words:
        high, low = words >> self._low, words & self._low_mask
        for key in self._keys:
            high ^= self._hash(low, key[0]) & self._high_mask
            low ^= self._hash(high, key[1]) & self._low_mask
        return (high << self._low) | low

    def _backward(self, words: _Words) -> _Words:
        high, low = words >> self._low, words & self._low_mask
        for key in reversed(self._keys):
            low ^= self._hash(high, key[1]) & self._low_mask
            high ^= self._hash(low, key[0]) & self._high_mask
        return (high << self._low) | low


def _mixed_32(words: _Words, key: np.unsignedinteger) -> _Words:
    """A hash of each word. Its upper half, which depends on all bits, comes down."""
    mixed = words + key
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed >>= np.uint32(16)
    return mixed


def _mixed_64(words: _Words, key: np.unsignedinteger) -> _Words:
    """The same for words of 64 bits."""
    mixed = words + key
    mixed *= np.uint64(_MIX_1)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(_MIX_2)
    mixed >>= np.uint64(32)
    return mixed


def _words(rows: int, key: tuple[int, ...], count: int) -> list[int]:
    """``count`` words of 64 bits out of the size and the whole key."""
    state = _finalised(rows)
    for one in key:
        number = int(one)
        while True:  # numbers of any size and sign
            state = _finalised(state ^ (number & _WORD))
            number >>= 64
            if number in (0, -1):
                break
        state = _finalised(state + (number & 1))
    return [_finalised(state + (i + 1) * _GOLDEN) for i in range(count)]


def _finalised(number: int) -> int:
    number = (number + _GOLDEN) & _WORD
    number = ((number ^ (number >> 30)) * _MIX_1) & _WORD
    number = ((number ^ (number >> 27)) * _MIX_2) & _WORD
    return number ^ (number >> 31)


class Order:
    """In which order an epoch's rows are met. For one reader: it looks ahead.

    Args:
        rows: Rows in the epoch.
        seed: Of the order; None for rows as they are.
        key: Further whole numbers that choose the order: the epoch, ….
    """

    def __init__(self, rows: int, seed: int | None, *key: int) -> None:
        self._permutation = None if seed is None else Permutation(rows, seed, *key)
        self._first = 0
        self._ahead: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, span: slice) -> slice | npt.NDArray[np.int64]:
        """Which rows are met at places ``start`` up to ``stop``.

        Returns:
            A slice where rows are taken as they are, else the rows' numbers.
        """
        if self._permutation is None:
            return span
        start, stop = span.start, span.stop
        if start < self._first or stop > self._first + len(self._ahead):
            self._first = start
            self._ahead = self._permutation[start : max(stop, start + _AHEAD)]
        return self._ahead[start - self._first : stop - self._first]
