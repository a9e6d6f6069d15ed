"""Inside a worker process, whatever the engine: a member's place in its gang, and its events.

Standard library only. An engine brings a worker process into being and calls ``run_member`` (or
any function) there within ``sending``; how the bytes travel is the engine's business.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bigdl._base.rendezvous import join
from bigdl.orca.engines.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bigdl._base.collective import Collective
    from bigdl._base.gang import Gang, Ticket

__all__ = ["WorkerContext", "emit", "run_member", "sending"]

_send: Callable[[bytes], None] | None = None


def emit(event: Any) -> None:
    """Send ``event`` from inside a worker to its caller; outside a worker it does nothing.

    Raises:
        TypeError: The event cannot be pickled.
    """
    if _send is not None:
        _send(dumps(event))


@contextlib.contextmanager
def sending(send: Callable[[bytes], None]) -> Iterator[None]:
    """Within the block, ``emit`` gives its events, pickled, to ``send``."""
    global _send
    before, _send = _send, send
    try:
        yield
    finally:
        _send = before


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What a function that runs in a gang knows of itself and of the others.

    Args:
        gang: The joined gang: who is who, small values for all, abort.
        cores: How many cores this worker has; its libraries use so many threads.
        marks: When things happened, by ``time.time()``: "asked" (the caller called), "process"
            (this process took up the work), "loaded" (function and arguments are here),
            "joined" (all workers are there).
    """

    gang: Gang
    cores: int
    marks: Mapping[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.gang.rank

    @property
    def world(self) -> int:
        return self.gang.world

    def connect(self, kind: str = "auto", *, timeout_s: float | None = 600.0) -> Collective:
        """Sums, slices and copies of arrays among the workers; all of them have to call it."""
        from bigdl._base.collective import connect

        return connect(self.gang, kind=kind, timeout_s=timeout_s)

    def barrier(self) -> None:
        """Return when all workers have come here.

        Raises:
            WorkerError: Another worker failed (or ``WorkerLostError``: is gone).
        """
        self.gang.share(b"")

    def emit(self, event: Any) -> None:
        """Send ``event`` to the caller's ``on_event``."""
        emit(event)


def run_member(
    ticket: Ticket, rank: int, fn: bytes, args: bytes, cores: int, marks: Mapping[str, float]
) -> Any:
    """A member's whole life: join, run, tell all others if it fails.

    Args:
        ticket: Of the gang's rendezvous.
        rank: This worker's.
        fn: ``dumps(function)``, the same for all members.
        args: ``dumps(arguments)``, this member's.
        cores: For the context.
        marks: What has happened so far.
    """
    begun = time.time()
    function, arguments = pickle.loads(fn), pickle.loads(args)
    loaded = time.time()
    with join(ticket, rank) as gang:
        marks = {**marks, "process": begun, "loaded": loaded, "joined": time.time()}
        return function(WorkerContext(gang=gang, cores=cores, marks=marks), *arguments)
