"""Lightning's loops where each process has its part of every batch.

The loaders give ``Part``s. What they say of rows is noted for the strategy, and the loops, hooks
and steps see the batch itself; in a process without rows of it they see ``NO_ROWS``.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import ConfigError, DataError
from bigdl._base.rows import part as part_of_rows
from bigdl.nano.pytorch.lightning.host import part
from bigdl.nano.pytorch.lightning.resume import _TrainingEpochLoop
from bigdl.nano.pytorch.lightning.summed_logs import SummedLogs
from bigdl.nano.pytorch.lightning.summed_strategy import NO_ROWS
from bigdl.nano.pytorch.processes.loader_parts import Part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl.nano.pytorch.lightning.summed_strategy import SummedStrategy

__all__ = ["install_parts"]

_EvaluationLoop = part("loops.evaluation_loop:_EvaluationLoop")
_PredictionLoop = part("loops.prediction_loop:_PredictionLoop")
_DataLoaderIterDataFetcher = part("loops.fetchers:_DataLoaderIterDataFetcher")


def install_parts(trainer: Any) -> None:
    """Give a trainer that was just made loops that know of parts."""
    epoch_loop = trainer.fit_loop.epoch_loop
    made = _PartsEpochLoop(trainer, min_steps=epoch_loop.min_steps, max_steps=epoch_loop.max_steps)
    trainer.fit_loop.epoch_loop = made
    made.val_loop = _like(made.val_loop, _PartsEvaluationLoop)
    trainer.validate_loop = _like(trainer.validate_loop, _PartsEvaluationLoop)
    trainer.test_loop = _like(trainer.test_loop, _PartsEvaluationLoop)
    trainer.predict_loop = _like(trainer.predict_loop, _PartsPredictionLoop)
    trainer._logger_connector = _like(trainer._logger_connector, SummedLogs)


def _like(stock: Any, kind: Any) -> Any:
    """An object of ``kind``, which extends the class of ``stock``, with all that it has."""
    made = kind.__new__(kind)
    vars(made).update(vars(stock))
    return made


class _PartsEpochLoop(_TrainingEpochLoop):
    """Steps of which each process makes its part."""

    def on_run_start(self, data_fetcher: Any) -> None:
        is_resumed = self.trainer.fit_loop.resume is not None
        super().on_run_start(data_fetcher)
        if is_resumed and self.trainer.strategy.collective is not None:
            self.trainer.strategy.draw_own()  # the checkpoint's streams are rank 0's

    def advance(self, data_fetcher: Any) -> None:
        strategy = self.trainer.strategy
        if strategy.collective is None:
            super().advance(data_fetcher)
            return
        with _own_batches(self.trainer):
            super().advance(_Rows(data_fetcher, strategy))


class _PartsEvaluationLoop(_EvaluationLoop):  # type: ignore[misc,valid-type]
    """Validation and test of which each process makes its part."""

    _data_fetcher: Any

    def reset(self) -> None:
        super().reset()
        if self.trainer.strategy.collective is not None:
            self._data_fetcher = _Rows(self._data_fetcher, self.trainer.strategy)

    def _evaluation_step(self, *args: Any) -> None:
        with _own_batches(self.trainer):
            super()._evaluation_step(*args)


class _PartsPredictionLoop(_PredictionLoop):  # type: ignore[misc,valid-type]
    """Predictions of which each process makes its part."""

    _data_fetcher: Any

    def reset(self) -> None:
        super().reset()
        if self.trainer.strategy.collective is not None:
            self._data_fetcher = _Rows(self._data_fetcher, self.trainer.strategy)

    def _predict_step(self, *args: Any) -> None:
        with _own_batches(self.trainer):
            super()._predict_step(*args)

    def _get_batch_indices(self, dataloader: object) -> Any:
        found = super()._get_batch_indices(dataloader)
        strategy = self.trainer.strategy
        if strategy.collective is None:
            return found
        return _OwnRows(found, strategy.global_rank, strategy.world_size)


class _OwnRows:
    """Row numbers of batches, each cut to one process' part."""

    def __init__(self, batches: list[list[int]], rank: int, world: int) -> None:
        self._batches, self._rank, self._world = batches, rank, world

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> list[int]:
        whole = self._batches[number]
        first, last = part_of_rows(len(whole), self._rank, self._world)
        return whole[first:last]


class _Rows:
    """A data fetcher whose items are batches; the strategy learns how many rows they have."""

    def __init__(self, fetcher: Any, strategy: SummedStrategy) -> None:
        if isinstance(fetcher, _DataLoaderIterDataFetcher):
            raise ConfigError(
                "A step that takes dataloader_iter fetches batches by itself: they cannot be "
                "divided among processes. Take batch, or train with num_processes=1."
            )
        vars(self).update(_fetcher=fetcher, _strategy=strategy)

    def __next__(self) -> Any:
        batch, number, loader = next(self._fetcher)
        found: list[Part] = []
        data = _unpacked(batch, found)
        rows, total = sum(one.rows for one in found), sum(one.global_rows for one in found)
        strategy = self._strategy
        if len(found) > 1 and min(one.global_rows for one in found) < strategy.world_size:
            raise DataError(
                f"A batch of several loaders has one of "
                f"{min(one.global_rows for one in found)} rows, fewer than "
                f"{strategy.world_size} processes. Use drop_last=True, or fewer processes."
            )
        if found:
            strategy.rows, strategy.global_rows = rows, total
            if strategy.lightning_module.trainer.training:
                strategy.check_batch(total)
        return (data if strategy.has_rows else NO_ROWS), number, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_fetcher"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._fetcher, name, value)


def _unpacked(batch: Any, found: list[Part]) -> Any:
    """The data of parts; their places are those of loaders, not of what loaders give."""
    if isinstance(batch, Part):
        found.append(batch)
        return batch.data
    if isinstance(batch, dict):
        return {key: _unpacked(one, found) for key, one in batch.items()}
    if isinstance(batch, (list, tuple)):
        items = [_unpacked(one, found) for one in batch]
        return batch._make(items) if hasattr(batch, "_make") else type(batch)(items)
    return batch


@contextmanager
def _own_batches(trainer: Any) -> Iterator[None]:
    """The module's hooks that change batches do not hear of a batch without rows."""
    module = trainer.lightning_module
    stock = module._on_before_batch_transfer, module._apply_batch_transfer_handler

    def before(batch: Any, *args: Any, **kwargs: Any) -> Any:
        return batch if batch is NO_ROWS else stock[0](batch, *args, **kwargs)

    def transfer(batch: Any, *args: Any, **kwargs: Any) -> Any:
        return batch if batch is NO_ROWS else stock[1](batch, *args, **kwargs)

    if trainer.strategy.collective is None:
        yield
        return
    names = {"_on_before_batch_transfer": before, "_apply_batch_transfer_handler": transfer}
    vars(module).update(names)
    try:
        yield
    finally:
        for name in names:
            vars(module).pop(name, None)
