"""The Spark engine: workers in tasks of a Spark application, started by us or joined.

A *seat* is a Spark task that offers its slot and runs no user code itself: worker processes are
its children. Seats are asked for as work needs them, so that this works with dynamic allocation
and beside the user's own jobs, and Spark's retries never run anything of the user's twice.
Kept values lie in files of the driver's; workers elsewhere reach them over their line.
"""

from __future__ import annotations

import os
import secrets
import time
from typing import TYPE_CHECKING, Any, ClassVar

from bigdl._base.environment import thread_variables
from bigdl._base.errors import ConfigError, TimeLimitError
from bigdl._base.workers import Workers
from bigdl.orca.engines.preflight import Preflight, facts
from bigdl.orca.engines.process import Kind
from bigdl.orca.engines.queued import QueuedEngine
from bigdl.orca.engines.service import Service
from bigdl.orca.engines.spark_places import SparkPlaces
from bigdl.orca.engines.spark_session import Session, package

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bigdl.orca.engines.base import EngineSettings

__all__ = ["SparkEngine"]

#: Nodes that are slow to answer are waited for so long, and the first of all for longer: Spark
#: may have to start its executors.
_STRAGGLERS_S = 30.0
_FIRST_S = 120.0


class SparkEngine(QueuedEngine):
    """An ``Engine`` on a Spark session.

    Args:
        session: Started or joined.
    """

    name: ClassVar[str] = "spark"
    start_limit_s: ClassVar[float] = 120.0  # executors may have to start first

    def __init__(self, session: Session) -> None:
        super().__init__(session.slots(), session.address)
        self._session = session
        self._node_slots = min(session.node_slots, self._slots)
        self.grain = session.cores_each
        self._keeper = Workers()
        self._places: SparkPlaces | None = None
        try:
            session.carry(self._keeper.scratch)
        except BaseException:
            self._keeper.close()
            raise

    @classmethod
    def open(cls, settings: EngineSettings) -> SparkEngine:
        """As ``Engine.open``: joins the session that runs here, else starts one."""
        wrong = [f"{name}=" for name in ("address", "ray_options") if getattr(settings, name)]
        if wrong:
            raise ConfigError(f"Spark alone cannot have {', '.join(wrong)}: that is Ray's.")
        session = Session.open(settings)
        try:
            return cls(session)
        except BaseException:
            session.stop()
            raise

    @property
    def spark(self) -> Any:
        """The SparkSession."""
        self._check()
        return self._session.spark

    def node_slots(self) -> int:
        """As ``Engine.node_slots``: an executor's, as its tasks share one machine for certain."""
        self._check()
        return self._node_slots

    def preflight(self) -> Preflight:
        """As ``Engine.preflight``: asks for all slots, and hears who offers them.

        Raises:
            TimeLimitError: Nobody has offered any.
        """
        service = self._start()
        places = self._places
        if places is None:
            raise RuntimeError("An engine that has started has places.")
        service.ask(places.ask_all)
        started = time.monotonic()
        while not places.has_all() and service.is_open:
            waited_s = time.monotonic() - started
            if waited_s > (_STRAGGLERS_S if places.found() else _FIRST_S):
                break
            time.sleep(0.05)
        self._check()
        service.ask(places.ask_no_more)
        if not places.found():
            raise TimeLimitError(
                f"Spark has started no task of ours within {_FIRST_S:g} s. Are all its cores "
                "busy, or has it no executor?"
            )
        return Preflight(facts(), places.found())

    def close(self) -> None:
        """As ``Engine.close``; a session that was joined goes on."""
        if self._is_closed:
            return
        super().close()
        try:
            self._session.stop()
        finally:
            self._keeper.close()

    def _open(self) -> Service:
        folder = str(self._keeper.scratch())  # it goes with this process, however that ends
        mark = os.path.join(folder, f"seen-{secrets.token_hex(16)}")
        with open(mark, "xb"):
            pass
        session = self._session
        self._places = SparkPlaces(
            session.tasks, session.cores_each, session.sit, folder, mark, package
        )
        return Service(self._places, self._address)

    def _kind(
        self,
        cores: int,
        *,
        env: Mapping[str, str] | None = None,
        preload: tuple[str, ...] = (),
        once: bool = False,
    ) -> Kind:
        """Processes in the executors' environment, but for their threads."""
        return Kind(
            env=frozenset({**thread_variables(cores), **(env or {})}.items()),
            preload=tuple(preload),
            around=frozenset(),
            once=once,
        )
