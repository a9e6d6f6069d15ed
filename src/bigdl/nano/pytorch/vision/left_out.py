"""Which rows were left out: told by loader workers, however they were started, to their parent.

Imports no torch until a worker is started by spawn.
"""

from __future__ import annotations

import mmap
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["LeftOut"]


class LeftOut:
    """One mark a row, in memory that all processes of a loader see.

    A forked worker inherits the anonymous mapping. A spawned one is handed a shared tensor while
    it is started; that is made only then. Neither has a name in any file system, so nothing is
    left behind, however the processes end. Marks are single bytes that only ever become 1, so
    there is nothing to lock. A plain pickle or a copy holds the marks of its moment.

    Args:
        paths: The path of each row. A path of two rows is left out twice.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(paths)
        self._rows: dict[str, list[int]] = {}
        self._marks = mmap.mmap(-1, max(1, len(self._paths)))
        self._spawned: torch.Tensor | None = None
        self._others: dict[str, None] = {}  # rows that were added later, by this process alone

    def add(self, path: str) -> None:
        """Leave ``path`` out; more than once is once."""
        if not self._rows:
            for row, known in enumerate(self._paths):
                self._rows.setdefault(known, []).append(row)
        if path not in self._rows:
            self._others[path] = None
        for row in self._rows.get(path, ()):
            self._marks[row] = 1
            if self._spawned is not None:
                self._spawned[row] = 1

    def paths(self) -> list[str]:
        """What was left out, in the order of the rows."""
        marks = self._marks[: len(self._paths)]
        if self._spawned is not None:
            marks = bytes(map(max, marks, self._spawned.tolist()))
        marked = dict.fromkeys(path for path, mark in zip(self._paths, marks, strict=True) if mark)
        return [*marked, *self._others]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"paths": self._paths, "left_out": self.paths()}
        if get_spawning_popen() is not None:
            state["spawned"] = self._shared()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"])  # type: ignore[misc]
        for path in state["left_out"]:
            self.add(path)
        self._spawned = state.get("spawned")

    def _shared(self) -> torch.Tensor:
        import torch

        if self._spawned is None:
            marks = torch.zeros(max(1, len(self._paths)), dtype=torch.uint8)
            marks.share_memory_()  # type: ignore[no-untyped-call]
            self._spawned = marks
        return self._spawned
