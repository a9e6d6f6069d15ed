"""Sums, slices and copies of NumPy arrays among the workers of a gang.

Standard library and NumPy only. ``connect(gang)`` takes shared memory between workers on one
host and TCP between hosts; sums are made in the order of ranks, so they have the same bits on
every worker and in every run. A worker that dies ends the work of all within seconds.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from bigdl._base.collective.base import Collective, Compress
from bigdl._base.errors import ConfigError
from bigdl._base.registry import Registry

if TYPE_CHECKING:
    from bigdl._base.gang import Gang

__all__ = ["COLLECTIVES", "Collective", "Compress", "connect"]

logger = logging.getLogger(__name__)

COLLECTIVES: Registry[type[Collective]] = Registry(
    "collective",
    {
        "alone": "bigdl._base.collective.alone:Alone",
        "shared": "bigdl._base.collective.shared:SharedMemory",
        "tcp": "bigdl._base.collective.tcp:Tcp",
        "hierarchical": "bigdl._base.collective.hierarchical:Hierarchical",
    },
)


def connect(gang: Gang, *, kind: str = "auto", timeout_s: float | None = 600.0) -> Collective:
    """Connect the workers of ``gang``; all of them have to call it.

    Args:
        gang: From ``rendezvous.join``; it has to stay open while the collective is used.
        kind: "auto", or a name in ``COLLECTIVES``.
        timeout_s: How long a call waits for workers that live but do not come; None = for ever.

    Raises:
        ConfigError: The workers cannot be connected that way, or a value is not allowed.
        WorkerError: Another worker failed meanwhile (or ``WorkerLostError``: is gone).
        TimeLimitError: Another worker did not come in time.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise ConfigError(f"timeout_s={timeout_s} cannot be: need more than 0, or None.")
    if kind != "auto":
        return _build(gang, kind, timeout_s)
    from bigdl._base.collective.shared import NoSharedMemoryError

    wanted = _best(gang)
    try:
        return _build(gang, wanted, timeout_s)
    except NoSharedMemoryError as exc:  # all workers know of it, so all turn to TCP
        logger.warning("Workers on one host use TCP among themselves: %s", exc)
        return _build(gang, "tcp", timeout_s)


def _best(gang: Gang) -> str:
    if gang.world == 1:
        return "alone"
    if len(gang.hosts) == 1:
        return "shared"
    return "tcp" if len(gang.hosts) == gang.world else "hierarchical"


def _build(gang: Gang, kind: str, timeout_s: float | None) -> Collective:
    from bigdl._base.collective.shared import NoSharedMemoryError

    chosen = COLLECTIVES.get(kind)
    try:
        return chosen(gang, timeout_s=timeout_s)  # type: ignore[call-arg]
    except NoSharedMemoryError:
        raise
    except BaseException as exc:
        gang.abort(f"{type(exc).__name__}: {exc}")
        raise
