"""A Spark session as the engine sees it: started or joined, and the one kind of job it runs.

The only file here that imports pyspark; stays with the DataFrame API where a session has no
more (Spark Connect).
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
from typing import TYPE_CHECKING, Any

import bigdl
from bigdl._base import machine
from bigdl._base.environment import environment
from bigdl._base.errors import ConfigError, MissingDependencyError, TimeLimitError
from bigdl._base.optional import need
from bigdl.orca.engines import spark_entry
from bigdl.orca.engines.spark_conf import (
    contradictions,
    executor_cores,
    is_here,
    session_conf,
    session_env,
    slots_of,
    starts_none,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from bigdl.orca.engines.base import EngineSettings
    from bigdl.orca.engines.host import Entrance

__all__ = ["Session", "address_of", "is_connect", "package"]

logger = logging.getLogger(__name__)

_EXECUTORS_S = 120.0
_TOLD_AFTER_S = 10.0
# Those that pyspark sets in the process of a session, for its own later calls.
_VARIABLES = ("SPARK_AUTH_SOCKET_TIMEOUT", "SPARK_BUFFER_SIZE")


class Session:
    """A running Spark session.

    Args:
        spark: It.
        changes: What its start has changed in this process, where we have started it and are
            to stop it.
    """

    def __init__(self, spark: Any, changes: _Changes | None = None) -> None:
        self.spark = spark
        self._changes = changes
        #: None on Spark Connect.
        self._context = None if is_connect(spark) else spark.sparkContext
        self.conf = self._settings()

    @classmethod
    def open(cls, settings: EngineSettings) -> Session:
        """Join the session that runs in this process, or start one.

        Raises:
            ConfigError: What was asked contradicts the running session, or itself.
            MissingDependencyError: Spark is not installed.
        """
        need("pyspark", extra="spark", purpose="runtime='spark'")
        need("pyarrow", extra="spark", purpose="runtime='spark'")
        found = _running()
        if found is not None:
            session = cls(found)
            wrong = contradictions(settings, session.conf, session.slots())
            if wrong:
                raise ConfigError(
                    "A Spark session is running in this process, and was asked to be otherwise: "
                    f"{'; '.join(wrong)}. Drop these arguments to join it, or stop it first."
                )
            return session
        return cls._start(settings)

    @classmethod
    def _start(cls, settings: EngineSettings) -> Session:
        conf = session_conf(settings, sys.executable, os.environ, machine.cores())
        _need_java()
        from pyspark.sql import SparkSession

        changes = _Changes()
        builder = SparkSession.builder
        for name, value in conf.items():
            builder = builder.config(name, value)
        try:
            with environment(**session_env(conf, os.environ)):
                spark = builder.getOrCreate()
        except Exception as exc:
            changes.take_back()
            raise ConfigError(f"Spark cannot be started: {_first_words(exc)}") from exc
        finally:
            _forget_options(builder)
        changes.note()
        return cls(spark, changes)

    # --- what it has ---

    @property
    def is_here(self) -> bool:
        """Whether all of it runs on this machine."""
        return is_here(self.conf.get("spark.master", ""))

    @property
    def address(self) -> str:
        """Where its tasks find this process."""
        return address_of(self.spark, self.conf)

    @property
    def cores_each(self) -> int:
        """Cores of one task."""
        return int(self.conf.get("spark.task.cpus", "1"))

    @functools.cached_property
    def tasks(self) -> int:
        """How many tasks it runs at once."""
        known = slots_of(self.conf, machine.cores())
        if known is not None:
            each = min(executor_cores(self.conf) or known, known)
            return max(1, known // each * (each // self.cores_each))
        if self._context is None:
            return self._partitions()
        return self._offered()

    def slots(self) -> int:
        """Cores' worth of work at once."""
        return self.tasks * self.cores_each

    @functools.cached_property
    def node_slots(self) -> int:
        """Cores' worth of work that one executor does at once; all of it if all is here."""
        if self.is_here:
            return self.slots()
        each = executor_cores(self.conf)
        if each is None and self._context is not None:
            store: Any = self._context._jsc.sc().statusStore()
            found = store.executorList(True)
            ones = [found.apply(i) for i in range(found.size())]
            each = min((int(e.totalCores()) for e in ones if e.id() != "driver"), default=None)
        if not each:
            return self.slots()
        return max(1, each // self.cores_each) * self.cores_each

    def _offered(self) -> int:
        """What the executors that are there run at once, waiting for the first."""
        java: Any = self.spark.sparkContext._jsc.sc()
        profile = java.resourceProfileManager().defaultResourceProfile()
        begin = time.monotonic()
        found, since, is_told = 0, begin, False
        while (now := time.monotonic()) < begin + _EXECUTORS_S:
            tasks = int(java.maxNumConcurrentTasks(profile))
            if tasks != found:
                found, since = tasks, now
            elif found and now - since > 2.0:  # no more are coming
                return found
            elif not found and starts_none(self.conf):
                raise ConfigError(
                    "This Spark session starts executors as work needs them (dynamic allocation), "
                    "so nobody knows how many workers there can be: say so by "
                    "spark.dynamicAllocation.maxExecutors and spark.executor.cores."
                )
            elif not found and not is_told and now - begin > _TOLD_AFTER_S:
                is_told = True
                logger.warning("Waiting up to %g s for Spark's first executor", _EXECUTORS_S)
            time.sleep(0.1)
        raise TimeLimitError(
            f"The Spark cluster has given no executor within {_EXECUTORS_S:g} s. Does its master "
            "have workers with enough free cores and memory?"
        )

    def _partitions(self) -> int:
        """As many as Spark cuts a range into, by itself."""
        rows = self.spark.range(100_000).selectExpr("spark_partition_id() as part").distinct()
        return max(1, int(rows.count()))

    def _settings(self) -> dict[str, str]:
        if self._context is not None:
            return {str(name): str(value) for name, value in self._context.getConf().getAll()}
        if not hasattr(self.spark.conf, "getAll"):  # before Spark 4
            return {row.key: row.value for row in self.spark.sql("SET").collect()}
        return {str(name): str(value) for name, value in self.spark.conf.getAll.items()}

    # --- what it does ---

    def sit(self, entrance: Entrance, first: int, many: int) -> None:
        """Run a job of ``many`` tasks, each a seat; returns when all have ended."""
        fn = _seat_function((entrance.address, entrance.port, entrance.key), first)
        if self._context is not None:
            self._context.setLocalProperty("spark.job.description", f"bigdl: {many} seats")
        rows = self.spark.range(0, many, 1, many)
        rows.mapInArrow(fn, "seat long").collect()

    def carry(self, folder: Callable[[], Path]) -> None:
        """Have our package importable wherever Spark runs Python functions of ours itself.

        Only in a session on other machines that was started here: seats see to themselves.

        Args:
            folder: Gives one that lives as long as the session: executors fetch from there.
        """
        if self._changes is None or self._context is None or self.is_here:
            return
        mark, zipped = package()
        path = folder() / f"bigdl-{mark}.zip"  # seats look for this name
        path.write_bytes(zipped)
        before = list(sys.path)
        self._context.addPyFile(str(path))
        sys.path[:] = before  # this process has the package

    def stop(self) -> None:
        """End what we have started."""
        if self._changes is not None:
            self.spark.stop()
            self._changes.take_back()


class _Changes:
    """What pyspark changes in this process when it starts a session, to be taken back."""

    def __init__(self) -> None:
        from pyspark import SparkContext

        self._has_gateway = SparkContext._gateway is None
        self._on_interrupt = signal.getsignal(signal.SIGINT)
        self._path = list(sys.path)
        self._added: list[str] = []
        self._variables = contextlib.ExitStack()
        before = {name: os.environ.get(name) for name in _VARIABLES}
        self._variables.enter_context(environment(**before))

    def note(self) -> None:
        """The session has started."""
        self._added = [path for path in sys.path if path not in self._path]

    def take_back(self) -> None:
        """The session has stopped."""
        _end_gateway(self._has_gateway)
        self._variables.close()
        sys.path[:] = [path for path in sys.path if path not in self._added]
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._on_interrupt)


