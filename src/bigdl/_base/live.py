"""A line on stderr that is written over while work goes on. Standard library only."""

from __future__ import annotations

import sys

__all__ = ["LiveLine"]


class LiveLine:
    """Shows what is done now, on a terminal; until it is closed, or its context ends.

    Nothing it meets is an error: a stream that its reader has closed is not written to again.
    """

    def __init__(self) -> None:
        self._stream = sys.stderr
        #: Whether stderr is a terminal.
        self.is_live = bool(self._stream is not None and self._stream.isatty())
        self._is_shown = False

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away."""
        if self._is_shown:
            self.show("")

    def show(self, text: str) -> None:
        """Write over what is there; nothing where stderr is no terminal."""
        if self.is_live:
            self._is_shown = True
            self._write(f"\r\x1b[K{text}")

    def keep(self, text: str) -> None:
        """Write a line that stays, on a terminal or not."""
        if self._stream is not None:
            self._is_shown = False
            self._write(f"\r\x1b[K{text}\n" if self.is_live else f"{text}\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # progress is not worth an error
            self.is_live, self._stream = False, None
