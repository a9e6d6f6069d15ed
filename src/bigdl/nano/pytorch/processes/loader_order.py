"""The order in which a PyTorch loader meets its rows, the same in every process.

What a sampler draws from the global random streams, it draws here from streams that are the same
on every rank. Knows torch; imports no Lightning.
"""

from __future__ import annotations

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

from bigdl._base.rows import part
from bigdl.nano.pytorch.plan import streams

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CutOrder", "OrderStreams", "is_settled", "is_stock", "is_stream"]

# Their order is settled when an epoch begins.
_SETTLED = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def is_stock(loader: Any) -> bool:
    """Batches come about as in torch's own class."""
    kind = type(loader)
    if not issubclass(kind, DataLoader):
        return False
    return kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator


def is_stream(loader: Any) -> bool:
    """The dataset has no row numbers."""
    return isinstance(getattr(loader, "dataset", None), IterableDataset)


def is_settled(order: Any) -> bool:
    """A sampler, or batch sampler, that draws only when an epoch begins."""
    inner = order.sampler if type(order) is BatchSampler else order
    return type(inner) in _SETTLED


class OrderStreams:
    """Global random streams of an epoch's order: in force inside ``with``, else kept aside.

    Args:
        word: A whole number that names them.
    """

    def __init__(self, word: int) -> None:
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
        self, order: Any, order_streams: OrderStreams, *, rank: int, world: int, start: int
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