def _running() -> Any:
    """The session that runs in this process, if one does."""
    remote = sys.modules.get("pyspark.sql.connect.session")
    if remote is not None:
        found = remote.SparkSession.getActiveSession()
        found = found or remote.SparkSession._get_default_session()
        if found is not None:
            return found
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    context = SparkContext._active_spark_context
    if context is None or context._jsc is None:
        return None
    session = SparkSession._instantiatedSession
    usable = session is not None and session._sc._jsc is not None
    return session if usable else SparkSession(context)


def address_of(spark: Any, conf: Mapping[str, str]) -> str:
    """Where the tasks of a session find this process.

    Args:
        spark: The session.
        conf: Its settings.
    """
    if is_connect(spark):  # the interface that leads to its server
        host = spark.client._builder.host.strip("[]")
        found = socket.getaddrinfo(host, 15002, type=socket.SOCK_DGRAM)  # nothing is sent there
        family, kind, proto, _, target = found[0]
        with socket.socket(family, kind, proto) as sock:
            sock.connect(target)
            address = str(sock.getsockname()[0])
        return "127.0.0.1" if address == "::1" else address
    if is_here(conf.get("spark.master", "local")):
        return "127.0.0.1"
    return conf.get("spark.driver.host") or socket.gethostname()


def _need_java() -> None:
    """Spark is a Java program. Raises ``MissingDependencyError`` where none is found."""
    home = os.environ.get("JAVA_HOME")
    if shutil.which(os.path.join(home, "bin", "java") if home else "java") is None:
        where = f"in JAVA_HOME={home!r}" if home else "on the PATH"
        raise MissingDependencyError(
            f"runtime='spark' needs a Java 17 or 21 runtime, and there is no java {where}. "
            "Debian, Ubuntu: apt-get install openjdk-17-jre-headless"
        )


