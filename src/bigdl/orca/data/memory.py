"""Rows that lie in memory as a nest of arrays: cut, put in order, mapped. NumPy only."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from mmap import ALLOCATIONGRANULARITY
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.errors import DataError
from bigdl._base.trees import Tree, concat, map_leaves, slice_rows
from bigdl.orca.data.contract import (
    DEFAULT_BATCH_SIZE,
    Batch,
    OutputSchema,
    Run,
    Schema,
    Sharded,
    checked_rows,
    part,
)
from bigdl.orca.data.order import Order, check_start
from bigdl.orca.data.packed import batch_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "InMemory",
    "Shaping",
    "as_numpy",
    "each_batch",
    "joined",
    "mapped",
    "mapped_by_rank",
]


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What is done to a batch before the model gets it.

    Args:
        has_labels: Batches are ``(features, labels)``, not features alone.
        transform: Of the features.
        target_transform: Of the labels.
    """

    has_labels: bool
    transform: Callable[[Tree], Tree] | None = None
    target_transform: Callable[[Tree], Tree] | None = None

    def __call__(self, data: Tree, rows: int) -> Tree:
        """The batch as the model gets it.

        Raises:
            DataError: A transform changed the number of rows.
        """
        features, labels = data if self.has_labels else (data, None)
        if self.transform is not None:
            features = checked_rows(self.transform(features), rows, "transform(features)")
        if self.target_transform is not None:
            labels = checked_rows(self.target_transform(labels), rows, "target_transform(labels)")
        return (features, labels) if self.has_labels else features


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A recipe that holds its rows.

    Args:
        data: ``(features, labels)`` or features: a nest of arrays of ``rows`` rows.
        rows: Number of rows.
        schema: What the rows are.
        shaping: What is done to each batch.
    """

    data: Tree
    rows: int
    schema: Schema
    shaping: Shaping

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": map_leaves(_packed, self.data)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, data=map_leaves(_unpacked, state["data"]))

    def open(self, rank: int, world: int) -> MemoryReader:
        return MemoryReader(self, rank, world)

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> Tree:
        """``fn``'s outputs for all rows in order, as NumPy arrays; None if there are no rows."""
        return mapped(self.data, self.rows, self.shaping, fn, size=size, shares=shares, run=run)


@dataclass(frozen=True)
class MemoryReader:
    """One rank's view of rows in memory."""

    source: InMemory
    rank: int
    world: int

    def batches(
        self, size: int, *, epoch: int = 0, seed: int | None = None, start: int = 0
    ) -> Iterator[Batch]:
        source = self.source
        check_start(start, source.rows)
        order = Order(source.rows, seed, epoch)
        for first in range(start, source.rows, size):
            total = min(size, source.rows - first)
            here, there = part(total, self.rank, self.world)
            if here == there:
                yield Batch(None, 0, total)
                continue
            which = order[first + here : first + there]
            data = source.shaping(batch_of(source.data, which), there - here)
            yield Batch(data, there - here, total)

    def close(self) -> None:
        """Nothing is held."""


def each_batch(
    fn: Callable[[Tree], Tree], batches: Iterable[tuple[Tree, int]]
) -> Iterator[tuple[Tree, int]]:
    """``fn``'s outputs as NumPy arrays, each with its number of rows, which must agree."""
    for data, rows in batches:
        if rows:
            yield map_leaves(as_numpy, checked_rows(fn(data), rows, "the prediction")), rows


def as_numpy(leaf: Any) -> Any:
    """An array in NumPy's memory; a tensor of any device is brought here."""
    if isinstance(leaf, np.ndarray):
        return leaf
    numpy = getattr(leaf, "numpy", None)
    if numpy is None:
        return np.asarray(leaf)
    try:
        return numpy(force=True)  # torch: off the graph and the device
    except TypeError as exc:
        if "force" in str(exc):
            return numpy()
        raise DataError(
            f"NumPy has no array of {getattr(leaf, 'dtype', type(leaf).__name__)}. "
            "Turn the output into float32 first."
        ) from exc


def joined(outputs: Iterable[Tree]) -> Tree:
    """Outputs of several batches as one; None if there are none."""
    kept = list(outputs)
    return concat(kept, name="the prediction") if kept else None


