"""Checkpoints while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdl._base.errors import ConfigError
from bigdl.orca.learn.callbacks.base import Callback

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["ModelCheckpoint"]


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
