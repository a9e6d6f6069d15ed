"""One live line on stderr while workers train; where stderr is no terminal, lines if asked for."""

from __future__ import annotations

import time
from typing import Any

from bigdl._base.live import LiveLine

__all__ = ["ProgressLine"]


class ProgressLine:
    """Epoch, rows, rows a second and loss, as rank 0 tells of them.

    Args:
        epochs: Epochs to come.
        first: Number of the first one.
        rows: Rows of an epoch, if that is known.
        is_asked: Whether each epoch's record is a line where stderr is no terminal too.
    """

    def __init__(
        self, *, epochs: int, first: int, rows: int | None, is_asked: bool = False
    ) -> None:
        self._last, self._rows = first + epochs - 1, rows
        self._line, self._is_asked = LiveLine(), is_asked
        self._since, self._epoch, self._before = time.monotonic(), 0, 0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._line.close()

    def heard(self, rank: int, event: Any) -> None:
        """What a worker told."""
        if rank or not (self._line.is_live or self._is_asked):
            return
        if event[0] == "step" and self._line.is_live:
            _, epoch, step, row, loss = event
            if epoch != self._epoch:
                self._since, self._epoch, self._before = time.monotonic(), epoch, row
            seconds = max(time.monotonic() - self._since, 1e-9)
            of = f"/{self._rows}" if self._rows is not None else ""
            speed = f", {(row - self._before) / seconds:.0f} rows/s" if row > self._before else ""
            self._line.show(
                f"epoch {epoch}/{self._last}: row {row}{of}{speed}, step {step}, loss {loss:.4g}"
            )
        elif event[0] == "epoch":
            values = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in event[1].items()
            )
            self._line.keep(values)
