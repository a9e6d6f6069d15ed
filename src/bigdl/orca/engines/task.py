"""A call of the local engine's, seen by the thread that waits for it.

Standard library only. Values, exceptions and events are unpickled here, in the user's thread.
"""

from __future__ import annotations

import pickle
import queue
import sys
import time
from typing import TYPE_CHECKING, Any, cast

from bigdl._base.errors import BigDLError, TimeLimitError
from bigdl.orca.engines import store
from bigdl.orca.engines.outcome import opened

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl.orca.engines.job import Job
    from bigdl.orca.engines.service import Service

__all__ = ["QueuedTask", "event_of", "show", "value_of"]


class QueuedTask:
    """A ``Task`` of ``LocalEngine.submit``."""

    def __init__(
        self,
        service: Service,
        job: Job,
        on_event: Callable[[Any], None] | None,
    ) -> None:
        self._service = service
        self._job = job
        self._on_event = on_event
        self._value: Any = None
        self._is_open = False

    def result(self, timeout_s: float | None = None) -> Any:
        """As ``Task.result``."""
        started = time.monotonic()
        while True:
            left = None if timeout_s is None else timeout_s - (time.monotonic() - started)
            if self.poll(1.0 if left is None else max(0.0, min(left, 1.0))):
                break
            if left is not None and left <= 0:
                raise TimeLimitError(
                    f"A task has not ended within {timeout_s:g} s. It goes on: ask again, "
                    "or cancel() it."
                )
        if not self._is_open:
            self._value = pickle.loads(store.unpack(value_of(self._job)))
            self._is_open = True
        return self._value

    def poll(self, timeout_s: float = 0.0) -> bool:
        """As ``Task.poll``."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                kind, _, content = self._job.mail.get(
                    timeout=max(0.0, deadline - time.monotonic())
                )
            except queue.Empty:
                return self._job.ended.is_set() and self._job.mail.empty()
            if kind == "event":
                event = event_of(cast("bytes", content))
                if self._on_event is not None:
                    self._on_event(event)
            elif kind == "output":
                show(self._job.where, cast("str", content))
            else:
                return True

    def cancel(self) -> None:
        """As ``Task.cancel``."""
        if not self._job.ended.is_set():
            self._service.cancel([self._job])


def value_of(job: Job) -> bytes:
    """The message with the value of a job that has ended.

    Raises:
        Exception: What it ended with; a new one each time.
    """
    end = job.outcome
    if isinstance(end, bytes):
        return end
    if isinstance(end, BigDLError):
        raise type(end)(*end.args)
    if end is None:
        raise RuntimeError(f"{job.where} has not ended yet.")
    raise opened(end, job.where, rank=job.rank, host=job.host, shard=job.shard)


def event_of(message: bytes) -> Any:
    return pickle.loads(store.unpack(message))


def show(where: str, text: str) -> None:
    """Write what a worker has written to our stderr, each line with its origin."""
    who = where.partition(" (")[0].partition(" of ")[0]
    if sys.stderr is not None:
        sys.stderr.write("".join(f"[{who}] {line}\n" for line in text.splitlines()))
