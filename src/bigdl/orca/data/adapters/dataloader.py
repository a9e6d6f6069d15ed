"""PyTorch loaders and datasets. A loader's batches are the global batches, in its own order.

Of an indexed dataset each row is read by one rank: the lists of row numbers are cut before rows
are read. A stream is read by every rank, its samples are cut before they are collated. A loader
that makes batches in some other way is read by every rank, its batches are cut.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

from bigdl._base.errors import DataError
from bigdl._base.trees import Tree, rows, slice_rows
from bigdl.orca.data.adapters.loader_order import CutOrder, Epochs, is_settled, is_stock, is_stream
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, Batch, OutputSchema, Run, part
from bigdl.orca.data.memory import mapped_by_rank
from bigdl.orca.data.order import Order, check_start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl.orca.data.contract import Reader, Request, Schema

__all__ = ["DatasetSharded", "LoaderSharded", "adapt_dataset", "adapt_loader"]


def adapt_loader(loader: DataLoader[Any], request: Request) -> LoaderSharded:
    """A recipe that holds a loader.

    Raises:
        ConfigError: An argument that the loader itself decides, or that only tables take.
        DataError: The loader has no batches.
    """
    _refuse_columns("a DataLoader", request)
    request.refuse(
        "a DataLoader",
        "The loader has its own: DataLoader(dataset, batch_size=…, shuffle=…).",
        "batch_size",
        "shuffle",
    )
    empty = is_stock(loader) and not is_stream(loader) and _count(loader._index_sampler) == 0
    if request.has_labels and empty:
        raise DataError(f"{request.call}() got a DataLoader without batches.")
    return LoaderSharded(loader=loader, has_labels=request.has_labels)


def adapt_dataset(dataset: Dataset[Any], request: Request) -> LoaderSharded | DatasetSharded:
    """A recipe of a dataset: in batches as large as asked, and shuffled if it is indexed.

    Raises:
        ConfigError: Arguments that only tables take, or a stream that should be shuffled.
        DataError: The dataset has no rows.
    """
    _refuse_columns("a Dataset", request)
    if isinstance(dataset, IterableDataset):
        if request.shuffle:
            request.refuse("an IterableDataset", "A stream has its own order.", "shuffle")
        loader = DataLoader(dataset, batch_size=request.batch_size or DEFAULT_BATCH_SIZE)
        return LoaderSharded(loader=loader, has_labels=request.has_labels)
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} has no __len__. Give it one, or a DataLoader with a "
            "sampler."
        )
    if request.has_labels and len(dataset) == 0:
        raise DataError(f"{request.call}() got a Dataset without rows.")
    return DatasetSharded(dataset=dataset, has_labels=request.has_labels)


def _refuse_columns(kind: str, request: Request) -> None:
    request.refuse(
        kind,
        "Only tables have columns and nulls; change samples in the dataset or in collate_fn.",
        "feature_cols",
        "label_cols",
        "fill",
        "transform",
        "target_transform",
    )


def _count(order: Any) -> int | None:
    """Number of batches, where the order knows it."""
    try:
        return len(order)
    except (TypeError, NotImplementedError):
        return None


def _features(data: Tree) -> Tree:
    """What predict gives the model of a batch."""
    if isinstance(data, (tuple, list)) and len(data) in (1, 2) and not hasattr(data, "_fields"):
        return data[0]
    return data


# --- recipes ----------------------------------------------------------------------------------


class _Mapped:
    """Predictions in the order of the source."""

    @property
    def schema(self) -> Schema | None:
        """A row is known only when it is read."""
        return None

    def open(self, rank: int, world: int) -> Reader:
        raise NotImplementedError

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> Tree:
        """``fn``'s outputs for all batches in order, as NumPy arrays; None without rows."""
        source: Any = replace(self, has_labels=False)  # type: ignore[type-var]
        return mapped_by_rank(source, fn, size=size, shares=shares, run=run)


@dataclass(frozen=True, kw_only=True)
class LoaderSharded(_Mapped):
    """A recipe that holds a loader.

    Args:
        loader: The caller's; readers work on copies of its samplers and generators.
        has_labels: Batches stay as they are; else what predict needs of them.
    """

    loader: DataLoader[Any]
    has_labels: bool

    def __getstate__(self) -> dict[str, Any]:
        loader = copy.copy(self.loader)
        loader.__dict__["_iterator"] = None  # running processes stay where they are
        return {**self.__dict__, "loader": loader}

    @property
    def rows(self) -> int | None:
        """Known where torch's own samplers choose rows; those of an epoch."""
        order = self.loader.batch_sampler
        if is_stream(self.loader) or not is_stock(self.loader) or type(order) is not BatchSampler:
            return None
        if not is_settled(order):
            return None
        total = len(order.sampler)  # type: ignore[arg-type]
        return total - total % order.batch_size if order.drop_last else total

    def open(self, rank: int, world: int) -> Reader:
        return LoaderReader(self, rank, world)


@dataclass(frozen=True, kw_only=True)
class DatasetSharded(_Mapped):
    """A recipe that holds an indexed dataset.

    Args:
        dataset: The caller's.
        has_labels: Batches stay as they are; else what predict needs of them.
    """

    dataset: Any
    has_labels: bool

    @property
    def rows(self) -> int:
        return len(self.dataset)

    def open(self, rank: int, world: int) -> Reader:
        return DatasetReader(self, rank, world)


