"""Objects on their way between caller and workers, whatever the engine.

Standard library only.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import TYPE_CHECKING, Any

from bigdl._base import workers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["dumps", "dumps_abroad", "loads_abroad", "search_abroad"]

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
_LISTS = frozenset({list, tuple, set, frozenset})
_ITEM_LIMIT = 1000


def dumps(value: Any) -> bytes:
    """Pickle ``value`` so that a worker, or the caller, can read it.

    As ``_base.workers.dumps``, which looks at every loaded module, but in microseconds for
    plain data: numbers, texts, arrays and small containers of them.
    """
    if _plain(value, _ITEM_LIMIT) >= 0:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return workers.dumps(value)


def dumps_abroad(value: Any) -> bytes:
    """Pickle ``value`` for processes that no engine has started; ``loads_abroad`` reads it."""
    return pickle.dumps(([path or os.getcwd() for path in sys.path], dumps(value)))


def loads_abroad(data: bytes) -> Any:
    """What ``dumps_abroad`` was given; the caller's modules are found where it finds them."""
    paths, pickled = pickle.loads(data)
    sys.path[:] = search_abroad(sys.path, paths)
    return pickle.loads(pickled)


def search_abroad(ground: Sequence[str], paths: Sequence[str]) -> list[str]:
    """A search path for the caller's modules: this process' own, then as much of the caller's
    as there is on this host."""
    there = [path for path in paths if os.path.exists(path or os.curdir)]
    return [*ground, *(path for path in there if path not in ground)]


def _plain(value: Any, left: int) -> int:
    """How many of ``left`` items are left after ``value``; negative if it is not plain."""
    kind = type(value)
    if kind in _ATOMS or _is_array(value):
        return left - 1
    if kind in _LISTS:
        items = value
    elif kind is dict:
        items = [part for item in value.items() for part in item] if len(value) < left else None
    else:
        return -1
    if items is None or len(items) > left:
        return -1
    left -= 1
    for item in items:
        left = _plain(item, left)
        if left < 0:
            return -1
    return left


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return False
    if type(value) is numpy.ndarray:
        return not value.dtype.hasobject
    return isinstance(value, numpy.number | numpy.bool_) and type(value).__module__ == "numpy"
