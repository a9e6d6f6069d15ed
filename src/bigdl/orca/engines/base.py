"""The contract of everything that runs work: an *engine* has slots, and workers that fill them.

Standard library only; names no cluster and no framework. Functions, arguments, values and events
travel pickled (classes of ``__main__`` and closures too), and workers share no memory with the
caller. ``bigdl.testing.engine`` has the tests that every engine passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from bigdl._base.errors import ConfigError, ContextError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bigdl.orca.engines.preflight import Preflight

__all__ = [
    "Engine",
    "EngineSettings",
    "GangSetup",
    "Ref",
    "Task",
    "check_gang",
    "check_task",
    "closed",
]

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What ``init_orca_context`` was asked for, checked as far as it can be without an engine.

    Args:
        cluster_mode: "local", "standalone", "yarn", "yarn-client", … .
        cores: Slots a node; None = all that this process may use.
        memory_bytes: Memory a node; None = the engine's own default.
        num_nodes: Nodes.
        master: The cluster manager's URL.
        address: Of a running cluster that is to be joined.
        conf: Settings of the cluster's own.
        ray_options: Arguments for starting Ray.
    """

    cluster_mode: str = "local"
    cores: int | None = None
    memory_bytes: int | None = None
    num_nodes: int = 1
    master: str | None = None
    address: str | None = None
    conf: Mapping[str, Any] = field(default_factory=dict)
    ray_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GangSetup:
    """How the workers of a gang are started and watched.

    Args:
        cores: Slots a worker; each has so many threads, and cores of its own where the engine
            can give it some. None = an equal part of its node's, at least 1.
        env: Variables for the workers, set before their interpreter starts.
        preload: Modules that an engine may import before the work comes, to start sooner.
        start_timeout_s: Within so many seconds all workers run, or none does. None = what the
            engine thinks right.
        silence_s: A worker from which no event comes for so long is taken for hung, and the gang
            ends with a ``WorkerLostError``. A function is asked anew each time; None = never.
        on_output: Called in the caller with (rank, text) for whole lines that a worker has
            written to its stdout or stderr. None = they go to our stderr, with the rank.
    """

    cores: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    start_timeout_s: float | None = None
    silence_s: float | Callable[[], float] | None = None
    on_output: Callable[[int, str], None] | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.cores is not None and self.cores < 1:
            wrong.append(f"cores={self.cores} (need >= 1)")
        if self.start_timeout_s is not None and not self.start_timeout_s > 0:
            wrong.append(f"start_timeout_s={self.start_timeout_s} (need > 0)")
        if self.silence_s is not None and not callable(self.silence_s) and self.silence_s <= 0:
            wrong.append(f"silence_s={self.silence_s} (need > 0, or None)")
        if wrong:
            raise ConfigError("A gang cannot be started so: " + ", ".join(wrong) + ".")


