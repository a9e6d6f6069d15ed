"""One live line on stderr while shards are made; nothing where stderr is no terminal."""

from __future__ import annotations

import time

from bigdl._base.live import LiveLine

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
        self._line = LiveLine()
        self._since = time.monotonic()

    def __enter__(self) -> ShardProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._line.close()

    def done(self) -> None:
        """One more is there."""
        self._done += 1
        seconds = time.monotonic() - self._since
        if seconds > _PATIENCE_S:
            self._line.show(f"{self._label}: shard {self._done}/{self._shards}, {seconds:.0f} s")
