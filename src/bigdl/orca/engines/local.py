"""The local engine: worker processes on this machine, no cluster, no Java.

Standard library only. Calls of ``submit`` and ``map`` run in processes that are kept, as many as
there are slots; a gang has processes of its own, which are gone when it returns. Each has its
threads, and cores of its own where this machine has enough and nobody limits them by quota.
Nothing is started before the first call.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, ClassVar

from bigdl._base import machine
from bigdl._base.environment import thread_variables
from bigdl._base.errors import ConfigError
from bigdl.orca.engines.job import Job
from bigdl.orca.engines.local_places import LocalPlaces
from bigdl.orca.engines.pickling import dumps
from bigdl.orca.engines.preflight import Preflight, facts
from bigdl.orca.engines.process import Kind
from bigdl.orca.engines.queued import QueuedEngine, maker
from bigdl.orca.engines.service import Service
from bigdl.orca.engines.task import QueuedTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bigdl.orca.engines.base import EngineSettings

__all__ = ["LocalEngine"]

# Variables that say something about a moment, and nothing about how to run.
_PASSING = frozenset({"_", "PWD", "OLDPWD", "SHLVL", "LINES", "COLUMNS", "PYTEST_CURRENT_TEST"})


class LocalEngine(QueuedEngine):
    """An ``Engine`` on this machine.

    Args:
        slots: Cores' worth of work at once; None = the cores this process may use. More than
            there are is allowed: they are slots.
    """

    name: ClassVar[str] = "local"

    def __init__(self, slots: int | None = None) -> None:
        super().__init__(slots or machine.cores())

    @classmethod
    def open(cls, settings: EngineSettings) -> LocalEngine:
        """As ``Engine.open``: takes ``cores``; the memory of this machine is not divided."""
        wrong = []
        if settings.num_nodes != 1:
            wrong.append(f"num_nodes={settings.num_nodes} (this machine is one node)")
        for name in ("master", "address", "conf", "ray_options"):
            if getattr(settings, name):
                wrong.append(f"{name}= (nothing of a cluster is started)")
        if wrong:
            raise ConfigError("Local worker processes cannot have " + ", ".join(wrong) + ".")
        limit = machine.memory_limit_bytes()
        if settings.memory_bytes and limit and settings.memory_bytes > limit:
            raise ConfigError(
                f"memory={settings.memory_bytes / 2**30:.1f} GiB is more than this machine's "
                f"{limit / 2**30:.1f} GiB."
            )
        return cls(settings.cores)

    def preflight(self) -> Preflight:
        """As ``Engine.preflight``, from inside a worker process."""
        self._check()
        service = self._start()
        # of no slot and no core: it has to see all that there is
        call = maker(self._parcel(dumps(facts)), self._parcel(dumps(())))
        job = Job(call, self._kind(1, once=True), cores=0)
        service.begin([job])
        return Preflight(facts(), (QueuedTask(service, job, None).result(),))

    def _open(self) -> Service:
        return Service(LocalPlaces(self._slots, _cpus(self._slots), self._kind(1)))

    def _kind(
        self,
        cores: int,
        *,
        env: Mapping[str, str] | None = None,
        preload: tuple[str, ...] = (),
        once: bool = False,
    ) -> Kind:
        """Processes with so many threads, in the caller's environment as it is now."""
        return Kind(
            env=frozenset({**thread_variables(cores), **(env or {})}.items()),
            preload=tuple(preload),
            around=frozenset(item for item in os.environ.items() if item[0] not in _PASSING),
            once=once,
        )


def _cpus(slots: int) -> tuple[int, ...]:
    """The cores to share out among workers, or none.

    Two programs that each take a part of a machine should not meet on the same cores, so each
    begins elsewhere. Under a CPU quota cores are not what is scarce, and nothing is fixed.
    """
    ids = [core for node in machine.numa_nodes() for core in node]
    if sys.platform != "linux" or slots > len(ids) or machine.cores() < len(ids):
        return ()
    first = os.getpid() % (len(ids) // slots) * slots
    return tuple(ids[first : first + slots])
