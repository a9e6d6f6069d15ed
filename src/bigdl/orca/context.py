"""The Orca context: which engine runs the work of this process, from init to stop.

Standard library only. An engine comes from the table in ``bigdl.orca.engines``; which row a call
of ``init_orca_context`` means is said here, once.
"""

from __future__ import annotations

import atexit
import os
import re
import threading
from typing import TYPE_CHECKING, Any

from bigdl._base.calls import answers, shown
from bigdl._base.errors import ArgumentError, ConfigError, ContextError
from bigdl._base.registry import nearest
from bigdl.orca import old_names
from bigdl.orca.engines import ENGINES
from bigdl.orca.engines.base import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bigdl.orca.engines.base import Engine

__all__ = ["OrcaContext", "current_engine", "init_orca_context", "stop_orca_context"]

_MODES = ("local", "standalone", "yarn", "yarn-client", "yarn-cluster",
          "k8s", "k8s-client", "k8s-cluster")  # fmt: skip
_RUNTIMES = ("spark", "ray")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

_lock = threading.RLock()
_current: OrcaContext | None = None


class _Settings(type):
    """Answers the settings that were attributes of the class in BigDL 2.x."""

    def __setattr__(cls, name: str, value: Any) -> None:
        answer = old_names.SETTINGS.get(name)
        if answer is None:
            raise AttributeError(f"OrcaContext has no setting {name!r}.")
        if not any(value is same or value == same for same in answer.harmless):
            raise ConfigError(f"OrcaContext.{name} = {shown(value)} is gone: {answer.instead}")

    def __getattr__(cls, name: str) -> Any:
        answer = old_names.SETTINGS.get(name)
        if answer is None:
            raise AttributeError(f"type object 'OrcaContext' has no attribute {name!r}")
        raise AttributeError(f"OrcaContext.{name} is gone: {answer.instead}")


class OrcaContext(metaclass=_Settings):
    """A running context, made by ``init_orca_context``; as a ``with`` block it stops at the end.

    Attributes:
        runtime: "local", "spark" or "ray".
    """

    def __init__(self, engine: Engine, name: str, settings: EngineSettings) -> None:
        self.runtime = name.partition("_")[0] if name != "ray_on_spark" else "spark"
        self._engine = engine
        self._name = name
        self._settings = settings
        self._pid = os.getpid()
        self._is_stopped = False

    def __repr__(self) -> str:
        state = "stopped" if self._is_stopped else f"{self.slots} slots"
        return f"<OrcaContext on {self._name}, {state}>"

    def __enter__(self) -> OrcaContext:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def engine(self) -> Engine:
        """The engine that runs its work.

        Raises:
            ContextError: The context was stopped, or belongs to another process.
        """
        if self._is_stopped or self._pid != os.getpid():
            raise _no_context("This Orca context has been stopped.")
        return self._engine

    @property
    def slots(self) -> int:
        """How many cores' worth of work it does at once."""
        return self.engine.slots()

    @property
    def spark(self) -> Any:
        """The SparkSession; None where there is no Spark."""
        return getattr(self.engine, "spark", None)

    @property
    def ray_address(self) -> str | None:
        """The Ray cluster's address; None where there is no Ray."""
        return getattr(self.engine, "ray_address", None)

    def stop(self) -> None:
        """As ``stop_orca_context``, for this context."""
        global _current
        with _lock:
            if _current is self:
                _current = None
                atexit.unregister(_stop_at_exit)
            if not self._is_stopped and self._pid == os.getpid():
                self._is_stopped = True
                self._engine.close()

    @staticmethod
    def current() -> OrcaContext:
        """The running context.

        Raises:
            ContextError: None is running; the text names ``init_orca_context``.
        """
        if _current is None or _current._pid != os.getpid():
            raise _no_context("No Orca context is running.")
        return _current

    @staticmethod
    def get_spark_session() -> Any:
        """The running context's SparkSession.

        Raises:
            ContextError: No context is running, or it has no Spark.
        """
        context = OrcaContext.current()
        if context.spark is None:
            raise ContextError(
                f"The running Orca context is on {_in_words(context._name)} and has no Spark "
                "session. Stop it, then init_orca_context(runtime='spark')."
            )
        return context.spark


@answers(old_names.INIT)
def init_orca_context(
    cluster_mode: str = "local",
    runtime: str | None = None,
    *,
    cores: int | str | None = None,
    memory: str | None = None,
    num_nodes: int = 1,
    master: str | None = None,
    address: str | None = None,
    conf: Mapping[str, Any] | None = None,
    init_ray_on_spark: bool = False,
    ray_options: Mapping[str, Any] | None = None,
) -> OrcaContext:
    """Start what Orca's work runs on, or join it; without arguments, processes on this machine.

    Args:
        cluster_mode: "local", "standalone" (with ``master``), "yarn", "k8s" (each also
            "-client" or "-cluster").
        runtime: "spark" or "ray". None: Spark if the mode is a cluster's, else local processes.
        cores: A node's cores to use; "*" or None = all that this process may use. Slots are
            cores times nodes.
        memory: A node's memory to use: "2g", "512m".
        num_nodes: Nodes of the cluster.
        master: The cluster manager's URL.
        address: A running Ray cluster to join.
        conf: Spark's settings.
        init_ray_on_spark: Start Ray beside Spark's executors.
        ray_options: How to start Ray.

    Returns:
        The context; the one that runs already if it was started with the same arguments.

    Raises:
        ConfigError: A value is not allowed, or two contradict each other, or this version has
            no such engine.
        ContextError: Another context is running; the text says what it has and how to stop it.
    """
    global _current
    settings = EngineSettings(
        cluster_mode=_known_mode(cluster_mode),
        cores=_whole("cores", None if cores == "*" else cores),
        memory_bytes=_bytes(memory),
        num_nodes=_whole("num_nodes", num_nodes) or 1,
        master=_text("master", master),
        address=_text("address", address),
        conf=_mapping("conf", conf),
        ray_options=_mapping("ray_options", ray_options),
    )
    name = _engine_name(settings, runtime, init_ray_on_spark)
    with _lock:
        running = _current if _current is not None and _current._pid == os.getpid() else None
        if running is not None:
            if (running._name, running._settings) == (name, settings):
                return running
            raise ContextError(
                f"An Orca context is running already, on {_in_words(running._name)}, with other "
                f"arguments{_differences(running, name, settings)}. "
                "Call stop_orca_context() first."
            )
        if name not in ENGINES:
            raise ConfigError(
                f"{_in_words(name)} cannot be used by this version: it runs on local processes. "
                "Use init_orca_context() without runtime= and cluster_mode=."
            )
        context = OrcaContext(ENGINES.get(name).open(settings), name, settings)
        atexit.register(_stop_at_exit, context)
        _current = context
        return context


