"""Whether processes are there, for tests of what starts and ends them. Reads /proc: Linux only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["are_gone", "is_alive", "lineage", "within"]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for yet does not.

    As long as one of its threads is still on its way out, its files are open.
    """
    process = Path(f"/proc/{pid}")
    try:
        has_ended = "State:\tZ" in (process / "status").read_text()
        return not has_ended or len(list((process / "task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def are_gone(pids: Iterable[int], within_s: float = 15.0) -> bool:
    """Whether none of ``pids`` runs any more, at the latest in ``within_s`` seconds."""
    left = list(pids)
    return within(within_s, lambda: not any(map(is_alive, left)))


def lineage(pid: int) -> list[int]:
    """A process, its parent, and so on up to the first of all, which is left out."""
    pids = []
    while pid > 1:
        pids.append(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pids


def within(seconds: float, claim: Callable[[], bool]) -> bool:
    """Whether ``claim()`` comes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