@dataclass(frozen=True)
class _Piece:
    """Rows for one call of ``run``: they travel without the others."""

    data: Tree
    rows: int

    def __getstate__(self) -> tuple[Tree, int]:
        return map_leaves(_packed, self.data), self.rows

    def __setstate__(self, state: tuple[Tree, int]) -> None:
        self.__dict__.update(data=map_leaves(_unpacked, state[0]), rows=state[1])


@dataclass(frozen=True)
class _Mapping:
    """The work on a piece; picklable if ``fn`` and the transforms are."""

    shaping: Shaping
    fn: Callable[[Tree], Tree]
    size: int

    def __call__(self, piece: _Piece) -> Tree:
        spans = ((i, min(i + self.size, piece.rows)) for i in range(0, piece.rows, self.size))
        batches = (
            (self.shaping(batch_of(piece.data, slice(i, j)), j - i), j - i) for i, j in spans
        )
        return joined(output for output, _ in each_batch(self.fn, batches))


def mapped(
    features: Tree,
    rows: int,
    shaping: Shaping,
    fn: Callable[[Tree], Tree],
    *,
    size: int,
    shares: int,
    run: Run,
) -> Tree:
    """The outputs for all rows, in order, computed in at most ``shares`` contiguous pieces."""
    batches = math.ceil(rows / size)
    shares = max(1, min(shares, batches))
    # pieces of whole batches: the same batches whatever the number of shares
    bounds = [part(batches, share, shares) for share in range(shares)]
    spans = [(first * size, min(last * size, rows)) for first, last in bounds if last > first]
    pieces = (_Piece(slice_rows(features, first, last), last - first) for first, last in spans)
    outputs = list(run(_Mapping(shaping, fn, size), pieces))
    return joined(outputs)


def mapped_by_rank(
    source: Sharded, fn: Callable[[Tree], Tree], *, size: int, shares: int, run: Run
) -> Tree:
    """The outputs for all rows in the order of the source, each share read by one rank."""
    ranks = list(run(_RankMapping(source, fn, size, shares), range(shares)))
    steps = zip(*ranks, strict=True)
    return joined(output for step in steps for output in step if output is not None)


@dataclass(frozen=True)
class _RankMapping:
    """One rank's outputs, one for each step; None for a step without rows."""

    source: Sharded
    fn: Callable[[Tree], Tree]
    size: int
    world: int

    def __call__(self, rank: int) -> list[Tree]:
        reader = self.source.open(rank, self.world)
        try:
            outputs: list[Tree] = []
            for batch in reader.batches(self.size):
                done = [one for one, _ in each_batch(self.fn, [(batch.data, batch.rows)])]
                outputs.append(done[0] if done else None)
            return outputs
        finally:
            reader.close()


# --- how arrays travel ------------------------------------------------------------------------


class _InFile:
    """Where a mapped array lies, in place of its values. Not a nest: slots, no dataclass."""

    __slots__ = ("dtype", "offset", "path", "shape")

    def __init__(self, path: str, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> None:
        self.path, self.dtype, self.shape, self.offset = path, dtype, shape, offset


def _packed(leaf: Any) -> Any:
    """An array as it is pickled: one that is mapped from a file by its place in that file."""
    if not isinstance(leaf, np.memmap):
        return leaf
    mapping = getattr(leaf, "_mmap", None)
    if mapping is None or leaf.filename is None or not leaf.flags.c_contiguous or not leaf.size:
        return np.array(leaf)
    if leaf.mode == "c":
        return np.array(leaf)  # changes of a private mapping are not in the file
    leaf.flush()
    begin = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    whole_pages = leaf.offset - leaf.offset % ALLOCATIONGRANULARITY
    offset = whole_pages + leaf.ctypes.data - begin
    return _InFile(os.fspath(leaf.filename), leaf.dtype, leaf.shape, offset)


def _unpacked(leaf: Any) -> Any:
    if not isinstance(leaf, _InFile):
        return leaf
    try:
        return np.memmap(leaf.path, leaf.dtype, "r", leaf.offset, leaf.shape)
    except FileNotFoundError as exc:
        raise FileNotFoundError(
            exc.errno, "This worker cannot see the file that the caller's array is mapped from",
            leaf.path,
        ) from exc  # fmt: skip
