"""Starts the workers of one call, waits for them, and finds out whose failure it was."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import ConfigError, TimeLimitError, WorkerError
from bigdl._base.rendezvous import Rendezvous
from bigdl._base.workers import Workers, first_ended

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl._base.workers import Worker
    from bigdl.nano.pytorch.processes.settings import Settings

__all__ = ["launch"]

#: The worker that failed first has so long to give its own account.
_ACCOUNT_S = 5.0
#: After Ctrl-C workers may end in good order for so long.
_GRACE_S = 5.0


def launch(
    settings: Settings,
    function: Callable[..., None],
    write: Callable[[Path], Any],
    read: Callable[[Path], Any],
    *,
    preload: tuple[str, ...],
    timeout_s: float = 120.0,
) -> Any:
    """Run ``function(ticket, rank, process, folder)`` in each of the workers.

    Args:
        settings: How many, and how each runs.
        function: Of a module, so that it travels by name.
        write: Lays down, in a folder, what the workers read there.
        read: Gives what is to be returned from what they laid down there.
        preload: Modules that are loaded once for all workers.
        timeout_s: So long all may take to be there.

    Raises:
        WorkerLostError: A worker died.
        TimeLimitError: Not all were there in time.
        Exception: What a worker raised first, as its own type; its cause is a ``WorkerError``.
    """
    with ExitStack() as stack:
        owners = [
            stack.enter_context(Workers(preload=warm, env=one))
            for warm, one in _interpreters(settings, preload)
        ]
        folder = Path(owners[0].scratch())
        try:
            write(folder)
        except (TypeError, AttributeError, RuntimeError, ValueError) as exc:
            raise ConfigError(
                "What this call was given cannot be sent to worker processes: "
                f"{type(exc).__name__}: {exc}. Make such objects in setup(), or in the workers "
                "where they are needed, or train with num_processes=1."
            ) from exc
        rendezvous = stack.enter_context(Rendezvous(settings.world, timeout_s=timeout_s))
        workers = [
            owners[rank % len(owners)].start(
                function, rendezvous.ticket, rank, process, str(folder)
            )
            for rank, process in enumerate(settings.each)
        ]
        try:
            _wait(workers, rendezvous)
        except KeyboardInterrupt:
            _interrupt(workers)
            raise
        return read(folder)


def _interpreters(
    settings: Settings, preload: tuple[str, ...]
) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """What each interpreter that is started loads, and its variables."""
    if settings.backend == "spawn":
        return [((), one.variables()) for one in settings.each]
    most = max(settings.each, key=lambda one: one.threads or len(one.cores or ()))
    return [(preload, most.variables())]


def _wait(workers: list[Worker], rendezvous: Rendezvous) -> None:
    """Until all have ended; raises the failure of the one that failed first."""
    waiting = dict(enumerate(workers))
    while waiting:
        ended = first_ended(list(waiting.values()))
        rank = next(rank for rank, one in waiting.items() if one is ended)
        del waiting[rank]
        error = _error_of(ended, rank)
        if error is None:
            continue
        first = rendezvous.failure
        if first is not None and first.kind == "late":
            raise first.error()
        if first is not None and first.rank in waiting:
            # who failed first says it best; others only followed it
            other = _error_of(waiting[first.rank], first.rank, _ACCOUNT_S)
            error = error if other is None or isinstance(other, TimeLimitError) else other
        raise error


def _error_of(worker: Worker, rank: int, timeout_s: float | None = None) -> BaseException | None:
    try:
        worker.result(timeout_s=timeout_s)
    except Exception as exc:  # noqa: BLE001  (whatever the user's code raised there)
        for one in (exc, exc.__cause__):
            if isinstance(one, WorkerError) and one.rank is None:
                one.rank = rank
        return exc
    return None


def _interrupt(workers: list[Worker]) -> None:
    """Let the workers end as a program does that was interrupted; who takes long is killed."""
    deadline = time.monotonic() + _GRACE_S
    for worker in workers:
        if worker.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGINT)
    for rank, worker in enumerate(workers):
        _error_of(worker, rank, max(0.01, deadline - time.monotonic()))
