"""A rank's parts of the batches that a PyTorch loader gives; each batch as the loader means it.

Of an indexed dataset each row is read by one rank: the lists of row numbers are cut before rows
are read. A stream is read by every rank, its samples are cut before they are collated. A loader
that makes batches in some other way is read by every rank, its batches are cut. Knows torch;
imports no Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from bigdl._base.errors import DataError
from bigdl._base.rows import check_start, part
from bigdl._base.trees import Tree, rows, slice_rows
from bigdl.nano.pytorch.processes.loader_order import CutOrder, is_stock, is_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["Part", "Parts"]


@dataclass(frozen=True)
class Part:
    """One rank's part of a global batch.

    Args:
        data: The loader's batch, made of this rank's rows only; None if there are none.
        rows: Rows of this part.
        global_rows: Rows of all ranks' parts together, at least 1.
    """

    data: Tree
    rows: int
    global_rows: int


class Parts:
    """One rank's parts of a loader's batches. All ranks meet as many of them.

    Args:
        loader: A DataLoader, or any iterable of batches; its samplers and generators go on.
        rank: Whose parts.
        world: Number of ranks.
    """

    def __init__(self, loader: Any, rank: int, world: int) -> None:
        self._loader, self._rank, self._world = loader, rank, world
        self._running: Any = None

    def meet(self, streams: AbstractContextManager[None], *, start: int = 0) -> Iterator[Part]:
        """One iteration; the loader's own iterator is made at once, as ``iter`` does.

        Args:
            streams: In its block the global random streams are the same on every rank.
            start: Rows, of all ranks, to pass over first.

        Raises:
            DataError: There are fewer than ``start`` rows, or no batch begins there.
        """
        loader = self._loader
        if is_stock(loader) and not is_stream(loader) and _has_lists(loader):
            return self._indexed(loader, streams, start)
        if is_stock(loader) and is_stream(loader) and loader.batch_size is not None:
            return _from(start, self._stream(loader, streams))
        return _from(start, self._whole(loader, streams))

    def close(self) -> None:
        """End the loader's own processes."""
        running, self._running = self._running, None
        end = getattr(running, "_shutdown_workers", None)
        if end is not None:
            end()

    def _indexed(self, loader: DataLoader[Any], streams: Any, start: int) -> Iterator[Part]:
        """The lists of row numbers are cut: rows of others are not read."""
        order = CutOrder(
            loader._index_sampler, streams, rank=self._rank, world=self._world, start=start
        )
        changes: dict[str, Any] = {"batch_sampler": order}
        if loader.batch_size is None and loader.batch_sampler is None:
            changes = {"batch_size": None, "sampler": order}
        running = iter(_like(loader, generator=self._generator(loader), **changes))
        self._running = running
        return self._cut(running, order, start)

    def _cut(self, running: Any, order: CutOrder, start: int) -> Iterator[Part]:
        for data in running:
            for here, total in order.empty_ones():
                yield _part(None, here, total)
            yield _part(data, *order.sizes.popleft())
        for here, total in order.empty_ones():
            yield _part(None, here, total)
        if order.met < start:
            check_start(start, order.met)

    def _generator(self, loader: DataLoader[Any]) -> torch.Generator | None:
        """What seeds the loader's own processes: another one for each rank."""
        given: torch.Generator | None = loader.generator
        if given is None or self._rank == 0:
            return given
        drawn = torch.empty((), dtype=torch.int64).random_(generator=given).item()
        return torch.Generator().manual_seed((int(drawn) + self._rank) % (1 << 63))

    def _stream(self, loader: DataLoader[Any], streams: Any) -> Iterator[Part]:
        """Every rank reads the stream; samples are cut before they are collated."""
        collate = _CutCollate(loader.collate_fn, self._rank, self._world)
        changes = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        cut = _like(loader, generator=loader.generator, collate_fn=collate, **changes)
        return (_part(*item) for item in self._pulled(cut, streams))

    def _whole(self, loader: DataLoader[Any], streams: Any) -> Iterator[Part]:
        """Every rank reads all batches, and keeps its part of their rows."""
        return self._halves(self._pulled(loader, streams))

    def _halves(self, batches: Iterator[Any]) -> Iterator[Part]:
        for data in batches:
            total = rows(data, "the batch")
            first, last = part(total, self._rank, self._world)
            if total:
                yield _part(slice_rows(data, first, last), last - first, total)

    def _pulled(self, loader: DataLoader[Any], streams: Any) -> Iterator[Any]:
        """The items of a loader that all ranks read: all draws are from the epoch's streams."""
        with streams:
            running = self._running = iter(loader)
        return self._drawn(running, streams)

    def _drawn(self, running: Any, streams: Any) -> Iterator[Any]:
        nothing = object()
        while True:
            with streams:
                item = next(running, nothing)
            if item is nothing:
                return
            yield item


def _part(data: Tree, here: int, total: int) -> Part:
    return Part(data if here else None, here, total)


def _has_lists(loader: DataLoader[Any]) -> bool:
    """The order of an indexed dataset comes in lists of row numbers, one a batch."""
    return loader.batch_sampler is not None or isinstance(loader.sampler, BatchSampler)


def _from(start: int, parts: Iterator[Part]) -> Iterator[Part]:
    """The batches after the first ``start`` rows of all ranks."""
    met = 0
    for one in parts:
        if met >= start:
            yield one
        elif met + one.global_rows > start:
            raise DataError(
                f"Cannot go on at row {start}: this loader's batches begin at rows {met} and "
                f"{met + one.global_rows}. Go on with the batch size that the run began with."
            )
        met += one.global_rows
    if met < start:
        check_start(start, met)


def _like(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A loader on the same dataset and as many processes, for one epoch."""
    kept: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "in_order": loader.in_order,
    }
    if loader.num_workers > 0:
        kept["prefetch_factor"] = loader.prefetch_factor
    return DataLoader(loader.dataset, **{**kept, **changes})


@dataclass(frozen=True)
class _CutCollate:
    """Collates one rank's samples; gives (data, rows, rows of all ranks)."""

    collate: Callable[[list[Any]], Tree]
    rank: int
    world: int

    def __call__(self, samples: list[Any]) -> tuple[Tree, int, int]:
        first, last = part(len(samples), self.rank, self.world)
        data = self.collate(samples[first:last]) if last > first else None
        return data, last - first, len(samples)
