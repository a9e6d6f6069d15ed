"""Rows of whatever a shard holds: counted, cut, put together. NumPy only.

A frame, a column and an array have rows, as has a nest of arrays that agree on their first axis.
In any other list each item is a row. What pandas holds is recognised without importing it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base import trees
from bigdl._base.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["count", "cut", "is_pandas", "join"]


def count(shard: Any) -> int:
    """How many rows it has.

    Raises:
        DataError: It has none that could be counted, or its arrays disagree.
    """
    if _has_axis(shard):
        return int(shard.shape[0])
    if _is_nest(shard):
        return trees.rows(shard, "the shard")
    if isinstance(shard, list):
        return len(shard)
    raise _no_rows(shard)


def cut(shard: Any, start: int, stop: int) -> Any:
    """Rows ``start`` up to ``stop``, of the same kind.

    Raises:
        DataError: It has no rows.
    """
    if _has_axis(shard):
        return _cut_leaf(shard, start, stop)
    if _is_nest(shard):
        return trees.map_leaves(lambda leaf: _cut_leaf(leaf, start, stop), shard)
    if isinstance(shard, list):
        return shard[start:stop]
    raise _no_rows(shard)


def join(shards: Sequence[Any]) -> Any:
    """All rows in order, as one shard of the same kind.

    Raises:
        DataError: They are of different kinds, or nested differently, or have no rows.
    """
    if len(shards) == 1:
        return shards[0]
    shards = [shard for shard in shards if not _is_bare(shard)] or list(shards[:1])
    kinds = {kind: shard for shard in shards for kind in [_kind_of(shard)]}
    if len(kinds) > 1:
        found = " and ".join(sorted(type(shard).__name__ for shard in kinds.values()))
        raise DataError(f"Shards of different kinds cannot be put together: {found}.")
    if next(iter(kinds)) == "items":
        return [item for shard in shards for item in shard]
    if next(iter(kinds)) == "nest":
        return trees.concat(shards, join=_join_leaves, name="the shard")
    return _join_leaves(shards)


def is_pandas(value: Any) -> bool:
    """Whether it is a frame or a column of pandas'."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, (pandas.DataFrame, pandas.Series))


def _has_axis(value: Any) -> bool:
    shape = getattr(value, "shape", None)
    return isinstance(shape, tuple) and len(shape) > 0


def _is_nest(value: Any) -> bool:
    if not isinstance(value, (Mapping, tuple, list)):
        return False
    found = trees.leaves(value)
    return bool(found) and all(map(_has_axis, found))


def _is_bare(value: Any) -> bool:
    """An empty list tells nothing of what the others hold."""
    return isinstance(value, list) and not value


def _kind_of(shard: Any) -> str:
    if is_pandas(shard):
        return f"pandas of {shard.ndim} axes"
    if _has_axis(shard):
        return "array"
    if _is_nest(shard):
        return "nest"
    if isinstance(shard, list):
        return "items"
    raise _no_rows(shard)


def _cut_leaf(leaf: Any, start: int, stop: int) -> Any:
    return leaf.iloc[start:stop] if is_pandas(leaf) else leaf[start:stop]


def _join_leaves(leaves: Sequence[Any]) -> Any:
    if all(map(is_pandas, leaves)):
        from bigdl.orca.data.frames import joined

        return joined(leaves)
    torch = sys.modules.get("torch")
    if torch is not None and all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return torch.cat(list(leaves))
    sparse = sys.modules.get("scipy.sparse")
    if sparse is not None and all(map(sparse.issparse, leaves)):
        return sparse.vstack(leaves, format=leaves[0].format)
    try:
        return np.concatenate(leaves)
    except ValueError as exc:
        raise DataError(f"Arrays of the shards cannot be put together: {exc}.") from exc


def _no_rows(shard: Any) -> DataError:
    forgotten = " Did the function forget to return it?" if shard is None else ""
    return DataError(
        f"A shard that is a {type(shard).__name__} has no rows; need a frame, an array, a nest "
        f"of arrays, or a list.{forgotten}"
    )
