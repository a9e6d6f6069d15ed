"""A PyTorch loader at the beginning of any epoch.

What its order draws from the global random streams is drawn from streams that follow from seed
and epoch. A loader with a generator, or with a sampler of the user's own, may go on from epoch
to epoch: its order is that of a plain loop, and epochs that were left out are passed over
without reading rows.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.processes.loader_order import OrderStreams, is_settled, is_stock, is_stream
from bigdl.orca.data.order import Permutation

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["Epochs"]


def order_streams(seed: int, epoch: int) -> OrderStreams:
    """What the order of an epoch draws from."""
    return OrderStreams(int(Permutation(1 << 62, seed, epoch).rows_at([0])[0]))


class Epochs:
    """A copy of a loader that stands at the beginning of the epoch asked for."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._given = loader
        self._begin()

    def _begin(self) -> None:
        self.loader = _copied(self._given)
        self._passed = 0

    def enter(self, seed: int, epoch: int) -> OrderStreams:
        """Go to the beginning of ``epoch``; gives the streams that its order draws from."""
        if self._goes_on:
            if epoch < self._passed:
                self._begin()
            for earlier in range(self._passed, epoch):
                self._pass_over(order_streams(seed, earlier))
            self._passed = epoch + 1
        return order_streams(seed, epoch)

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

    def _pass_over(self, streams_then: OrderStreams) -> None:
        """One epoch of order, as a plain loop would have met it."""
        loader = self.loader
        with streams_then:
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
