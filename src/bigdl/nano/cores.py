"""Which cores each of several processes gets. Standard library only; changes nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bigdl._base import machine
from bigdl._base.calls import shown
from bigdl._base.environment import ProcessSettings
from bigdl._base.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["check_count", "divided", "near_cores"]


def near_cores() -> tuple[int, ...]:
    """The cores to give away, nearest together first: no more than a quota lets be busy."""
    ids = [core for node in machine.numa_nodes() for core in node]
    return tuple(ids[: machine.cores()])


def divided(
    processes: int,
    each: int | None = None,
    lists: Sequence[Sequence[int]] | None = None,
    *,
    allocator: Path | None = None,
    names: tuple[str, str, str] = ("num_processes", "cores_per_process", "cpu_for_each_process"),
) -> tuple[ProcessSettings, ...]:
    """How each of ``processes`` shall run: on cores of its own, with as many threads.

    Args:
        processes: How many.
        each: Cores for each; None is an equal part of all. Where there are fewer cores than
            processes, None leaves the cores to the system, and each has one thread.
        lists: The very cores of each process, instead of ``each``.
        allocator: A library that each allocates memory with.
        names: What the caller calls the first three arguments.

    Raises:
        ArgumentError: An argument of another kind.
        ConfigError: It is not possible here; the text has what there is.
    """
    check_count(names[0], processes)
    if lists is not None:
        if each is not None:
            raise ConfigError(f"{names[1]}= and {names[2]}= contradict each other; give one.")
        return _listed(processes, lists, allocator, names)
    usable = near_cores()
    if each is None:
        each = len(usable) // processes
        if each == 0:
            alone = ProcessSettings(threads=1, allocator=allocator)
            return (alone,) * processes
    check_count(names[1], each)
    if processes * each > len(usable):
        raise ConfigError(
            f"{names[0]}={processes} with {names[1]}={each} needs {processes * each} cores, but "
            f"{len(usable)} are usable here."
        )
    return tuple(_settings(usable[i * each : (i + 1) * each], allocator) for i in range(processes))


def check_count(name: str, value: Any) -> None:
    """Hold an argument to a whole number of at least 1.

    Raises:
        ArgumentError: It is no whole number.
        ConfigError: It is less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"{name} takes a whole number, not {shown(value)}.")
    if value < 1:
        raise ConfigError(f"{name}={value} cannot be used: need at least 1.")


def _listed(
    processes: int, lists: Any, allocator: Path | None, names: tuple[str, str, str]
) -> tuple[ProcessSettings, ...]:
    if not isinstance(lists, (list, tuple)):
        raise ArgumentError(f"{names[2]} takes a list of lists of cores, not {shown(lists)}.")
    for one in lists:
        if not isinstance(one, (list, tuple)) or not all(type(core) is int for core in one):
            raise ArgumentError(f"{names[2]} takes a list of lists of cores, as [[0, 1], [2, 3]].")
    if len(lists) != processes:
        raise ConfigError(
            f"{names[2]} has {len(lists)} lists of cores, but {names[0]} is {processes}: need one "
            "a process."
        )
    wrong = [f"{list(one)}: {why}" for one in lists if (why := _fault(one))]
    if wrong:
        raise ConfigError(f"{names[2]} cannot be used: {'; '.join(wrong)}.")
    return tuple(_settings(one, allocator) for one in lists)


def _fault(cores: Sequence[int]) -> str | None:
    if not cores:
        return "need at least one core"
    if len(set(cores)) < len(cores):
        return "each core once"
    missing = sorted(set(cores) - set(machine.core_ids()))
    return f"no core {missing} (usable: {list(machine.core_ids())})" if missing else None


def _settings(cores: Iterable[int], allocator: Path | None) -> ProcessSettings:
    ids = tuple(cores)
    if sys.platform == "linux":
        return ProcessSettings(cores=ids, allocator=allocator)
    return ProcessSettings(threads=len(ids), allocator=allocator)  # no affinity to be had