@runtime_checkable
class Task(Protocol[T_co]):
    """One call that runs somewhere. Its events are handed on in the thread that waits for it."""

    def result(self, timeout_s: float | None = None) -> T_co:
        """Wait for the value; asking again gives it again.

        Raises:
            TimeLimitError: It is not there yet; the task goes on.
            WorkerLostError: The worker died; the text holds its signal or exit code.
            ContextError: The engine was closed.
            Exception: What the call raised, as its own type; its cause is a ``WorkerError``.
        """

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Hand on the events that have come, wait so long for the end; whether it is there."""

    def cancel(self) -> None:
        """End it, with all that it has started; ``result`` then raises a ``WorkerError``.

        One that has ended already stays as it is. It is gone when this returns.
        """


@runtime_checkable
class Ref(Protocol):
    """A value that an engine keeps, for as long as this object lives.

    It may be pickled into the arguments of a task, or of a gang, and be read there. When no ref
    to a value is left, the value goes, and work that was still to make it is ended.
    """

    def get(self) -> Any:
        """The value, in the caller or in any worker of the engine; a copy of the reader's own.

        Raises:
            Exception: What making it raised, as ``Task.result``.
        """


@runtime_checkable
class Engine(Protocol):
    """Where work runs. Any thread may use it; all calls raise ``ContextError`` once it is closed.

    A failed call leaves it usable. Two calls may run at the same time if there are slots for
    both; what finds no slot free waits, in the order in which it came.
    """

    #: Its name in the table.
    name: ClassVar[str]

    @classmethod
    def open(cls, settings: EngineSettings) -> Engine:
        """Start, or join, what the settings describe.

        Raises:
            ConfigError: A setting has no meaning here, or cannot be kept.
        """

    def slots(self) -> int:
        """How many cores' worth of work it does at once, on all nodes together."""

    def node_slots(self) -> int:
        """The most slots that one worker can have anywhere: those of a node, the smallest."""

    def preflight(self) -> Preflight:
        """Ask every node for the facts that work depends on; takes a few seconds at most."""

    def submit(
        self,
        fn: Callable[..., T_co],
        *args: Any,
        cores: int = 1,
        on_event: Callable[[Any], None] | None = None,
    ) -> Task[T_co]:
        """Begin ``fn(*args)`` in a worker process, as soon as ``cores`` slots are free.

        Args:
            fn: What to run; ``bigdl.orca.engines.worker.emit`` in it sends events.
            args: Its arguments; a ``Ref`` stays one, and can be read.
            cores: Slots it takes, all on one node.
            on_event: Called with each event, in order, by the thread that waits for the task.

        Raises:
            ConfigError: ``cores`` is more than the engine offers.
        """

    def gang(
        self,
        fn: Callable[..., T_co],
        workers: int,
        *,
        args_of: Callable[[int], Sequence[Any]] | None = None,
        on_event: Callable[[int, Any], None] | None = None,
        setup: GangSetup | None = None,
    ) -> list[T_co]:
        """Run ``fn(context, *args_of(rank))`` in ``workers`` processes that know each other.

        Args:
            fn: Gets a ``WorkerContext``: rank, world, the joined ``Gang``, its cores.
            workers: How many; all of them start in time, or none does.
            args_of: Called here, for each rank, for that worker's further arguments.
            on_event: Called here with (rank, event) while they run; a worker's come in order.
                What it raises ends the gang, and is raised.
            setup: How they are started and watched.

        Returns:
            What the workers return, by rank. All of them are gone then.

        Raises:
            ConfigError: More workers than slots.
            TimeLimitError: They did not all start in time.
            WorkerLostError: A worker died, or is hung.
            Exception: What the first worker that failed has raised, as its own type; its cause
                is a ``WorkerError`` with rank and traceback. The others are ended.
        """

    def scatter(self, values: Sequence[Any]) -> list[Ref]:
        """Hand values over to the engine, which spreads them over its nodes as it sees fit."""

    def map(self, fn: Callable[[Any], Any], refs: Sequence[Ref]) -> list[Ref]:
        """Refs to ``fn(value)`` for each ref, in order, near the data, without bringing it here.

        An engine may start at once or when the first of them is read, but calls ``fn`` once for
        each, unless a worker was lost and the engine tries again. What ``fn`` raises comes out
        where a result is read; the worker it ran in is kept, so what a module holds there is
        found again by the next call.
        """

    def split(
        self, fn: Callable[[Any], Sequence[Any]], refs: Sequence[Ref], parts: int
    ) -> list[list[Ref]]:
        """As ``map``, for a function that gives ``parts`` values: each is kept by itself.

        So what belongs together elsewhere can be sent there without the rest. Where ``fn`` gives
        another number of values, reading any of them raises ``DataError``.
        """

    def gather(self, refs: Sequence[Ref]) -> list[Any]:
        """The values, in order. Raises what the first failed one, in order, has raised."""

    def close(self) -> None:
        """End all that runs and give everything back; calling it twice is harmless."""


# --- what every engine checks and says alike ----------------------------------------------------


def check_gang(
    workers: int, cores: int | None, slots: int, node: int | None = None, grain: int = 1
) -> int:
    """Refuse a gang that ``slots`` cannot hold; slots a worker.

    Args:
        workers: As asked.
        cores: As asked; None = an equal part.
        slots: Of all nodes.
        node: Of one node; None = there is one.
        grain: Slots are given in multiples of so many.

    Raises:
        ConfigError: With what was asked, and what there is.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"A gang of {workers!r} workers cannot be: need a whole number >= 1.")
    node = min(node or slots, slots)
    nodes = slots // node
    each = cores
    if each is None:
        each = max(1, node // math.ceil(workers / nodes))
        each -= each % grain if each > grain else 0
    taken = math.ceil(each / grain) * grain
    most = nodes * (node // taken)
    if workers > most:
        of = f" of {each} cores" if each > 1 else ""
        offer = f"{slots} slots" + (f", {node} a node" if nodes > 1 else "")
        offer += f", {grain} a task" if grain > 1 else ""
        advice = f"Use at most {most} workers{of}" if most else f"Use at most {node} cores each"
        raise ConfigError(
            f"asked {workers} workers{of}, the cluster offers {offer}. {advice}, or start the "
            "context with more cores."
        )
    return each


def check_task(cores: int, slots: int) -> None:
    """Refuse a task that ``slots`` cannot hold.

    Raises:
        ConfigError: With what was asked, and what there is.
    """
    if not 1 <= cores <= slots:
        raise ConfigError(
            f"asked {cores} cores for a task, the cluster offers {slots}: need 1 … {slots}."
        )


def closed() -> ContextError:
    """What every call of an engine raises that has been closed."""
    return ContextError("This Orca context has been stopped. Start another: init_orca_context(…).")
