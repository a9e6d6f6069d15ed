"""The end of training when it no longer helps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from bigdl._base.errors import ConfigError
from bigdl._base.registry import nearest
from bigdl.orca.learn.callbacks.base import Callback

if TYPE_CHECKING:
    from bigdl.orca.learn.callbacks.base import TrainingState

__all__ = ["EarlyStopping"]


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
