"""Facts that work depends on, asked of every node before any data moves.

Standard library only; ``facts`` is sent to the nodes as it is.
"""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass, fields

import bigdl
from bigdl._base import machine
from bigdl._base.tables import aligned

__all__ = ["Facts", "Preflight", "facts"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One node, as a worker process there sees it.

    Args:
        node: The host's name.
        python: Python's version.
        bigdl: Our own version.
        cores: Cores' worth of work that a process there can do.
        memory_limit_bytes: Memory it can use at most; 0 if unknown.
        shm_free_bytes: Free in /dev/shm; 0 where there is none.
    """

    node: str
    python: str
    bigdl: str
    cores: int
    memory_limit_bytes: int
    shm_free_bytes: int


@dataclass(frozen=True)
class Preflight:
    """The caller's facts and the nodes'; ``str`` gives a table.

    Args:
        caller: The process that asked.
        nodes: Each node once.
    """

    caller: Facts
    nodes: tuple[Facts, ...]

    def faults(self) -> list[str]:
        """What will not work, in words; empty if nothing stands against it."""
        found = []
        for node in self.nodes:
            for name in ("python", "bigdl"):
                there, here = getattr(node, name), getattr(self.caller, name)
                # pickled code needs the same minor version, not the same patch
                if there.split(".")[:2] != here.split(".")[:2]:
                    found.append(f"{node.node} has {name} {there}, the caller {here}")
        return found

    def __str__(self) -> str:
        rows = [[column.name.replace("_bytes", "") for column in fields(Facts)]]
        rows += [_cells(one) for one in (self.caller, *self.nodes)]
        rows = [["", *rows[0]], ["caller", *rows[1]], *(["node", *row] for row in rows[2:])]
        return "\n".join([*aligned(rows), *self.faults()])


def facts() -> Facts:
    """The facts about the node that this runs on."""
    try:
        shm_free_bytes = shutil.disk_usage("/dev/shm").free
    except OSError:  # not this system
        shm_free_bytes = 0
    return Facts(
        node=platform.node(),
        python=".".join(map(str, sys.version_info[:3])),
        bigdl=bigdl.__version__,
        cores=machine.cores(),
        memory_limit_bytes=machine.memory_limit_bytes(),
        shm_free_bytes=shm_free_bytes,
    )


def _cells(one: Facts) -> list[str]:
    return [
        f"{value / 2**30:.1f} GiB" if name.endswith("_bytes") else str(value)
        for name, value in ((column.name, getattr(one, column.name)) for column in fields(Facts))
    ]
