"""A call of the local engine: what it needs, where its news go, how it ended.

Standard library only.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, NamedTuple

from bigdl._base.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bigdl._base.errors import BigDLError
    from bigdl.orca.engines.host import Order
    from bigdl.orca.engines.outcome import Failed, Lost
    from bigdl.orca.engines.process import Kind, Process
    from bigdl.orca.engines.ref import KeptRef

__all__ = ["Job", "Mail"]


class Mail(NamedTuple):
    """What a waiting thread hears of a job."""

    kind: str  # "event", "output", "end"
    job: Job
    content: bytes | str


class Job:
    """One call: waits, runs in one process, ends.

    Args:
        make: Gives the order, when it is known on which cores it runs.
        kind: The processes that can do it.
        cores: Slots that it takes.
        where: What it is in words: "worker 1 of 3", "shard 2 of 4", "a task".
        rank: A gang member's.
        shard: Number of the shard that it works on.
        paths: Where its value, or the parts of it, are to be kept; () = it travels.
        refs: Kept values that it reads; it starts when they are there.
        mail: Where its news go.
    """

    def __init__(
        self,
        make: Callable[[tuple[int, ...] | None, str], Order],
        kind: Kind,
        *,
        cores: int = 1,
        where: str = "a task",
        rank: int | None = None,
        shard: int | None = None,
        paths: Sequence[str] = (),
        refs: Sequence[KeptRef] = (),
        mail: queue.SimpleQueue[Mail] | None = None,
    ) -> None:
        self.make = make
        self.kind = kind
        self.cores = cores
        self.where = where
        self.rank = rank
        self.shard = shard
        #: Name of the host that it has come to.
        self.host: str | None = None
        self.paths = paths
        self.refs = refs  # their files live as long as it may read them
        self.mail: queue.SimpleQueue[Mail] = queue.SimpleQueue() if mail is None else mail
        self.ended = threading.Event()
        #: The value's message; or how it failed; or what to raise.
        self.outcome: bytes | Failed | Lost | BigDLError | None = None
        self.process: Process | None = None
        self.is_dropped = False  # nobody will read its stored value

    @property
    def needs(self) -> list[Job]:
        """Jobs that have to end before."""
        return [ref.job for ref in self.refs if ref.job is not None]

    def behind(self) -> Iterator[Job]:
        """Jobs that have to end before, and those that these need."""
        for need in self.needs:
            yield need
            yield from need.behind()

    def cancelled(self) -> WorkerError:
        """What it ends with when it is cancelled."""
        return WorkerError(
            f"{self.where[:1].upper()}{self.where[1:]} was cancelled.",
            rank=self.rank,
            host=self.host,
            shard=self.shard,
        )

    def end(self, outcome: bytes | Failed | Lost | BigDLError) -> None:
        """Say how it ended, and let go of what it needed."""
        self.outcome = outcome
        self.refs = ()
        self.make = _spent
        self.ended.set()
        self.mail.put(Mail("end", self, ""))


def _spent(_: tuple[int, ...] | None, __: str) -> Order:
    raise RuntimeError("This job has ended.")
