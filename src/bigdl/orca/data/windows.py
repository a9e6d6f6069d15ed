"""Rows that lie in blocks, of which only some fit into memory: in which order they are met.

Shuffled, blocks are put in order, some of them are read together, and the rows of that window
are put in order. Where windows end follows from the blocks alone, so the order is the same on
every machine and for any number of workers. What fits into one window has the order of rows in
memory. NumPy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bigdl._base.trees import concat
from bigdl.orca.data.contract import Batch, part
from bigdl.orca.data.order import Order, Permutation, check_start
from bigdl.orca.data.packed import Packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bigdl._base.trees import Tree
    from bigdl.orca.data.memory import Shaping

__all__ = ["WINDOW_BYTES", "WindowReader", "Windows", "runs"]

#: Bytes of blocks that are shuffled together; of files, as they are before compression.
WINDOW_BYTES = 128 << 20


class Windows:
    """Where the rows of an epoch are: blocks in order, cut into windows of some bytes.

    Args:
        blocks: Shape (n, 4): number of file or shard, number of the block in it, rows, bytes.
        window_bytes: Of blocks that are read together.
        seed: Of the order; None for rows as they are.
        epoch: Orders differ by it.
    """

    def __init__(
        self, blocks: np.ndarray, window_bytes: int, seed: int | None, epoch: int
    ) -> None:
        self._seed, self._epoch = seed, epoch
        self._entered: tuple[int, Order] | None = None
        if seed is not None:
            blocks = blocks[Permutation(len(blocks), seed, epoch)[:]]
        self._blocks = runs(blocks, window_bytes)
        #: First place of each window, and the number of rows.
        self._places = np.cumsum([0, *(int(one[:, 2].sum()) for one in self._blocks)])

    def blocks_of(self, number: int) -> np.ndarray:
        """The window's blocks as they are read: by file and place."""
        blocks = self._blocks[number]
        return blocks[np.lexsort((blocks[:, 1], blocks[:, 0]))]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, slice | np.ndarray]]:
        """Places of the epoch as windows, with the rows of each."""
        number = int(np.searchsorted(self._places, start, side="right")) - 1
        while start < stop:
            first, end = int(self._places[number]), int(self._places[number + 1])
            last = min(stop, end)
            if self._entered is None or self._entered[0] != number:
                key = (self._epoch, number) if len(self._blocks) > 1 else (self._epoch,)
                self._entered = number, Order(end - first, self._seed, *key)
            yield number, self._entered[1][start - first : last - first]
            start, number = last, number + 1


class WindowReader:
    """One rank's rows, out of one window of blocks at a time; the last one stays in memory.

    Args:
        rank: Whose.
        world: Of how many.
        blocks: As for ``Windows``.
        window_bytes: Of blocks that are read together.
        shaping: What is done to each batch.
        read: The rows of some blocks, in the order of the blocks and in any number of pieces.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        blocks: np.ndarray,
        window_bytes: int,
        shaping: Shaping,
        read: Callable[[np.ndarray], Iterable[Tree]],
    ) -> None:
        self._rank, self._world = rank, world
        self._blocks, self._window_bytes = blocks, window_bytes
        self._shaping, self._read = shaping, read
        self._held: tuple[bytes, Packed] | None = None
        self._iterating = 0

    def batches(
        self, size: int, *, epoch: int = 0, seed: int | None = None, start: int = 0
    ) -> Iterator[Batch]:
        """This rank's part of each global batch; see ``Reader.batches``."""
        rows = int(self._blocks[:, 2].sum())
        check_start(start, rows)
        windows = Windows(self._blocks, self._window_bytes, seed, epoch)
        self._iterating += 1
        try:
            yield from self._batches(windows, range(start, rows, size), rows)
        finally:
            self._iterating -= 1

    def _batches(self, windows: Windows, starts: range, rows: int) -> Iterator[Batch]:
        entered, window, size = -1, None, starts.step
        for first in starts:
            total = min(size, rows - first)
            here, there = part(total, self._rank, self._world)
            if here == there:
                yield Batch(None, 0, total)
                continue
            pieces = []
            for number, which in windows.pieces(first + here, first + there):
                if window is None or number != entered:
                    window = None  # let go of the last one before the next is read
                    entered, window = number, self._window(windows.blocks_of(number))
                pieces.append(window[which])
            data = pieces[0] if len(pieces) == 1 else concat(pieces)
            yield Batch(self._shaping(data, there - here), there - here, total)

    def _window(self, blocks: np.ndarray) -> Packed:
        key = blocks.tobytes()
        if self._held is None or self._held[0] != key:
            # its memory serves again, unless another iterator still takes rows from it
            spare = self._held[1] if self._held is not None and self._iterating == 1 else None
            self._held = None  # before the next is read
            self._held = key, Packed(self._read(blocks), int(blocks[:, 2].sum()), spare)
        return self._held[1]

    def close(self) -> None:
        """Let go of the rows that are held."""
        self._held = None


def runs(blocks: np.ndarray, most_bytes: int) -> list[np.ndarray]:
    """Neighbouring blocks together, at most so many bytes or one block; at least one run."""
    blocks = blocks[blocks[:, 2] > 0]
    bounds, held = [0], 0
    for i, size in enumerate(blocks[:, 3].tolist()):
        if held and held + size > most_bytes:
            bounds.append(i)
            held = 0
        held += size
    return [blocks[i:j] for i, j in zip(bounds, [*bounds[1:], len(blocks)], strict=True)]
