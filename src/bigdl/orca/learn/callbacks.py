"""What a user hangs on to training: callbacks, run on the worker of rank 0.

Names no framework. What a callback's attributes have become comes back into the caller's object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bigdl._base.errors import ConfigError
from bigdl._base.registry import nearest

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["Callback", "EarlyStopping", "ModelCheckpoint", "TrainingState"]


@dataclass(kw_only=True)
class TrainingState:
    """Where training is, as callbacks see it.

    Attributes:
        epoch: Number of the epoch, from 1.
        step: Updates made so far, in all epochs.
        row: The epoch's record: loss, rows, metrics; empty until there is one.
        model: This worker's model. What is changed in it is lost, but for what all workers change
            alike.
        optimizer: This worker's optimizer.
        rank: 0.
        world: How many workers there are.
    """

    epoch: int = 1
    step: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    optimizer: Any = None
    rank: int = 0
    world: int = 1
    is_stopped: bool = False

    def stop(self) -> None:
        """End training before the next update, on all workers."""
        self.is_stopped = True


class Callback:
    """Called at moments of ``fit``. An exception in one ends the fit and reaches the caller."""

    def on_fit_start(self, state: TrainingState) -> None:
        """Before the first step of this call."""

    def on_epoch_start(self, state: TrainingState) -> None:
        """Before an epoch's first step."""

    def on_step_end(self, state: TrainingState) -> None:
        """After an update."""

    def on_validation_end(self, state: TrainingState) -> None:
        """``state.row`` has the values that begin with ``val_``."""

    def on_epoch_end(self, state: TrainingState) -> None:
        """``state.row`` is the epoch's record; what is added to it reaches the caller."""

    def on_fit_end(self, state: TrainingState) -> None:
        """After the last step of this call."""


class ModelCheckpoint(Callback):
    """Writes checkpoints: the state after whole epochs, or after every so many updates.

    Args:
        directory: A path or URL of fsspec's; runs that share it keep apart.
        every_epochs: A checkpoint each so many epochs.
        every_steps: A checkpoint each so many updates, in place of epochs.
        keep_last: How many of this run's to keep; None = all.

    Attributes:
        paths: Those of this run that are there, the oldest first.

    Raises:
        ConfigError: A number is less than 1.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        every_epochs: int = 1,
        every_steps: int | None = None,
        keep_last: int | None = None,
    ) -> None:
        numbers = {
            "every_epochs": every_epochs,
            "every_steps": every_steps,
            "keep_last": keep_last,
        }
        wrong = [
            f"{name}={value!r} (need a whole number >= 1)"
            for name, value in numbers.items()
            if value is not None and (isinstance(value, bool) or int(value) != value or value < 1)
        ]
        if wrong:
            raise ConfigError("ModelCheckpoint cannot be used so: " + ", ".join(wrong) + ".")
        self.directory = str(directory)
        self.every_epochs, self.every_steps, self.keep_last = every_epochs, every_steps, keep_last
        self.paths: list[str] = []

    def is_due(self, *, step: int, epoch: int, is_epoch_end: bool) -> bool:
        """Whether one is to be written now; the same on every worker.

        Args:
            step: Updates made.
            epoch: Whole epochs done.
            is_epoch_end: Whether an epoch has just ended, or else an update.
        """
        if self.every_steps is not None:
            return not is_epoch_end and step % self.every_steps == 0
        return is_epoch_end and epoch % self.every_epochs == 0


class EarlyStopping(Callback):
    """Ends training when a value has stopped getting better.

    Args:
        monitor: A key of the epoch's record.
        patience: Epochs without progress that are borne.
        mode: "min", "max", or "auto": "max" for names like accuracy, AUC or F1.
        min_delta: Least change that counts as progress.

    Attributes:
        best: The best value so far.
        stopped_epoch: The epoch after which training ended; 0 = it did not.
    """

    _LARGE_IS_GOOD = ("acc", "auc", "auroc", "f1", "fbeta", "precision", "recall", "ndcg", "r2")

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 0,
        mode: Literal["auto", "min", "max"] = "auto",
        min_delta: float = 0.0,
    ) -> None:
        if mode not in ("auto", "min", "max"):
            raise ConfigError(f'EarlyStopping(mode={mode!r}): need "auto", "min" or "max".')
        if patience < 0 or min_delta < 0:
            raise ConfigError(
                f"EarlyStopping(patience={patience}, min_delta={min_delta}): need numbers >= 0."
            )
        self.monitor, self.patience, self.mode = monitor, patience, mode
        self.min_delta = min_delta
        self.best = math.nan
        self.waited = 0
        self.stopped_epoch = 0

    @property
    def _sign(self) -> float:
        if self.mode == "auto":
            name = self.monitor.lower()
            return 1.0 if any(word in name for word in self._LARGE_IS_GOOD) else -1.0
        return 1.0 if self.mode == "max" else -1.0

    def on_epoch_end(self, state: TrainingState) -> None:
        """Compare, and end training if patience is at its end.

        Raises:
            ConfigError: The record lacks what is monitored.
        """
        if self.monitor not in state.row:
            if self.monitor.startswith("val_") and not _is_validated(state.row):
                return  # this epoch was not validated
            raise ConfigError(
                f"EarlyStopping(monitor={self.monitor!r}): an epoch's record has "
                f"{', '.join(state.row)}.{nearest(self.monitor, list(state.row))}"
            )
        value = float(state.row[self.monitor])
        better = self._sign * (value - self.best) > self.min_delta
        if math.isnan(self.best) or better:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.stopped_epoch = state.epoch
            state.stop()


def _is_validated(row: dict[str, Any]) -> bool:
    return any(key.startswith("val_") for key in row)
