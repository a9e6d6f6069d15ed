"""The order in which a PyTorch loader meets its rows, the same in every process.

What a sampler draws from the global random streams, it draws here from streams that follow from
seed and epoch. A loader with a generator, or with a sampler of the user's own, may go on from
epoch to epoch: its order is that of a plain loop, and epochs that were left out are passed over
without reading rows.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from bigdl.nano.pytorch.plan import streams
from bigdl.orca.data.contract import part
from bigdl.orca.data.order import Permutation

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CutOrder", "Epochs", "Streams", "is_settled", "is_stock", "is_stream"]

# Their order is settled when an epoch begins.
_SETTLED = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def is_stock(loader: DataLoader[Any]) -> bool:
    """Batches come about as in torch's own class."""
    kind = type(loader)
    return kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator


def is_stream(loader: DataLoader[Any]) -> bool:
    """The dataset has no row numbers."""
    return isinstance(loader.dataset, IterableDataset)


def is_settled(order: Any) -> bool:
    """A sampler, or batch sampler, that draws only when an epoch begins."""
    inner = order.sampler if type(order) is BatchSampler else order
    return type(inner) in _SETTLED


class Streams:
    """Global random streams of an epoch's order: in force inside ``with``, else kept aside."""

    def __init__(self, seed: int, epoch: int) -> None:
        word = int(Permutation(1 << 62, seed, epoch).rows_at([0])[0])
        small = word % (1 << 32)
        version, numbers, gauss = random.Random(word).getstate()
        name, keys, place, has_gauss, cached = np.random.RandomState(small).get_state()
        self._mine: streams.State = {
            "python": [version, list(numbers), gauss],
            "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place)],
            "numpy_gauss": [int(has_gauss), float(cached)],
            "torch": torch.Generator().manual_seed(word).get_state(),
        }
        self._theirs: streams.State = {}

    def __enter__(self) -> None:
        self._theirs = streams.read()
        streams.write(self._mine)

    def __exit__(self, *_: object) -> None:
        self._mine = streams.read()
        streams.write(self._theirs)


class Epochs:
    """A copy of a loader that stands at the beginning of the epoch asked for."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._given = loader
        self._begin()

    def _begin(self) -> None:
        self.loader = _copied(self._given)
        self._passed = 0

    def enter(self, seed: int, epoch: int) -> Streams:
        """Go to the beginning of ``epoch``; gives the streams that its order draws from."""
        if self._goes_on:
            if epoch < self._passed:
                self._begin()
            for earlier in range(self._passed, epoch):
                self._pass_over(Streams(seed, earlier))
            self._passed = epoch + 1
        return Streams(seed, epoch)

    def leave_unfinished(self) -> None:
        """This epoch was not met to its end: the next one starts from the loader as given."""
        if self._goes_on:
            self._begin()

    @property
    def _goes_on(self) -> bool:
        """An epoch's order may depend on the epochs before it."""
        loader = self.loader
        if streams.generators(loader, *_own(loader)):
            return True
        return is_stock(loader) and not is_stream(loader) and not is_settled(loader._index_sampler)

    def _pass_over(self, order_streams: Streams) -> None:
        """One epoch of order, as a plain loop would have met it."""
        loader = self.loader
        with order_streams:
            if is_stream(loader) or not is_stock(loader):
                deque(loader, maxlen=0)
                return
            # the seed that a loader draws for its processes comes before the sampler's draws
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
            deque(iter(loader._index_sampler), maxlen=0)


def _own(loader: DataLoader[Any]) -> list[Any]:
    """What else of a loader may draw when rows are met: only a stream is read in order."""
    return [loader.dataset] if is_stream(loader) else []


def _copied(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader with samplers and generators of its own, on the same dataset and functions."""
    shared = (loader.collate_fn, loader.worker_init_fn, loader.multiprocessing_context)
    memo: dict[int, Any] = {id(one): one for one in shared}
    if not (is_stream(loader) and streams.generators(loader.dataset)):
        memo[id(loader.dataset)] = loader.dataset
    running = getattr(loader, "_iterator", None)
    if running is not None:
        memo[id(running)] = None  # processes of the caller's own loop
    return copy.deepcopy(loader, memo)


class CutOrder:
    """Lists of row numbers, each cut to one rank's part; an iterable for one epoch.

    Args:
        order: The loader's own lists.
        order_streams: What ``order`` draws from.
        rank: Whose part is kept.
        world: Number of ranks.
        start: Rows to pass over first.
    """

    def __init__(
        self, order: Any, order_streams: Streams, *, rank: int, world: int, start: int
    ) -> None:
        self._order, self._streams = order, order_streams
        self._rank, self._world, self._start = rank, world, start
        #: Rows of this rank and of all, for each list that was met and is not yet handed out.
        self.sizes: deque[tuple[int, int]] = deque()
        #: Rows met so far.
        self.met = 0

    def __iter__(self) -> Iterator[list[Any]]:
        for rows in self._lists():
            skipped = min(len(rows), max(0, self._start - self.met))
            self.met += len(rows)
            total = len(rows) - skipped
            if total == 0:
                continue
            first, last = part(total, self._rank, self._world)
            self.sizes.append((last - first, total))
            if last > first:
                yield rows[skipped + first : skipped + last]

    def _lists(self) -> Iterator[list[Any]]:
        watched = not is_settled(self._order)
        with self._streams:
            order = iter(self._order)
            rows = next(order, None)
        while rows is not None:
            yield list(rows)
            if watched:
                with self._streams:
                    rows = next(order, None)
            else:
                rows = next(order, None)

    def empty_ones(self) -> Iterator[tuple[int, int]]:
        """The sizes of lists before the next one that this rank has rows of."""
        while self.sizes and self.sizes[0][0] == 0:
            yield self.sizes.popleft()
