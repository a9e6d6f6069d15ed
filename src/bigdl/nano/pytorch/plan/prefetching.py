"""The next batch is read while the step runs. Knows torch; imports no Lightning.

Reading ahead changes nothing that a program could see where rows are indexed, their order is
known when an epoch begins, and reading them draws no random numbers. Anything else is refused.
"""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.plan.candidates import Applied, Candidate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from bigdl.nano.pytorch.plan.candidates import Scene

__all__ = ["Prefetch"]

#: A loader that takes a smaller share of a step's time has nothing to hide behind it.
_LEAST_SHARE = 0.03
#: The first reads are taken in place and watched for random draws.
_WATCHED_READS = 3


class Prefetch(Candidate):
    """The next batch is read by a thread while the step runs."""

    name = "prefetch"
    changes_numbers = False
    is_of_the_run = True
    hope = 1.5

    def refuse(self, scene: Scene) -> str | None:
        if scene.readers is None:
            return "the batches do not come from a loader of this run"
        share = scene.loader_share
        if share is not None and share < _LEAST_SHARE:
            return f"fetching takes {share:.1%} of a step's time: too little to win"
        readers = scene.readers()
        if not readers:
            return "the batches do not come from a DataLoader"
        return next(filter(None, map(_why_not, readers)), None)

    def apply(
        self,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        if scene.readers is None:
            raise ConfigError("the batches do not come from a loader of this run")
        return _Ahead(scene.readers)


def _why_not(reader: Any) -> str | None:
    """Why a loader's iterator cannot be read ahead, in one sentence; None if it can."""
    if getattr(reader, "_num_workers", 0) > 0:
        return "the loader's worker processes read ahead already"
    if type(getattr(reader, "_dataset_fetcher", None)).__name__ not in (
        "_MapDatasetFetcher",
        "_Reader",
    ):
        return "rows that come as a stream are read when they are asked for"
    order = reader._index_sampler
    if type(order) is BatchSampler:
        order = order.sampler
    is_known = type(order) is SequentialSampler or (
        type(order) is RandomSampler and not order.replacement
    )
    return (
        None if is_known else f"{type(order).__name__} may choose rows by what happens in a step"
    )


class _Ahead(Applied):
    """Reading ahead in force.

    Args:
        readers: Gives the iterators of the epoch's loaders, as they are at the call.
    """

    def __init__(self, readers: Callable[[], Sequence[Any]]) -> None:
        self._readers = readers
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bigdl-prefetch")
        self._attached: list[_Reader] = []
        self._watched = 0
        self.detail = "the next batch is read while the step runs"
        self.epoch_started()

    def epoch_started(self) -> None:
        if self.problem is None:
            self._detach()
            self._attached = [_Reader(one, self) for one in self._readers()]

    @property
    def is_proven(self) -> bool:  # type: ignore[override]
        return self._watched >= _WATCHED_READS

    def undo(self) -> None:
        self._detach()
        self._pool.shutdown(wait=True)

    def _detach(self) -> None:
        attached, self._attached = self._attached, []
        for one in attached:
            one.detach()

    # --- what the readers ask ---

    def read(self, rows: Any, index: Any) -> Any:
        """Read rows in place; the first reads are watched."""
        if self.is_proven or self.problem is not None:
            return rows.fetch(index)
        own = streams.generators(rows.dataset)
        before = streams.read(), [streams.read_generator(one) for one in own]
        batch = rows.fetch(index)
        self._watched += 1
        after = streams.read(), [streams.read_generator(one) for one in own]
        if not streams.same(before[0], after[0]) or str(before[1]) != str(after[1]):
            self.problem = "reading a row draws random numbers, which would come too early"
        return batch

    def ahead(self, rows: Any, index: Any) -> Future[Any] | None:
        """Begin to read rows, once reading is known to be harmless."""
        if self.problem is not None or not self.is_proven:
            return None
        return self._pool.submit(rows.fetch, index)


class _Reader:
    """Stands in a loader's iterator for its order and for its rows."""

    def __init__(self, iterator: Any, owner: _Ahead) -> None:
        self._iterator = iterator
        self._owner = owner
        self._order: Iterator[Any] = iterator._sampler_iter
        self._rows = iterator._dataset_fetcher
        self._taken: deque[Any] = deque()  # places that were asked for early, at most one
        self._pending: Future[Any] | None = None
        self._is_leaving = False
        iterator._sampler_iter = iterator._dataset_fetcher = self

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._taken.popleft() if self._taken else next(self._order)

    def fetch(self, index: Any) -> Any:
        """The rows at ``index``, and a start on those that follow."""
        pending, self._pending = self._pending, None
        if pending is None:
            batch = self._owner.read(self._rows, index)
        elif pending.exception() is None:
            batch = pending.result()
        else:  # once more, here: what is wrong shows as in the user's own program
            batch = self._rows.fetch(index)
        if self._is_leaving:
            self._leave()
        else:
            self._start()
        return batch

    def _start(self) -> None:
        for index in itertools.islice(self._order, 1):
            self._taken.append(index)
            self._pending = self._owner.ahead(self._rows, index)

    def detach(self) -> None:
        """Let go of the iterator; what was read already is still handed out."""
        self._is_leaving = True
        if self._pending is None:
            self._leave()

    def _leave(self) -> None:
        if self._iterator._dataset_fetcher is self:
            self._iterator._sampler_iter = itertools.chain(self._taken, self._order)
            self._iterator._dataset_fetcher = self._rows
