"""Nurseries on this machine, by the kind of processes that they give.

Standard library only; used by one thread at a time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import BigDLError
from bigdl._base.workers import Worker, Workers
from bigdl.orca.engines.host import Abroad, Entrance, host

if TYPE_CHECKING:
    from bigdl.orca.engines.process import Kind

__all__ = ["Crew", "Crews", "Started"]

#: Nurseries with no work that are kept for the next call.
_IDLE_CREWS = 3


class Started:
    """A ``Handle``: a process of a nursery here."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def lines(self) -> list[Any]:
        """What is readable when there may be news of it."""
        ends: list[Any] = [self._worker._owner._control]
        return [end for end in ends if end is not None]

    def is_lost(self) -> bool:
        self._worker._wait(0.0, None)
        return self._worker._is_lost()

    def end(self, *, kill: bool) -> str:
        if kill:
            self._worker.cancel()
            return ""
        try:
            self._worker.result(timeout_s=5.0)
        except (BigDLError, OSError) as exc:
            return str(exc)
        except Exception as exc:  # noqa: BLE001  (of our own code in the worker; to be seen)
            return f"{type(exc).__name__}: {exc}"
        return ""


class Crew:
    """Processes of one kind, and the nursery that they come from."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.used = time.monotonic()
        self._workers = Workers(preload=(*kind.preload, host.__module__), env=dict(kind.env))

    def start(self, entrance: Entrance, number: int, abroad: Abroad | None = None) -> Started:
        self.used = time.monotonic()
        return Started(self._workers.start(host, entrance, number, abroad))

    @property
    def is_alive(self) -> bool:
        """Whether its nursery can still give processes."""
        nursery = self._workers._nursery
        return nursery is None or nursery.poll() is None

    def close(self) -> None:
        self._workers.close()


class Crews:
    """The crews of an engine, by kind; those that are not needed are closed after a while.

    Args:
        home: The kind that is kept as long as the engine, if there is one.
    """

    def __init__(self, home: Kind | None = None) -> None:
        self._home = home
        self._by_kind: dict[Kind, Crew] = {}
        self._dead: list[Crew] = []

    def get(self, kind: Kind, busy: set[Kind]) -> Crew:
        """The crew of a kind; a new one may take the place of one of no busy kind."""
        crew = self._by_kind.get(kind)
        if crew is not None and not crew.is_alive:
            self._dead.append(crew)  # the engine's folder may be its own
            crew = None
        if crew is None:
            self._thin_out(busy if self._home is None else busy | {self._home})
            crew = self._by_kind[kind] = Crew(kind)
        return crew

    def _thin_out(self, busy: set[Kind]) -> None:
        idle = [crew for kind, crew in self._by_kind.items() if kind not in busy]
        idle.sort(key=lambda crew: crew.used)
        for crew in idle[: max(0, len(idle) + 1 - _IDLE_CREWS)]:
            del self._by_kind[crew.kind]
            crew.close()

    def close(self) -> None:
        for crew in [*self._by_kind.values(), *self._dead]:
            crew.close()
