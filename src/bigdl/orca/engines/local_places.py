"""Where the local engine's processes run: slots of this machine, and its cores.

Standard library only. Everything here belongs to the engine's one thread (``service``).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bigdl._base.errors import WorkerError
from bigdl.orca.engines.crews import Crews
from bigdl.orca.engines.process import Kind, Process, every

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from bigdl.orca.engines.job import Job
    from bigdl.orca.engines.process import Place
    from bigdl.orca.engines.service import Service

__all__ = ["LocalPlaces"]


class Cores:
    """The cores of this machine that are free, nearest together first.

    Args:
        ids: Cores to give away; () = none, so that the system places everything.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._ids = ids
        self._free = list(ids)

    def take(self, n: int) -> tuple[int, ...] | None:
        if n == 0 or len(self._free) < n:
            return None
        taken, self._free = self._free[:n], self._free[n:]
        return tuple(taken)

    def give_back(self, taken: tuple[int, ...]) -> None:
        self._free = [core for core in self._ids if core in {*self._free, *taken}]


class _Cell:
    """A ``Place``: slots of this machine, and cores where there are enough."""

    def __init__(self, places: LocalPlaces, slots: int) -> None:
        self._places = places
        self._slots = slots
        self.cpus = places.cores.take(slots)
        places.free -= slots

    def process(self, kind: Kind) -> Process:
        return self._places.process(kind)

    def release(self) -> None:
        if self.cpus is not None:
            self._places.cores.give_back(self.cpus)
        self._places.free += self._slots


class LocalPlaces:
    """``Places`` on this machine.

    Args:
        slots: Cores' worth of work at once.
        cpus: Cores to give to processes; () = let the system place them.
        home: The kind of process whose nursery keeps the engine's folder.
    """

    def __init__(self, slots: int, cpus: tuple[int, ...], home: Kind) -> None:
        self.slots = slots
        self.free = slots
        self.cores = Cores(cpus)
        self._home = home
        self._crews = Crews(home)
        self._has_folder = False
        self._service: Service

    def open(self, service: Service) -> str:
        self._service = service
        self._start(self._home)
        return ""

    def claim(self, jobs: Sequence[Job]) -> list[Place] | None:
        if sum(job.cores for job in jobs) > self.free:
            return None
        return [_Cell(self, job.cores) for job in jobs]

    def want(self, slots: Sequence[int]) -> None:
        return

    def free_slots(self) -> int:
        return self.free

    def welcome(self, number: int, pid: int, sock: socket.socket) -> None:
        sock.close()  # nobody offers places here

    def ready(self, process: Process, hello: bytes) -> str:
        """The nursery's folder, in which the first process of the home kind finds itself."""
        if process.kind != self._home:
            return ""
        self._has_folder = True
        return os.fsdecode(hello)

    def gone(self, process: Process, how: str) -> None:
        if process.kind == self._home and not self._has_folder:
            raise WorkerError(f"No worker process could be started on this machine: {how}")

    def look_after(self) -> None:
        return

    def close(self) -> None:
        self._crews.close()

    def process(self, kind: Kind) -> Process:
        return next(every(self._service.processes, kind), None) or self._start(kind)

    def _start(self, kind: Kind) -> Process:
        """A new process; too many idle ones make room for it."""
        processes = self._service.processes
        idle = [one for one in processes.values() if one.job is None and one.is_connected]
        for one in idle[: max(0, len(processes) + 1 - self.slots)]:
            self._service.dismiss(one)
        crew = self._crews.get(kind, {one.kind for one in processes.values()})
        return self._service.new_process(kind, lambda n: crew.start(self._service.entrance, n))
