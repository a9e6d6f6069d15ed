"""One live line on stderr while shards are made; nothing where stderr is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time

__all__ = ["ShardProgress"]

#: Work that ends sooner shows nothing.
_PATIENCE_S = 0.5


class ShardProgress:
    """How many shards are there.

    Args:
        label: What is done.
        shards: How many there will be.
    """

    def __init__(self, label: str, shards: int) -> None:
        self._label, self._shards, self._done = label, shards, 0
        self._stream = sys.stderr
        self._is_live = bool(self._stream is not None and self._stream.isatty())
        self._since = time.monotonic()
        self._is_shown = False

    def __enter__(self) -> ShardProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._is_shown:
            self._show("")

    def done(self) -> None:
        """One more is there."""
        self._done += 1
        seconds = time.monotonic() - self._since
        if seconds > _PATIENCE_S:
            self._show(f"{self._label}: shard {self._done}/{self._shards}, {seconds:.0f} s")

    def _show(self, text: str) -> None:
        if self._is_live:
            self._is_shown = True
            with contextlib.suppress(OSError, ValueError):  # closed by its reader
                self._stream.write(f"\r\x1b[K{text}")
                self._stream.flush()
