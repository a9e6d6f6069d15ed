"""The learning rate in an epoch's record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdl._base.errors import ConfigError
from bigdl.orca.learn.callbacks.base import Callback

if TYPE_CHECKING:
    from bigdl.orca.learn.callbacks.base import TrainingState

__all__ = ["LearningRateMonitor"]


class LearningRateMonitor(Callback):
    """Adds ``lr`` to each epoch's record: the rate that the epoch began with.

    An optimizer with several groups of parameters gives ``lr_0``, ``lr_1``, …. Callbacks that
    come after this one in ``fit(callbacks=[…])`` find the rate in the record.
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def on_epoch_start(self, state: TrainingState) -> None:
        """Read the rates before a scheduler changes them.

        Raises:
            ConfigError: The optimizer has no groups of parameters.
        """
        groups = getattr(state.optimizer, "param_groups", None)
        if groups is None:
            raise ConfigError(
                f"LearningRateMonitor cannot read a {type(state.optimizer).__name__}: it has no "
                "param_groups."
            )
        rates = [float(group["lr"]) for group in groups]
        if len(rates) == 1:
            self._rates = {"lr": rates[0]}
        else:
            self._rates = {f"lr_{number}": rate for number, rate in enumerate(rates)}

    def on_epoch_end(self, state: TrainingState) -> None:
        """Put them into the record; a value of that name that is there already stays."""
        for key, rate in self._rates.items():
            state.row.setdefault(key, rate)
