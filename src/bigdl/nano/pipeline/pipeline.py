"""A pipeline of functions, each in worker processes of its own. Knows no framework."""

from __future__ import annotations

import functools
import pickle
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bigdl._base.calls import shown
from bigdl._base.environment import ProcessSettings, find_allocator
from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.registry import nearest
from bigdl._base.workers import dumps
from bigdl.nano.cores import check_count, near_cores
from bigdl.nano.pipeline.stages import Stage, Stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bigdl._base.workers import Workers
    from bigdl.nano.pipeline.worker import Facts

__all__ = ["Pipeline"]

_OPTIONS = ("worker_num", "cores_per_worker")


class Pipeline:
    """Functions that work on a stream of values at the same time, each in its own processes.

    While one value is in the last stage, the next ones are in the stages before it: together
    they take as long as the slowest stage, not as long as all of them. Values keep their order,
    and pass each stage in it; only so many are under way that every worker is busy.

    Args:
        stages: ``(name, function)`` or ``(name, function, options)``, in order. A function takes
            one value and gives the next; lambdas and closures are fine. Options are
            "worker_num" (1: how many processes) and "cores_per_worker" (None: no cores of its
            own; else so many cores that no other stage has, and as many threads).

    Raises:
        ArgumentError: A stage or an option is of another kind, or cannot be sent to a process.
        ConfigError: A value cannot be used, or there are too few cores.
        WorkerLostError: A worker died as it was started.
    """

    def __init__(
        self,
        stages: Sequence[
            tuple[str, Callable[[Any], Any]]
            | tuple[str, Callable[[Any], Any], Mapping[str, int | None]]
        ],
    ) -> None:
        read = [_read(stage, number) for number, stage in enumerate(_listed(stages))]
        names = [name for name, *_ in read]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"Two stages of the Pipeline are called {twice!r}.")
        self.names = tuple(names)
        placed = _placed([(name, count, cores) for name, _, count, cores in read])
        self._stages = Stages(
            [
                Stage(name=f"stage {name!r}", open_for=_Opening(name, fn), settings=settings)
                for (name, fn, _, _), settings in zip(read, placed, strict=True)
            ],
            whole="Pipeline",
            advice="The Pipeline can be run again: a new worker takes its place.",
            env=ProcessSettings(allocator=find_allocator()).variables(),
        )
        self._end = weakref.finalize(self, self._stages.close)

    def run(self, inputs: Iterable[Any]) -> list[Any]:
        """What comes out of the last stage for each of ``inputs``, in order.

        Args:
            inputs: Any iterable; it is read as fast as the stages take values.

        Raises:
            Exception: What a stage's function raised, as its own type; its cause, a
                ``WorkerError``, names stage and input. Of several, that of the first input. The
                pipeline can be run again.
            WorkerLostError: A worker died. The pipeline can be run again, too.
            NotReadyError: It is closed.
        """
        if isinstance(inputs, (str, bytes)) or not hasattr(inputs, "__iter__"):
            raise ArgumentError(f"run() takes a list of inputs, not {shown(inputs)}.")
        return self._stages.run(inputs)

    def workers(self) -> dict[str, list[Facts]]:
        """The worker processes of each stage: process number, cores, threads, allocator."""
        return dict(zip(self.names, self._stages.facts(), strict=True))

    def close(self) -> None:
        """End the processes; calling it twice is harmless."""
        self._end()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Pipeline({' -> '.join(self.names)})"


class _Opening:
    """A function as it was when the pipeline was made; it needs nothing to be opened."""

    def __init__(self, name: str, fn: Callable[[Any], Any]) -> None:
        try:
            self._content = dumps(fn)
        except Exception as exc:
            raise ArgumentError(
                f"The function of stage {name!r} cannot be sent to a worker process: "
                f"{str(exc).rstrip('.')}. What cannot be pickled can be made inside it, at its "
                "first call."
            ) from exc

    def __call__(self, workers: Workers) -> Callable[[], Callable[[Any], Any]]:
        return functools.partial(pickle.loads, self._content)


# --- what the user wrote ----------------------------------------------------------------------


def _listed(stages: Any) -> list[Any]:
    if not isinstance(stages, (list, tuple)):
        raise ArgumentError(f"Pipeline() takes a list of (name, function), not {shown(stages)}.")
    if not stages:
        raise ConfigError("Pipeline([]) has no stage; need at least one.")
    return list(stages)


def _read(stage: Any, number: int) -> tuple[str, Callable[[Any], Any], int, int | None]:
    """(name, function, workers, cores for each) of one stage."""
    if not isinstance(stage, (list, tuple)) or len(stage) not in (2, 3):
        raise ArgumentError(
            f"Stage {number} of the Pipeline is {shown(stage)}; need (name, function) or "
            "(name, function, {'worker_num': 1, 'cores_per_worker': None})."
        )
    name, fn, options = (*stage, {})[:3]
    if not isinstance(name, str):
        raise ArgumentError(f"Stage {number}'s name takes text, not {shown(name)}.")
    if not callable(fn):
        raise ArgumentError(f"Stage {name!r} takes a function, not {shown(fn)}.")
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise ArgumentError(f"The options of stage {name!r} are {shown(options)}; need a dict.")
    for option in options:
        if option not in _OPTIONS:
            raise ArgumentError(
                f"Stage {name!r} has no option {option!r}; have {', '.join(_OPTIONS)}."
                f"{nearest(str(option), _OPTIONS)}"
            )
    count, cores = options.get("worker_num", 1), options.get("cores_per_worker")
    check_count(f"worker_num of stage {name!r}", count)
    if cores is not None:
        check_count(f"cores_per_worker of stage {name!r}", cores)
    return name, fn, count, cores


def _placed(stages: Sequence[tuple[str, int, int | None]]) -> list[tuple[ProcessSettings, ...]]:
    """How the workers of each stage run: those that have asked for cores get their own."""
    free = list(near_cores())
    asked = [(name, count * cores) for name, count, cores in stages if cores]
    if sum(need for _, need in asked) > len(free):
        needs = ", ".join(f"stage {name!r} {need}" for name, need in asked)
        raise ConfigError(
            f"The stages need more cores than the {len(free)} that are usable here: {needs}."
        )
    placed = []
    for _, count, cores in stages:
        settings = []
        for _ in range(count):
            own, free = tuple(free[: cores or 0]), free[cores or 0 :]
            settings.append(ProcessSettings(cores=own or None))
        placed.append(tuple(settings))
    return placed
