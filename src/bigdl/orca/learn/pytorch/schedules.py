"""When a learning rate's scheduler steps, and what it looks at."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from bigdl._base.errors import ConfigError
from bigdl._base.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Schedule", "is_scheduler"]


@dataclass(frozen=True)
class Schedule:
    """A scheduler, and when it steps.

    Args:
        scheduler: One of ``torch.optim.lr_scheduler``, or of that form.
        interval: After "epoch"s or after "step"s.
        frequency: After each so many of them.
        monitor: Key of the value that ``ReduceLROnPlateau`` looks at; None = ``val_loss`` where
            there is one, else ``loss``.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None

    def step(self, interval: str, number: int, row: Mapping[str, Any]) -> None:
        """Step if it is due.

        Args:
            interval: What has ended.
            number: Its number, from 1.
            row: Its record.

        Raises:
            ConfigError: The record lacks what is monitored.
        """
        if interval != self.interval or number % self.frequency:
            return
        arguments = []
        if isinstance(self.scheduler, ReduceLROnPlateau):
            arguments = [self._value(row)]
        with warnings.catch_warnings():
            # the mark that the optimizer's step is watched does not travel to a worker
            warnings.filterwarnings("ignore", message="Seems like `optimizer.step")
            self.scheduler.step(*arguments)

    def _value(self, row: Mapping[str, Any]) -> Any:
        if self.monitor is None:
            return row.get("val_loss", row["loss"])
        if self.monitor not in row:
            raise ConfigError(
                f"The scheduler monitors {self.monitor!r}; the {self.interval}'s record has "
                f"{', '.join(row)}.{nearest(self.monitor, list(row))}"
            )
        return row[self.monitor]


def is_scheduler(value: Any) -> bool:
    """Whether it is a scheduler, not a function that makes one."""
    is_built = hasattr(value, "optimizer") and hasattr(value, "state_dict")
    return is_built and callable(getattr(value, "step", None))
