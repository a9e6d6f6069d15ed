"""What engines with a queue and worker processes have in common: all calls but their start.

Standard library only. An engine of this kind says where its processes come from (``_open``); the
rest of the contract is here.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from bigdl._base.errors import ArgumentError, WorkerError
from bigdl._base.rendezvous import Rendezvous
from bigdl._base.workers import search_path
from bigdl.orca.engines import store
from bigdl.orca.engines.base import GangSetup, check_gang, check_task, closed
from bigdl.orca.engines.follower import Follower
from bigdl.orca.engines.host import Member, Order
from bigdl.orca.engines.job import Job
from bigdl.orca.engines.pickling import dumps
from bigdl.orca.engines.ref import KeptRef, noticed
from bigdl.orca.engines.task import QueuedTask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bigdl.orca.engines.base import Ref, Task
    from bigdl.orca.engines.process import Kind
    from bigdl.orca.engines.service import Service

__all__ = ["QueuedEngine", "maker"]

T = TypeVar("T")


class QueuedEngine:
    """All of an ``Engine`` but where its processes are, which a subclass knows.

    Args:
        slots: Cores' worth of work at once.
        address: Where workers reach the caller.
    """

    #: A gang starts in so many seconds, where nothing else is said.
    start_limit_s: ClassVar[float] = 60.0
    #: Slots are given in multiples of so many.
    grain = 1

    def __init__(self, slots: int, address: str = "127.0.0.1") -> None:
        self._slots = slots
        self._address = address
        self._service: Service | None = None
        self._is_closed = False
        self._starting = threading.Lock()

    def __repr__(self) -> str:
        state = ", closed" if self._is_closed else ""
        return f"<{type(self).__name__} of {self._slots} slots{state}>"

    def _open(self) -> Service:
        """Begin to have worker processes; called once, when they are first needed."""
        raise NotImplementedError

    def _kind(
        self,
        cores: int,
        *,
        env: Mapping[str, str] | None = None,
        preload: tuple[str, ...] = (),
        once: bool = False,
    ) -> Kind:
        """Processes with so many threads, as the caller would have them now."""
        raise NotImplementedError

    def slots(self) -> int:
        """As ``Engine.slots``."""
        self._check()
        return self._slots

    def node_slots(self) -> int:
        """As ``Engine.node_slots``; here all are on one node."""
        return self.slots()

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
        check_task(cores, self.node_slots())
        service = self._start()
        with noticed() as refs:
            call = self._parcel(dumps(fn)), self._parcel(dumps(args))
        job = Job(maker(*call), self._kind(cores), cores=cores, refs=refs)
        service.begin([job])
        return QueuedTask(service, job, on_event)

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
        if setup.start_timeout_s is None:
            setup = replace(setup, start_timeout_s=self.start_limit_s)
        limit_s = cast("float", setup.start_timeout_s)
        cores = check_gang(workers, setup.cores, self._slots, self.node_slots(), self.grain)
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
        kind = self._kind(cores, env=setup.env, preload=setup.preload, once=True)
        mail: queue.SimpleQueue[Any] = queue.SimpleQueue()
        name = f"gang-{uuid.uuid4().hex}"
        with Rendezvous(workers, address=self._address, timeout_s=limit_s) as rendezvous:
            jobs = [
                Job(
                    maker(
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
            ref = KeptRef(store.new_path(folder), reads=read)
            store.save(data, ref.path)
            refs.append(ref)
        return refs

    def map(self, fn: Callable[[Any], Any], refs: Sequence[Ref]) -> list[Ref]:
        """As ``Engine.map``: work starts at once, on as many refs as there are slots."""
        service = self._start()
        return [KeptRef(job.paths[0], job, service) for job in self._begin(fn, refs)]

    def split(
        self, fn: Callable[[Any], Sequence[Any]], refs: Sequence[Ref], parts: int
    ) -> list[list[Ref]]:
        """As ``Engine.split``: each value becomes a file of its own."""
        service = self._start()
        found: list[list[Ref]] = []
        for job in self._begin(fn, refs, parts):
            whole = KeptRef("", job, service)  # lives as long as one of its parts
            found.append([KeptRef(path, job, reads=[whole]) for path in job.paths])
        return found

    def _begin(
        self, fn: Callable[[Any], Any], refs: Sequence[Ref], parts: int | None = None
    ) -> list[Job]:
        """One job a ref, whose value is kept; in ``parts`` of its own if that is a number."""
        self._check()
        wrong = [i for i, ref in enumerate(refs) if not isinstance(ref, KeptRef)]
        if wrong:
            found = type(refs[wrong[0]]).__name__
            raise ArgumentError(f"refs[{wrong[0]}] is a {found}; need refs of this engine.")
        service = self._start()
        with noticed() as read:
            function = self._parcel(dumps(fn))
        made: list[Job] = []
        for index, ref in enumerate(cast("Sequence[KeptRef]", refs)):
            path = store.new_path(service.folder())
            paths = [path] if parts is None else [f"{path}-{i}" for i in range(parts)]
            job = Job(
                maker(function, source=ref.path, keep=paths, is_split=parts is not None),
                self._kind(1),
                where=f"shard {index + 1} of {len(refs)}",
                shard=index,
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
            made = [ref.job for ref in refs if isinstance(ref, KeptRef) and ref.job is not None]
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
                self._service = self._open()
            return self._service

    def _parcel(self, data: bytes) -> store.Parcel:
        folder = "" if store.Parcel.is_small(data) else self._start().folder()
        return store.Parcel(data, folder)


def _cancel(service: Service, jobs: Sequence[Job]) -> None:
    try:
        service.cancel(jobs)
    except (WorkerError, RuntimeError):  # closed meanwhile: they are gone
        return


def maker(
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
