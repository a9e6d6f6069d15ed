"""A value that the local engine keeps, as the caller holds it.

Standard library only. Pickling a ref never waits: whoever sends it notices it (``noticed``) and
has the receiver wait until the value is there.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING, Any, cast

from bigdl._base.errors import ContextError, WorkerError
from bigdl.orca.engines import local_store as store
from bigdl.orca.engines.local_task import show, value_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bigdl.orca.engines.local_job import Job
    from bigdl.orca.engines.local_service import Service

__all__ = ["LocalRef", "noticed"]

_notices = threading.local()


class LocalRef:
    """A ``Ref``: a file of the engine's, which goes with this object.

    Args:
        path: The file.
        job: What will write it; None = it is there.
        service: Where the job runs; it is dropped with this object. None: another ref does so.
        reads: Refs within the value, or what it is a part of; they live as long as this one.
    """

    def __init__(
        self,
        path: str,
        job: Job | None = None,
        service: Service | None = None,
        *,
        reads: Sequence[LocalRef] = (),
    ) -> None:
        self.path = path
        self.job = job
        self._reads = reads
        if job is None or service is None:
            weakref.finalize(self, store.remove, path).atexit = False  # of a part, early
        else:
            weakref.finalize(self, _drop, service, job).atexit = False

    def get(self) -> Any:
        """As ``Ref.get``."""
        self.wait()
        return store.load(self.path)

    def wait(self) -> None:
        """Wait until the value is there. Raises what making it raised."""
        if self.job is None:
            return
        while not self.job.ended.wait(0.5):
            """Ctrl-C is heard between the rounds."""
        while not self.job.mail.empty():
            kind, _, content = self.job.mail.get()
            if kind == "output":
                show(self.job.where, cast("str", content))
            elif kind == "event":  # nobody listens
                store.discard(cast("bytes", content))
        value_of(self.job)

    def __reduce__(self) -> tuple[Any, ...]:
        notices = getattr(_notices, "refs", None)
        if notices is None:
            self.wait()
        else:
            notices.append(self)
        return store.StoredRef, (self.path,)


@contextlib.contextmanager
def noticed() -> Iterator[list[LocalRef]]:
    """The refs that this thread pickles within the block."""
    refs: list[LocalRef] = []
    before, _notices.refs = getattr(_notices, "refs", None), refs
    try:
        yield refs
    finally:
        _notices.refs = before


def _drop(service: Service, job: Job) -> None:
    with contextlib.suppress(ContextError, WorkerError):  # closed, and the file gone with it
        service.drop(job)
