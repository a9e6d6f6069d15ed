"""Small Python values among the workers of one program.

They are pickled: only for what these workers made themselves.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.sync import gather_bytes
from bigdl._base.workers import dumps

if TYPE_CHECKING:
    from bigdl._base.collective import Collective

__all__ = ["broadcast_value", "gather_values"]


def gather_values(collective: Collective, value: Any) -> list[Any]:
    """Every worker's ``value``, by rank. All workers call it."""
    if collective.world == 1:
        return [value]
    return [pickle.loads(one) for one in gather_bytes(collective, dumps(value))]


def broadcast_value(collective: Collective, value: Any, root: int = 0) -> Any:
    """What ``value`` is on worker ``root``; that worker gets its own object. All call it."""
    if collective.world == 1:
        return value
    is_mine = collective.rank == root
    payload = np.frombuffer(dumps(value), np.uint8) if is_mine else np.empty(0, np.uint8)
    length = np.array([payload.size], np.int64)
    collective.broadcast(length, root)
    content = payload.copy() if is_mine else np.empty(int(length[0]), np.uint8)
    collective.broadcast(content, root)
    return value if is_mine else pickle.loads(content.tobytes())
