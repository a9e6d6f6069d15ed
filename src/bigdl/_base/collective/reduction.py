"""One sum over links: what goes out, what comes in, and what is added up of it meanwhile.

NumPy only; it moves no bytes itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.collective.arithmetic import add_in_order, from_bf16, to_bf16

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Reduction", "Scratch"]

#: Bytes added up at a time, while more come in.
_BLOCK_BYTES = 1 << 18


class Scratch:
    """Memory that is kept from call to call: fresh memory costs more than the work done in it."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}

    def take(self, name: str, n: int, dtype: np.dtype[Any] | type) -> NDArray[Any]:
        """``n`` elements with undefined values; the same memory for the same ``name``."""
        dtype = np.dtype(dtype)
        held = self._held.get(name)
        if held is None or held.size < n * dtype.itemsize:
            held = self._held[name] = np.empty(n * dtype.itemsize, np.uint8)
        return held[: n * dtype.itemsize].view(dtype)


class Reduction:
    """The numbers of one sum.

    Compressed numbers travel as bf16; every rank's own are rounded as well, and so is the sum,
    so that all have the same bits.

    Args:
        flat: This rank's array, which becomes the sum.
        parts: Of ``flat``, by owner.
        rank: This rank.
        scratch: Memory to work in.
        is_compressed: Whether numbers travel as bf16.
    """

    def __init__(
        self,
        flat: NDArray[Any],
        parts: Sequence[slice],
        rank: int,
        scratch: Scratch,
        *,
        is_compressed: bool,
    ) -> None:
        self._flat = flat
        self._parts = parts
        self._rank = rank
        self._scratch = scratch
        self._is_compressed = is_compressed
        self._own = own = flat[parts[rank]]
        self._done = 0  # elements of the own part that are added up
        self._many = _BLOCK_BYTES // flat.itemsize
        self._spare = scratch.take("spare", self._many, flat.dtype)
        wire = np.dtype(np.uint16) if is_compressed else flat.dtype
        self._itemsize = wire.itemsize
        came = scratch.take("came", own.size * len(parts), wire)
        self._came = came.reshape(len(parts), own.size)
        self._outgoing, self._sums = flat, flat
        if is_compressed:
            self._outgoing = scratch.take("coded", flat.size, wire)
            self._sums = scratch.take("sums", flat.size, wire)
            self._plain = scratch.take("plain", self._many * len(parts), np.float32)
            to_bf16(flat, self._outgoing)
            self._came[rank] = self._outgoing[parts[rank]]

    def numbers_for(self, rank: int) -> NDArray[Any]:
        """What another rank adds up."""
        return self._outgoing[self._parts[rank]]

    def numbers_from(self, rank: int) -> NDArray[Any]:
        """Where another rank's numbers for the own part go."""
        return self._came[rank]

    def sums_from(self, rank: int) -> NDArray[Any]:
        """Where the sums of another rank's part go.

        That may be where the numbers are which that rank gets from here: a block of its sums is
        only made, and sent, once it has all numbers of the block.
        """
        return self._sums[self._parts[rank]]

    @property
    def is_done(self) -> bool:
        return self._done == self._own.size

    def add_up(self, come_bytes: int) -> list[NDArray[Any]]:
        """Add up every block whose numbers have come from all; what to send of the new ones."""
        come = min(max(0, come_bytes) // self._itemsize, self._own.size)
        blocks = []
        while self._done < come:
            block = slice(self._done, min(self._done + self._many, self._own.size))
            if block.stop > come:
                break
            blocks.append(self._add_block(block))
            self._done = block.stop
        return blocks

    def _add_block(self, block: slice) -> NDArray[Any]:
        own = self._own[block]
        terms = list(self._came[:, block])
        if self._is_compressed:
            terms = [self._decoded(rank, term) for rank, term in enumerate(terms)]
        else:
            terms[self._rank] = own
        with np.errstate(over="ignore", invalid="ignore"):
            add_in_order(terms, own, self._spare[: own.size])
        if not self._is_compressed:
            return own
        coded = self._sums[self._parts[self._rank]][block]
        to_bf16(own, coded)
        return coded

    def _decoded(self, rank: int, coded: NDArray[Any]) -> NDArray[Any]:
        plain = self._plain[rank * self._many :][: coded.size]
        from_bf16(coded, plain)
        return plain

    def open_sums(self) -> None:
        """Put compressed sums, the own one included, where they belong."""
        if self._is_compressed:
            from_bf16(self._sums, self._flat)