def stop_orca_context() -> None:
    """End the running context and all that it has started; without one, do nothing."""
    with _lock:
        if _current is not None:
            _current.stop()


def current_engine() -> Engine:
    """The engine of the running context.

    Raises:
        ContextError: None is running; the text names ``init_orca_context``.
    """
    return OrcaContext.current().engine


def _stop_at_exit(context: OrcaContext) -> None:
    context.stop()


def _no_context(why: str) -> ContextError:
    return ContextError(f"{why} Start one: init_orca_context().")


# --- what was asked -----------------------------------------------------------------------------


def _engine_name(settings: EngineSettings, runtime: str | None, ray_on_spark: bool) -> str:
    """The row of ``ENGINES`` that is meant.

    Raises:
        ConfigError: All contradictions, together.
    """
    if runtime is not None and runtime not in _RUNTIMES:
        raise ConfigError(
            f"runtime={shown(runtime)} is not known: 'spark', 'ray', or None for local "
            f"processes.{nearest(str(runtime), _RUNTIMES)}"
        )
    mode, is_cluster = settings.cluster_mode, settings.cluster_mode != "local"
    on_spark = runtime == "spark" or is_cluster or ray_on_spark
    wrong = []
    if runtime == "ray" and is_cluster:
        wrong.append(
            f"cluster_mode={mode!r} with runtime='ray' (a Ray cluster is joined by address=)"
        )
    if runtime == "ray" and ray_on_spark:
        wrong.append("init_ray_on_spark=True with runtime='ray' (it starts Ray on Spark)")
    if mode == "standalone" and settings.master is None:
        wrong.append("cluster_mode='standalone' without master= (\"spark://host:7077\")")
    if settings.master is not None and mode not in (
        "standalone",
        "k8s",
        "k8s-client",
        "k8s-cluster",
    ):
        wrong.append(f"master= with cluster_mode={mode!r} (it is for standalone and k8s)")
    if settings.address is not None and runtime != "ray":
        wrong.append("address= without runtime='ray' (it is a Ray cluster's)")
    if settings.conf and not on_spark:
        wrong.append("conf= without Spark (it is for runtime='spark')")
    if settings.ray_options and not (runtime == "ray" or ray_on_spark):
        wrong.append("ray_options= without Ray (runtime='ray', or init_ray_on_spark=True)")
    if settings.num_nodes > 1 and not is_cluster:
        wrong.append(f"num_nodes={settings.num_nodes} with cluster_mode='local' (it is one node)")
    if wrong:
        raise ConfigError("The context cannot be started so: " + "; ".join(wrong) + ".")
    if runtime == "ray":
        return "ray"
    return "ray_on_spark" if ray_on_spark else "spark" if on_spark else "local"


def _known_mode(mode: Any) -> str:
    if not isinstance(mode, str):
        raise ArgumentError(f"cluster_mode has to be a str, not {type(mode).__name__}.")
    if mode in _MODES:
        return mode
    if mode in old_names.MODES:
        raise ConfigError(f"cluster_mode={mode!r} is gone: {old_names.MODES[mode]}.")
    raise ConfigError(
        f"cluster_mode={mode!r} is not known; have {', '.join(_MODES)}.{nearest(mode, _MODES)}"
    )


def _whole(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"{name} has to be a whole number, not {shown(value)}.")
    if value < 1:
        raise ConfigError(f"{name}={value} cannot be: need at least 1.")
    return value


def _bytes(memory: Any) -> int | None:
    """Spark's way to write a size: "2g", "512m"."""
    if memory is None:
        return None
    if not isinstance(memory, str):
        raise ArgumentError(f'memory has to be a str such as "2g", not {shown(memory)}.')
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", memory.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f'memory={memory!r} cannot be read: write it as "2g" or "512m".')
    return size


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ArgumentError(f"{name} has to be a str, not {shown(value)}.")
    return value or None


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        return dict(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} has to be a dict, not {shown(value)}.") from None


def _in_words(name: str) -> str:
    words = {"local": "local processes", "ray_on_spark": "Ray on Spark"}
    return words.get(name, name.capitalize())


def _differences(running: OrcaContext, name: str, settings: EngineSettings) -> str:
    """ " (cores=2, asked 4)": what another init has asked otherwise."""
    if running._name != name:
        return f" (asked for {_in_words(name)})"
    there, asked = vars(running._settings), vars(settings)
    parts = [
        f"{key}={there[key]!r}, asked {value!r}"
        for key, value in asked.items()
        if there[key] != value
    ]
    return f" ({'; '.join(parts)})"