# --- readers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetReader:
    """One rank's rows of an indexed dataset, in an order of ours."""

    source: DatasetSharded
    rank: int
    world: int

    def batches(
        self, size: int, *, epoch: int = 0, seed: int | None = None, start: int = 0
    ) -> Iterator[Batch]:
        dataset, count = self.source.dataset, self.source.rows
        check_start(start, count)
        order = Order(count, seed, epoch)
        for first in range(start, count, size):
            total = min(size, count - first)
            here, there = part(total, self.rank, self.world)
            if here == there:
                yield Batch(None, 0, total)
                continue
            which = order[first + here : first + there]
            numbers = range(count)[which] if isinstance(which, slice) else which.tolist()
            many = getattr(dataset, "__getitems__", None)
            samples = many(list(numbers)) if many else [dataset[i] for i in numbers]
            data = default_collate(samples)
            yield Batch(data if self.source.has_labels else _features(data), there - here, total)

    def close(self) -> None:
        """Nothing is held."""


class LoaderReader:
    """One rank's part of a loader's batches."""

    def __init__(self, source: LoaderSharded, rank: int, world: int) -> None:
        self._source, self._rank, self._world = source, rank, world
        self._epochs = Epochs(source.loader)
        self._running: Any = None

    def batches(
        self, size: int, *, epoch: int = 0, seed: int | None = None, start: int = 0
    ) -> Iterator[Batch]:
        if start < 0:
            raise DataError(f"Cannot go on at row {start}: rows are counted from 0.")
        self.close()
        streams = self._epochs.enter(seed or 0, epoch)
        loader = self._epochs.loader
        is_over = False
        try:
            if is_stock(loader) and not is_stream(loader) and _has_lists(loader):
                yield from self._indexed(loader, streams, start)
            elif is_stock(loader) and is_stream(loader) and loader.batch_size is not None:
                yield from _from(start, self._stream(loader, streams))
            else:
                yield from _from(start, self._whole(loader, streams))
            is_over = True
        finally:
            self.close()
            if not is_over:
                self._epochs.leave_unfinished()

    def close(self) -> None:
        """End the loader's own processes."""
        running, self._running = self._running, None
        end = getattr(running, "_shutdown_workers", None)
        if end is not None:
            end()

    def _indexed(self, loader: DataLoader[Any], streams: Any, start: int) -> Iterator[Batch]:
        """The lists of row numbers are cut: rows of others are not read."""
        order = CutOrder(
            loader._index_sampler, streams, rank=self._rank, world=self._world, start=start
        )
        changes: dict[str, Any] = {"batch_sampler": order}
        if loader.batch_size is None and loader.batch_sampler is None:
            changes = {"batch_size": None, "sampler": order}
        running = self._running = iter(_like(loader, generator=self._generator(loader), **changes))
        for data in running:
            for here, total in order.empty_ones():
                yield self._batch(None, here, total)
            yield self._batch(data, *order.sizes.popleft())
        for here, total in order.empty_ones():
            yield self._batch(None, here, total)
        if order.met < start:
            check_start(start, order.met)

    def _generator(self, loader: DataLoader[Any]) -> torch.Generator | None:
        """What seeds the loader's own processes: another one for each rank."""
        given: torch.Generator | None = loader.generator
        if given is None or self._rank == 0:
            return given
        drawn = torch.empty((), dtype=torch.int64).random_(generator=given).item()
        return torch.Generator().manual_seed((int(drawn) + self._rank) % (1 << 63))

    def _stream(self, loader: DataLoader[Any], streams: Any) -> Iterator[Batch]:
        """Every rank reads the stream; samples are cut before they are collated."""
        collate = _CutCollate(loader.collate_fn, self._rank, self._world)
        changes = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        cut = _like(loader, generator=loader.generator, collate_fn=collate, **changes)
        for data, here, total in self._pulled(cut, streams):
            yield self._batch(data, here, total)

    def _whole(self, loader: DataLoader[Any], streams: Any) -> Iterator[Batch]:
        """Every rank reads all batches, and keeps its part of their rows."""
        for data in self._pulled(loader, streams):
            total = rows(data, "the batch")
            first, last = part(total, self._rank, self._world)
            if total:
                yield self._batch(slice_rows(data, first, last), last - first, total)

    def _pulled(self, loader: DataLoader[Any], streams: Any) -> Iterator[Any]:
        """The items of a loader that all ranks read: all draws are from the epoch's streams."""
        with streams:
            running = self._running = iter(loader)
        nothing = object()
        while True:
            with streams:
                item = next(running, nothing)
            if item is nothing:
                return
            yield item

    def _batch(self, data: Tree, here: int, total: int) -> Batch:
        if here == 0:
            return Batch(None, 0, total)
        return Batch(data if self._source.has_labels else _features(data), here, total)


def _has_lists(loader: DataLoader[Any]) -> bool:
    """The order of an indexed dataset comes in lists of row numbers, one a batch."""
    return loader.batch_sampler is not None or isinstance(loader.sampler, BatchSampler)


def _from(start: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches after the first ``start`` rows of all ranks."""
    met = 0
    for batch in batches:
        if met >= start:
            yield batch
        elif met + batch.global_rows > start:
            raise DataError(
                f"Cannot go on at row {start}: this loader's batches begin at rows {met} and "
                f"{met + batch.global_rows}. Go on with the batch size that the run began with."
            )
        met += batch.global_rows
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
