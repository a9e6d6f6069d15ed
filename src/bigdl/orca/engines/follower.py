"""The caller's side of a gang that runs: hands on its events, and finds out whose failure it was.

Standard library only.
"""

from __future__ import annotations

import pickle
import queue
import time
from typing import TYPE_CHECKING, Any, cast

from bigdl._base.errors import TimeLimitError, WorkerLostError
from bigdl.orca.engines import store
from bigdl.orca.engines.task import event_of, show, value_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl._base.rendezvous import Rendezvous
    from bigdl.orca.engines.base import GangSetup
    from bigdl.orca.engines.job import Job, Mail
    from bigdl.orca.engines.service import Service

__all__ = ["Follower"]

_TICK_S = 0.25
#: The worker that failed first has so long to give its own account.
_ACCOUNT_S = 5.0


class Follower:
    """Waits for the members of one gang, in the thread that asked for it.

    Args:
        service: Where they run.
        rendezvous: Theirs; it knows which of them failed first.
        jobs: The members, by rank.
        mail: Their news.
        on_event: The caller's.
        setup: Limits, and where output goes.
    """

    def __init__(
        self,
        service: Service,
        rendezvous: Rendezvous,
        jobs: Sequence[Job],
        mail: queue.SimpleQueue[Mail],
        on_event: Callable[[int, Any], None] | None,
        setup: GangSetup,
    ) -> None:
        self._service = service
        self._rendezvous = rendezvous
        self._jobs = jobs
        self._mail = mail
        self._on_event = on_event
        self._setup = setup
        self._heard = [time.monotonic()] * len(jobs)
        self._ended: list[Job] = []
        self._values: dict[int, Any] = {}

    def follow(self) -> list[Any]:
        """The members' values, by rank.

        Raises:
            Exception: As ``Engine.gang``.
        """
        while len(self._values) < len(self._jobs):
            self._take(_TICK_S)
            if len(self._ended) > len(self._values):
                self._blame()
            self._check_start()
            self._check_silence()
        return [self._values[rank] for rank in range(len(self._jobs))]

    def _take(self, timeout_s: float) -> None:
        """Look at one piece of news, if some comes in time."""
        try:
            kind, job, content = self._mail.get(timeout=timeout_s)
        except queue.Empty:
            return
        rank = cast("int", job.rank)
        if kind == "event":
            self._heard[rank] = time.monotonic()
            event = event_of(cast("bytes", content))
            if self._on_event is not None:
                self._on_event(rank, event)
        elif kind == "output":
            text = cast("str", content)
            if self._setup.on_output is not None:
                self._setup.on_output(rank, text)
            else:
                show(job.where, text)
        else:
            self._ended.append(job)
            if isinstance(job.outcome, bytes):
                self._values[rank] = pickle.loads(store.unpack(job.outcome))

    def _blame(self) -> None:
        """Raise the failure of the worker that failed first; others only followed it."""
        failed = next(job for job in self._ended if not isinstance(job.outcome, bytes))
        first = self._rendezvous.failure
        if first is not None and first.rank is not None:
            failed = self._account_of(first.rank) or failed
        elif first is not None and first.kind == "late":
            raise first.error()
        value_of(failed)

    def _account_of(self, rank: int) -> Job | None:
        """The failed job of ``rank``, waiting a little for it."""
        deadline = time.monotonic() + _ACCOUNT_S
        job = self._jobs[rank]
        while job not in self._ended and time.monotonic() < deadline:
            self._take(_TICK_S)
        return job if job in self._ended and not isinstance(job.outcome, bytes) else None

    def _check_start(self) -> None:
        first = self._rendezvous.failure
        if first is None or first.kind != "late":
            return
        waiting = [job for job in self._jobs if job.process is None and not job.ended.is_set()]
        if waiting:
            need = sum(job.cores for job in self._jobs)
            raise TimeLimitError(
                f"asked {len(self._jobs)} workers, {need} slots in all; of the cluster's "
                f"{self._service.slots} slots {self._service.free_slots()} were free after "
                f"{self._setup.start_timeout_s:g} s. Wait for what runs, or ask for fewer."
            )
        raise first.error()

    def _check_silence(self) -> None:
        limit = self._setup.silence_s
        limit_s = limit() if callable(limit) else limit
        if limit_s is None:
            return
        now = time.monotonic()
        for rank, job in enumerate(self._jobs):
            if job.process is None and job not in self._ended:
                self._heard[rank] = now  # it waits for a slot
            elif job not in self._ended and now - self._heard[rank] > limit_s:
                raise WorkerLostError(
                    f"{job.where[:1].upper()}{job.where[1:]} is taken for hung: nothing came "
                    f"from it for {limit_s:g} s. The gang was ended.",
                    rank=rank,
                    host=job.host,
                )
