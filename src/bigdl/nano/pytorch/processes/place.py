"""A worker's own process, made as it was asked for; and its place among the others."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from bigdl._base.collective import connect
from bigdl._base.rendezvous import join

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl._base.collective import Collective
    from bigdl._base.environment import ProcessSettings
    from bigdl._base.gang import Ticket

__all__ = ["taken"]

#: As long as PyTorch's own workers wait for one that lives but does not come.
_TIMEOUT_S = 1800.0


@contextmanager
def taken(ticket: Ticket, rank: int, process: ProcessSettings) -> Iterator[Collective]:
    """Only in a process that was started for it: take its cores and threads, meet the others.

    A block that ends with an exception ends the work of all workers.
    """
    if process.cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, process.cores)
    threads = process.threads or len(process.cores or ())
    if threads:
        torch.set_num_threads(threads)
    with join(ticket, rank) as gang, connect(gang, timeout_s=_TIMEOUT_S) as collective:
        yield collective
