"""Epochs' records as TensorBoard's scalars."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError
from bigdl._base.optional import need
from bigdl.orca.learn.callbacks.base import Callback
from bigdl.orca.learn.callbacks.numbers import numbers_of

if TYPE_CHECKING:
    from os import PathLike

    from bigdl.orca.learn.callbacks.base import TrainingState

__all__ = ["TensorBoard"]


class TensorBoard(Callback):
    """Writes each epoch's record for TensorBoard: one scalar a key, a point an epoch.

    A call of ``fit`` that goes on from an earlier epoch takes the place of the points from there
    on, so a run that was broken off and resumed is one line.

    Args:
        log_dir: Folder of the run.

    Raises:
        ArgumentError: ``log_dir`` is no path.
        MissingDependencyError: TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | PathLike[str]) -> None:
        if not isinstance(log_dir, str) and not hasattr(log_dir, "__fspath__"):
            raise ArgumentError(f"TensorBoard(log_dir={shown(log_dir)}): need a path.")
        _need("tensorboard")
        self.log_dir = str(log_dir)
        self._writer: Any = None

    def on_fit_start(self, state: TrainingState) -> None:
        """Begin a file of events; points of this epoch and later ones are taken back."""
        protos = _need("tensorboard.compat.proto.event_pb2")
        writer = _need("tensorboard.summary.writer.event_file_writer")
        self._writer = writer.EventFileWriter(self.log_dir)
        start = protos.SessionLog(status=protos.SessionLog.START)
        self._write(state.epoch, session_log=start)

    def on_epoch_end(self, state: TrainingState) -> None:
        """A point for each number of the record; they are on disk when this returns."""
        protos = _need("tensorboard.compat.proto.summary_pb2")
        values = [
            protos.Summary.Value(tag=key, simple_value=value)
            for key, value in numbers_of(state.row).items()
        ]
        self._write(state.epoch, summary=protos.Summary(value=values))

    def on_fit_end(self, state: TrainingState) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, epoch: int, **content: Any) -> None:
        protos = _need("tensorboard.compat.proto.event_pb2")
        self._writer.add_event(protos.Event(wall_time=time.time(), step=epoch, **content))
        self._writer.flush()


def _need(module: str) -> Any:
    return need(module, extra="tracking", purpose="TensorBoard(…)")
