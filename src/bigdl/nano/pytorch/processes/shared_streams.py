"""The random streams that a loader's order draws from, the same on every rank.

They are rank 0's: a sampler meets there what it would meet in one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.processes.exchange import broadcast_value

if TYPE_CHECKING:
    from bigdl._base.collective import Collective

__all__ = ["SharedStreams"]


class SharedStreams:
    """In its block the global random streams are those of rank 0, on every rank.

    On rank 0 they are the global streams themselves for as long as nobody draws from these
    between two blocks; after that they go on by themselves, as they do on other ranks.

    Args:
        collective: The ranks. All of them enter the first block at the same time.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._mine: streams.State | None = None
        self._theirs: streams.State = {}
        self._is_live = collective.rank == 0

    def __enter__(self) -> None:
        self._theirs = streams.read()
        if self._mine is None:
            self._mine = broadcast_value(self._collective, self._theirs)
        if self._is_live:
            self._is_live = streams.same(self._mine, self._theirs)
        if not self._is_live:
            streams.write(self._mine)

    def __exit__(self, *_: object) -> None:
        self._mine = streams.read()
        if not self._is_live:
            streams.write(self._theirs)
