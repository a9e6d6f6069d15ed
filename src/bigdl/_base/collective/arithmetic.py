"""What ranks own, and how their numbers are added: the same bits whoever does it, and when.

NumPy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["add_in_order", "from_bf16", "split", "to_bf16"]

#: Numbers worked on at a time where several passes are made over them: they stay in the cache.
BLOCK = 1 << 15


def split(n: int, among: int, *, start: int = 0) -> list[slice]:
    """Cut ``n`` elements into consecutive slices of nearly equal size, longer ones first.

    Args:
        n: How many elements; may be less than ``among``, some slices are empty then.
        among: How many slices.
        start: Where the first begins.
    """
    size, longer = divmod(n, among)
    slices = []
    for index in range(among):
        stop = start + size + (index < longer)
        slices.append(slice(start, stop))
        start = stop
    return slices


def add_in_order(
    terms: Sequence[NDArray[Any]], out: NDArray[Any], spare: NDArray[Any] | None = None
) -> None:
    """``out`` = ((terms[0] + terms[1]) + terms[2]) + …, in the terms' own precision.

    Args:
        terms: At least one.
        out: May be the memory of one of the terms.
        spare: Memory that is none of the terms', for the sums in between; only needed if
            ``out`` is the memory of any term but the first two.
    """
    if len(terms) == 1:
        np.copyto(out, terms[0])
        return
    between = out if spare is None else spare
    total = terms[0]
    for term in terms[1:-1]:
        total = np.add(total, term, out=between)
    np.add(total, terms[-1], out=out)


def to_bf16(numbers: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Round to the nearest bf16, ties to even, as its 16 bits. NaN stays NaN."""
    for start in range(0, numbers.size, BLOCK):
        block = numbers[start : start + BLOCK]
        bits = block.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        piece = out[start : start + BLOCK]
        np.copyto(piece, rounded, casting="same_kind")
        missing = np.isnan(block)
        if missing.any():  # rounding may have carried one over to infinity, or to zero
            piece[missing] = 0x7FC0


def from_bf16(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """The float32 numbers whose upper halves are ``bits``."""
    words = out.view(np.uint32)
    np.copyto(words, bits)
    words <<= 16
