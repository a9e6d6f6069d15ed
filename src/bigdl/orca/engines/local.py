"""The local engine: worker processes on this machine, no cluster, no Java.

Standard library only. Calls of ``submit`` and ``map`` run in processes that are kept, as many as
there are slots; a gang has processes of its own, which are gone when it returns. Each has its
threads, and cores of its own where this machine has enough and nobody limits them by quota.
Nothing is started before the first call.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from bigdl._base import machine
from bigdl._base.environment import thread_variables
from bigdl._base.errors import ArgumentError, ConfigError, WorkerError
from bigdl._base.rendezvous import Rendezvous
from bigdl._base.workers import search_path
from bigdl.orca.engines import local_store as store
from bigdl.orca.engines.base import GangSetup, check_gang, check_task, closed
from bigdl.orca.engines.local_gang import Follower
from bigdl.orca.engines.local_job import Job
from bigdl.orca.engines.local_process import Kind
from bigdl.orca.engines.local_ref import LocalRef, noticed
from bigdl.orca.engines.local_service import Service
from bigdl.orca.engines.local_task import LocalTask
from bigdl.orca.engines.local_worker import Member, Order
from bigdl.orca.engines.pickling import dumps
from bigdl.orca.engines.preflight import Preflight, facts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl.orca.engines.base import EngineSettings, Ref, Task

__all__ = ["LocalEngine"]

T = TypeVar("T")

# Variables that say something about a moment, and nothing about how to run.
_PASSING = frozenset({"_", "PWD", "OLDPWD", "SHLVL", "LINES", "COLUMNS", "PYTEST_CURRENT_TEST"})


class LocalEngine:
    """An ``Engine`` on this machine.

    Args:
        slots: Cores' worth of work at once; None = the cores this process may use. More than
            there are is allowed: they are slots.
    """

    name: ClassVar[str] = "local"

    def __init__(self, slots: int | None = None) -> None:
        self._slots = slots or machine.cores()
        self._service: Service | None = None
        self._is_closed = False
        self._starting = threading.Lock()

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

    def __repr__(self) -> str:
        return f"<LocalEngine of {self._slots} slots{', closed' if self._is_closed else ''}>"

    def slots(self) -> int:
        """As ``Engine.slots``."""
        self._check()
        return self._slots

    def preflight(self) -> Preflight:
        """As ``Engine.preflight``, from inside a worker process."""
        self._check()
        service = self._start()
        # of no slot and no core: it has to see all that there is
        call = _maker(self._parcel(dumps(facts)), self._parcel(dumps(())))
        job = Job(call, _kind(1, once=True), cores=0)
        service.begin([job])
        return Preflight(facts(), (LocalTask(service, job, None).result(),))

    # --- calls ---

    def submit(
        self,
        fn: Callable[..., T],
        *args: Any,
        cores: int = 1,
        on_event: Callable[[Any], None] | None = None,
    ) -> Task[T]:
        """As ``Engine.submit``. A function that ends the process does not end the engine."""
        self._check()
        check_task(cores, self._slots)
        service = self._start()
        with noticed() as refs:
            call = self._parcel(dumps(fn)), self._parcel(dumps(args))
        job = Job(_maker(*call), _kind(cores), cores=cores, refs=refs)
        service.begin([job])
        return LocalTask(service, job, on_event)

    def gang(
        self,
        fn: Callable[..., T],
        workers: int,
        *,
        args_of: Callable[[int], Sequence[Any]] | None = None,
        on_event: Callable[[int, Any], None] | None = None,
        setup: GangSetup | None = None,
    ) -> list[T]:
        """As ``Engine.gang``. What the workers write goes to our stderr, line by line."""
        self._check()
        setup = setup or GangSetup()
        cores = check_gang(workers, setup.cores, self._slots)
        asked = time.time()
        service = self._start()
        with noticed() as refs:
            function = self._parcel(dumps(fn))
            parcels = [
                self._parcel(dumps(tuple(args_of(rank)) if args_of else ()))
                for rank in range(workers)
            ]
        for ref in refs:
            ref.wait()  # making them is no part of the gang's start
        kind = _kind(cores, env=setup.env, preload=setup.preload, once=True)
        mail: queue.SimpleQueue[Any] = queue.SimpleQueue()
        name = f"gang-{uuid.uuid4().hex}"
        with Rendezvous(workers, timeout_s=setup.start_timeout_s) as rendezvous:
            jobs = [
                Job(
                    _maker(
                        function,
                        parcels[rank],
                        own=name,
                        member=Member(
                            ticket=rendezvous.ticket,
                            rank=rank,
                            cores=cores,
                            marks={"asked": asked},
                        ),
                    ),
                    kind,
                    cores=cores,
                    where=f"worker {rank} of {workers}",
                    rank=rank,
                    mail=mail,
                )
                for rank in range(workers)
            ]
            try:
                service.begin(jobs)
                values = Follower(service, rendezvous, jobs, mail, on_event, setup).follow()
                service.wait_gone(jobs)
            finally:
                if any(job.process is not None or not job.ended.is_set() for job in jobs):
                    _cancel(service, jobs)
                service.sweep(name)
        refs.clear()  # they had to live so long
        return cast("list[T]", values)

    # --- kept values ---

    def scatter(self, values: Sequence[Any]) -> list[Ref]:
        """As ``Engine.scatter``: each value becomes a file of the engine's."""
        self._check()
        folder = self._start().folder()
        refs: list[Ref] = []
        for value in values:
            with noticed() as read:
                data = dumps(value)
            for one in read:
                one.wait()
            ref = LocalRef(store.new_path(folder), reads=read)
            store.save(data, ref.path)
            refs.append(ref)
        return refs

    def map(self, fn: Callable[[Any], Any], refs: Sequence[Ref]) -> list[Ref]:
        """As ``Engine.map``: work starts at once, on as many refs as there are slots."""
        service = self._start()
        return [LocalRef(job.paths[0], job, service) for job in self._begin(fn, refs)]

    def split(
        self, fn: Callable[[Any], Sequence[Any]], refs: Sequence[Ref], parts: int
    ) -> list[list[Ref]]:
        """As ``Engine.split``: each value becomes a file of its own."""
        service = self._start()
        found: list[list[Ref]] = []
        for job in self._begin(fn, refs, parts):
            whole = LocalRef("", job, service)  # lives as long as one of its parts
            found.append([LocalRef(path, job, reads=[whole]) for path in job.paths])
        return found

    def _begin(
        self, fn: Callable[[Any], Any], refs: Sequence[Ref], parts: int | None = None
    ) -> list[Job]:
        """One job a ref, whose value is kept; in ``parts`` of its own if that is a number."""
        self._check()
        wrong = [i for i, ref in enumerate(refs) if not isinstance(ref, LocalRef)]
        if wrong:
            found = type(refs[wrong[0]]).__name__
            raise ArgumentError(f"refs[{wrong[0]}] is a {found}; need refs of this engine.")
        service = self._start()
        with noticed() as read:
            function = self._parcel(dumps(fn))
        made: list[Job] = []
        for index, ref in enumerate(cast("Sequence[LocalRef]", refs)):
            path = store.new_path(service.folder())
            paths = [path] if parts is None else [f"{path}-{i}" for i in range(parts)]
            job = Job(
                _maker(function, source=ref.path, keep=paths, is_split=parts is not None),
                _kind(1),
                where=f"shard {index + 1} of {len(refs)}",
                paths=paths,
                refs=[ref, *read],
            )
            service.begin([job])
            made.append(job)
        return made

    def gather(self, refs: Sequence[Ref]) -> list[Any]:
        """As ``Engine.gather``. Ctrl-C ends what still works for these refs."""
        self._check()
        try:
            return [ref.get() for ref in refs]
        except KeyboardInterrupt:
            made = [ref.job for ref in refs if isinstance(ref, LocalRef) and ref.job is not None]
            _cancel(self._start(), [job for one in made for job in (one, *one.behind())])
            raise

    # --- its end ---

    def close(self) -> None:
        """As ``Engine.close``."""
        with self._starting:
            self._is_closed = True
            service, self._service = self._service, None
        if service is not None:
            service.close()

    def _check(self) -> None:
        if self._is_closed:
            raise closed()

    def _start(self) -> Service:
        with self._starting:
            self._check()
            if self._service is None:
                self._service = Service(self._slots, _cpus(self._slots), _kind(1))
            return self._service

    def _parcel(self, data: bytes) -> store.Parcel:
        folder = "" if store.Parcel.is_small(data) else self._start().folder()
        return store.Parcel(data, folder)


def _cancel(service: Service, jobs: Sequence[Job]) -> None:
    try:
        service.cancel(jobs)
    except (WorkerError, RuntimeError):  # closed meanwhile: they are gone
        return


def _maker(
    fn: store.Parcel,
    args: store.Parcel | None = None,
    *,
    source: str | None = None,
    keep: Sequence[str] = (),
    is_split: bool = False,
    own: str = "",
    member: Member | None = None,
) -> Callable[[tuple[int, ...] | None, str], Order]:
    """What makes the order, from the place where the caller is now."""
    path, folder = tuple(search_path()), os.getcwd()

    def make(cpus: tuple[int, ...] | None, where: str) -> Order:
        return Order(
            fn=fn.message,
            args=args.message if args is not None else b"",
            source=source,
            member=member,
            keep=tuple(keep),
            is_split=is_split,
            cpus=cpus,
            store=os.path.join(where, own),
            search_path=path,
            folder=folder,
        )

    return make


def _kind(
    cores: int,
    *,
    env: Any = None,
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