def is_connect(spark: Any) -> bool:
    """Whether a session is one over Spark Connect."""
    return type(spark).__module__.startswith("pyspark.sql.connect")


def _end_gateway(is_ours: bool) -> None:
    """Let the Java process end that pyspark keeps for a next session."""
    from pyspark import SparkContext

    gateway = SparkContext._gateway
    if not is_ours or gateway is None:
        return
    with SparkContext._lock:
        SparkContext._gateway = SparkContext._jvm = None
    gateway.shutdown()
    process = getattr(gateway, "proc", None)
    if process is not None:
        process.stdin.close()  # its sign to end
        try:
            process.wait(10)
        except Exception:  # noqa: BLE001  (TimeoutExpired; whatever else, it has to end)
            process.kill()
            process.wait()


def _forget_options(builder: Any) -> None:
    """The builder belongs to the class: the next session would be started with our settings."""
    with builder._lock:
        builder._options.clear()


def _first_words(exc: BaseException) -> str:
    """The part of a Java exception that says something."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("at ", "..."))]
    return " ".join(told[:4])[:600] or type(exc).__name__


def _seat_function(door: tuple[str, int, bytes], first: int) -> Any:
    """What each task runs. It holds its own code, for executors that have none of ours."""
    scope: dict[str, Any] = {"__name__": "__main__", "_DOOR": door, "_FIRST": first}
    with open(spark_entry.__file__, encoding="utf-8") as file:
        scope["_TEXT"] = file.read()
    exec(_TASK, scope)  # a function of no module travels by value
    return scope["_seat_of_task"]


_TASK = """
def _seat_of_task(rows):
    import os
    from pyspark import SparkFiles, TaskContext

    for _ in rows:
        pass
    scope = {"__name__": "bigdl_spark_entry"}
    exec(compile(_TEXT, "spark_entry.py", "exec"), scope)
    task = TaskContext.get()
    folder = os.path.abspath(SparkFiles.getRootDirectory())
    scope["sit"](_FIRST + task.partitionId(), task.attemptNumber(), folder, _DOOR)
    return iter(())
"""


@functools.cache
def package() -> tuple[str, bytes]:
    """(What tells our package from another copy, the package as a zip file)."""
    [folder, *_] = bigdl.__path__
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in spark_entry.sources(folder):
            archive.write(path, f"bigdl/{name}")
    return spark_entry.digest(folder), file.getvalue()
