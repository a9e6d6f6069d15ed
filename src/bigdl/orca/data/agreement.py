"""What the rows of all shards are, settled from notes that the workers send on each.

Names no engine; loads NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.errors import DataError
from bigdl._base.trees import Tree, map_leaves
from bigdl.orca.data.columns import Nulls
from bigdl.orca.data.contract import Column, Schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigdl.orca.data.contract import Request

__all__ = ["Note", "agreed", "cast"]


@dataclass(frozen=True)
class Note:
    """What a worker tells of a shard: its kind, its rows, what they are, its nulls by column."""

    kind: str
    rows: int
    schema: Schema | None
    nulls: dict[Any, int]


def agreed(notes: Sequence[Note], request: Request) -> Schema:
    """What the rows of all shards are.

    Raises:
        DataError: No rows, nulls, or shards that do not fit each other.
    """
    kinds = sorted({note.kind for note in notes})
    if len(kinds) > 1:
        raise DataError(f"The shards are of differing kinds: {' and '.join(kinds)}.")
    nulls = Nulls(sum(note.rows for note in notes))
    for name in dict.fromkeys(name for note in notes for name in note.nulls):
        nulls.add(name, sum(note.nulls.get(name, 0) for note in notes))
    nulls.check()
    schemas = [note.schema for note in notes if note.schema is not None and note.rows]
    if not schemas and request.has_labels:
        raise DataError(f"{request.call}() got shards of no rows.")
    if not schemas:
        return next((n.schema for n in notes if n.schema is not None), Schema(features=()))
    is_table = kinds == ["frames"]
    nests = [(schema.features, schema.labels) for schema in schemas]

    def common(*columns: Column) -> Column:
        return _common(columns, is_table)

    features, labels = map_leaves(common, *nests, name="the shard")
    return Schema(features=features, labels=labels)


def _common(columns: Sequence[Column], is_table: bool) -> Column:
    """What a column is, of which shards may hold narrower types than others."""
    first = columns[0]
    other = next((one for one in columns if one.shape != first.shape), None)
    if other is not None:
        raise DataError(
            f"{first.name} has rows of shape {first.shape} in one shard and {other.shape} in "
            "another; a model needs one shape."
        )
    types = list(dict.fromkeys(column.dtype for column in columns))
    if len(types) == 1:
        return first
    if is_table and set(types) == {"int64", "float32"}:
        dtype = "float32"  # as the joined table would be read
    elif not is_table and all(_is_number(name) for name in types):
        dtype = str(np.result_type(*types))
    else:
        raise DataError(
            f"{first.name} holds {types[0]} in one shard and {types[1]} in another. "
            "transform_shard() can make them one type."
        )
    return Column(name=first.name, dtype=dtype, shape=first.shape)


def _is_number(name: str) -> bool:
    try:
        return np.dtype(name).kind in "iufc"
    except TypeError:  # one of torch's own
        return False


def cast(data: Tree, wanted: Tree) -> Tree:
    """Arrays in the types that all shards agree on."""

    def fitting(column: Column, leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray) or str(leaf.dtype) == column.dtype:
            return leaf
        if column.dtype == "float32":
            leaf = leaf.astype(np.float64)  # rounded as a joined table's would be
        return leaf.astype(column.dtype)

    return map_leaves(fitting, wanted, data)
