"""PyTorch loaders and datasets. A loader's batches are the global batches, in its own order."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

from bigdl._base.errors import DataError
from bigdl.nano.pytorch.processes.loader_order import is_settled, is_stock, is_stream
from bigdl.nano.pytorch.processes.loader_parts import Parts
from bigdl.orca.data.adapters.loader_epochs import Epochs
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, Batch, OutputSchema, Run, part
from bigdl.orca.data.memory import mapped_by_rank
from bigdl.orca.data.order import Order, check_start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl._base.trees import Tree
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
        self._parts: Parts | None = None

    def batches(
        self, size: int, *, epoch: int = 0, seed: int | None = None, start: int = 0
    ) -> Iterator[Batch]:
        if start < 0:
            raise DataError(f"Cannot go on at row {start}: rows are counted from 0.")
        self.close()
        streams = self._epochs.enter(seed or 0, epoch)
        self._parts = Parts(self._epochs.loader, self._rank, self._world)
        is_over = False
        try:
            for part in self._parts.meet(streams, start=start):
                has_data = part.rows > 0 and not self._source.has_labels
                data = _features(part.data) if has_data else part.data
                yield Batch(data, part.rows, part.global_rows)
            is_over = True
        finally:
            self.close()
            if not is_over:
                self._epochs.leave_unfinished()

    def close(self) -> None:
        """End the loader's own processes."""
        if self._parts is not None:
            self._parts.close()
