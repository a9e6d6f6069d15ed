"""A worker's own process, made as it was asked for; and its place among the others."""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.collective import connect
from bigdl._base.rendezvous import join

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl._base.collective import Collective
    from bigdl._base.environment import ProcessSettings
    from bigdl._base.gang import Ticket
    from bigdl.nano.pytorch.plan import streams

__all__ = ["flags", "set_flags", "taken", "word_of"]

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


def flags() -> dict[str, Any]:
    """Settings of torch that a worker takes over from its caller."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
    }


def set_flags(found: dict[str, Any]) -> None:
    """Take over the caller's ``flags``."""
    torch.use_deterministic_algorithms(found["deterministic"], warn_only=found["warn_only"])
    torch.set_default_dtype(found["dtype"])
    torch.set_float32_matmul_precision(found["precision"])


def word_of(state: streams.State) -> int:
    """A number that names where the caller's streams are; nothing is drawn from them."""
    content = state["torch"].numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "big")
