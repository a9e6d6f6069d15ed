"""Small values of every worker, for every worker. NumPy only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bigdl._base.collective import Collective

__all__ = ["gather_bytes"]


def gather_bytes(collective: Collective, payload: bytes) -> list[bytes]:
    """Every worker's ``payload``, by rank; their lengths may differ. All workers call it.

    Every worker holds the longest payload once a worker for a moment: for metrics' states and
    the like, not for data.

    Raises:
        WorkerError, TimeLimitError: As the collective's calls.
    """
    world, rank = collective.world, collective.rank
    lengths = np.zeros(world, np.int64)
    lengths[rank] = len(payload)
    collective.all_reduce(lengths)
    # rows of whole words, of which each worker brings its own and zeros for the others
    words = np.zeros((world, -(-int(lengths.max()) // 8)), np.int64)
    words[rank].view(np.uint8)[: len(payload)] = np.frombuffer(payload, np.uint8)
    collective.all_reduce(words)
    return [words[r].view(np.uint8)[: lengths[r]].tobytes() for r in range(world)]
