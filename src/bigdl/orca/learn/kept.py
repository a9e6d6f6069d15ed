"""What an estimator keeps between calls: how far training is, and checkpoints of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdl._base.errors import NotReadyError
from bigdl.orca.learn import checkpoint
from bigdl.orca.learn.program import Cursor

if TYPE_CHECKING:
    from os import PathLike

    from bigdl.orca.learn.program import Program, State

__all__ = ["Kept"]


class Kept:
    """A program, its state, and how far its training is.

    Args:
        program: What is trained.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._state: State | None = None
        self._cursor = Cursor()
        self._is_shut = False

    @property
    def epoch(self) -> int:
        """Whole epochs trained."""
        return self._cursor.epoch

    @property
    def step(self) -> int:
        """Updates made."""
        return self._cursor.step

    def save_checkpoint(self, path: str | PathLike[str]) -> str:
        """Write all that training needs to go on, to a folder on any fsspec path.

        Raises:
            NotReadyError: Nothing was trained yet.
        """
        self._open()
        state = self._present()
        if state is None:
            raise NotReadyError("There is nothing to checkpoint yet: call fit() first.")
        saved = checkpoint.Checkpoint(state=state, cursor=self._cursor, seed=None)
        return checkpoint.write(path, saved, self._program.codec)

    def load_checkpoint(self, path: str | PathLike[str]) -> None:
        """Take a checkpoint, or the latest of a folder of them, into the model at once.

        Raises:
            FileNotFoundError: There is none.
            StoredModelError: It is damaged, or of another model; nothing has changed.
        """
        self._open()
        codec = self._program.codec
        try:
            saved = checkpoint.read(path, codec)
        except FileNotFoundError:
            saved = checkpoint.read(checkpoint.latest(path, codec), codec)
        self._program.take(saved.state)
        self._state, self._cursor = saved.state, saved.cursor

    def shutdown(self) -> None:
        """Let go of what was trained here; later calls are errors. The caller's model stays."""
        self._is_shut = True
        self._state = None

    def _present(self) -> State | None:
        """The state to go on from: the caller's own objects say what they hold."""
        return None if self._state is None else self._program.refreshed(self._state)

    def _open(self) -> None:
        if self._is_shut:
            raise NotReadyError("This estimator was shut down; make another.")
