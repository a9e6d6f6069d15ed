"""What a callback is, and what it sees of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Callback", "TrainingState"]


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

    def on_exception(self, error: BaseException) -> None:
        """``fit`` ends with an error, for good: in the caller's process, whatever became of the
        workers. What this raises is logged, and ``error`` still reaches the caller.
        """
