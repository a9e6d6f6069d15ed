"""What pandas does with shards: files read, and what is asked of all rows put together.

Everything here runs in worker processes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bigdl._base.errors import DataError
from bigdl._base.registry import nearest
from bigdl.orca.data.plan import evenly
from bigdl.orca.data.reading import compression_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from bigdl.orca.data.reading import File

__all__ = [
    "GroupBy",
    "Merge",
    "PartitionBy",
    "Sample",
    "SortValues",
    "describe",
    "drop_missing",
    "joined",
    "read_csv",
    "read_json",
    "read_parquet",
    "unique",
]


def joined(frames: Sequence[Any]) -> Any:
    """Frames, or columns, as ``pandas.concat`` puts them together, rows and index in order."""
    with warnings.catch_warnings():
        # that parts without rows or values do not decide on a type is what is wanted here
        warnings.simplefilter("ignore", FutureWarning)
        return pd.concat(list(frames))


@dataclass(frozen=True, kw_only=True)
class SortValues:
    """Rows in the order of some columns; those that are equal stay in order."""

    by: list[Hashable]
    ascending: bool | list[bool]
    shards: int

    def __call__(self, table: Any) -> list[Any]:
        frame = _frame(table, "sort_values", self.by)
        try:
            ordered = frame.sort_values(self.by, ascending=self.ascending, kind="stable")
        except TypeError as exc:
            raise DataError(f"sort_values() cannot put these values in order: {exc}.") from exc
        return evenly(ordered, self.shards)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Two tables joined on columns."""

    how: Any
    on: list[Hashable] | None
    shards: int

    def __call__(self, left: Any, right: Any) -> list[Any]:
        ours = _frame(left, "merge", self.on or ())
        theirs = _frame(right, "merge", self.on or (), "the right shards")
        try:
            merged = ours.merge(theirs, how=self.how, on=self.on)
        except (pd.errors.MergeError, ValueError) as exc:
            raise DataError(f"merge() cannot join these tables: {exc}") from exc
        return evenly(merged, self.shards)


@dataclass(frozen=True, kw_only=True)
class GroupBy:
    """Aggregates of columns by groups, as columns ``c_mean``."""

    columns: list[Hashable]
    agg: Mapping[Hashable, list[Any]]
    shards: int

    def __call__(self, table: Any) -> list[Any]:
        frame = _frame(table, "group_by", [*self.columns, *self.agg])
        groups = frame.groupby(self.columns, observed=False)
        names = [name for several in self.agg.values() for name in several if _is_name(name)]
        for name in names:
            if not hasattr(groups, name):
                raise DataError(
                    f"group_by(): pandas has no aggregate {name!r}.{nearest(name, dir(groups))}"
                )
        try:
            found = groups.agg(dict(self.agg))
        except TypeError as exc:
            if len(names) < sum(map(len, self.agg.values())):
                raise  # it may be a function of the user's that failed
            raise DataError(f"group_by() cannot aggregate these values: {exc}.") from exc
        found.columns = [f"{column}_{name}" for column, name in found.columns]
        try:
            found = found.reset_index()
        except ValueError as exc:
            raise DataError(f"group_by(): {exc}. Rename the column.") from exc
        return evenly(found, self.shards)


@dataclass(frozen=True, kw_only=True)
class PartitionBy:
    """Rows with the same values in some columns in the same shard."""

    columns: list[Hashable]
    shards: int

    def __call__(self, table: Any) -> list[Any]:
        frame = _frame(table, "partition_by", self.columns)
        groups = frame.groupby(self.columns, dropna=False, sort=False, observed=True)
        where = groups.ngroup().to_numpy() % self.shards
        return [frame[where == shard] for shard in range(self.shards)]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A part of the rows, drawn without replacement."""

    frac: float
    seed: int
    shards: int

    def __call__(self, table: Any) -> list[Any]:
        frame = _pandas(table, "sample")
        return evenly(frame.sample(frac=self.frac, random_state=self.seed), self.shards)


def describe(table: Any) -> list[Any]:
    """pandas' summary, as the only shard."""
    return [_pandas(table, "describe").describe()]


def unique(table: Any) -> list[Any]:
    """The values of one column, each once, in the order in which they come."""
    if isinstance(table, np.ndarray) and table.ndim == 1:
        table = pd.Series(table)
    if isinstance(table, pd.DataFrame) and len(table.columns) == 1:
        table = table.iloc[:, 0]
    if not isinstance(table, pd.Series):
        raise DataError(
            f"unique() needs shards of one column, not of {_described(table)}: "
            'shards["a"].unique()'
        )
    return [np.asarray(table.unique())]


def drop_missing(shard: Any) -> Any:
    """The rows of a shard in which nothing is missing."""
    return _pandas(shard, "drop_missing_value").dropna()


# --- files --------------------------------------------------------------------------------------


def read_csv(opened: Any, file: File, options: Mapping[str, Any], _: Any) -> Any:
    """A file as ``pandas.read_csv`` reads it, with the columns that its folders name."""
    return _with_added(pd.read_csv(opened, **_compressed(file, options)), file)


def read_json(opened: Any, file: File, options: Mapping[str, Any], _: Any) -> Any:
    """A file as ``pandas.read_json`` reads it, with the columns that its folders name."""
    return _with_added(pd.read_json(opened, **_compressed(file, options)), file)


def read_parquet(
    opened: Any, file: File, options: Mapping[str, Any], columns: Sequence[str] | None
) -> Any:
    """A file as ``pandas.read_parquet`` reads it, with the columns that its folders name."""
    own = None if columns is None else [name for name in columns if name not in file.added]
    frame = _with_added(pd.read_parquet(opened, columns=own, **options), file)
    if columns is None:
        return frame
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise KeyError(f"it has no column {missing[0]!r}")
    return frame[list(columns)]


def _compressed(file: File, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with what the name of the file tells where nobody says otherwise."""
    if options.get("compression", "infer") != "infer":
        return dict(options)
    return {**options, "compression": compression_of(file.path)}


def _with_added(frame: Any, file: File) -> Any:
    for name, (value, kind) in file.added.items():
        if isinstance(frame, pd.DataFrame) and name not in frame.columns:
            frame[name] = pd.Series([value] * len(frame), index=frame.index, dtype=kind)
    return frame


def _is_name(aggregate: Any) -> bool:
    return isinstance(aggregate, str)


# --- what others share --------------------------------------------------------------------------


def _pandas(table: Any, call: str) -> Any:
    if not isinstance(table, (pd.DataFrame, pd.Series)):
        raise DataError(
            f"{call}() needs shards of pandas frames, not of {_described(table)}. "
            "transform_shard() can make them."
        )
    return table


def _frame(
    table: Any, call: str, columns: Sequence[Hashable], whose: str = "the shards"
) -> pd.DataFrame:
    """The table, which has to have ``columns``.

    Raises:
        DataError: It is no frame, or a column is missing.
    """
    frame = _pandas(table, call)
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"{call}() needs frames; {whose} are single columns.")
    for name in columns:
        if name not in frame.columns:
            known = [str(one) for one in frame.columns]
            shown = ", ".join(map(repr, list(frame.columns)[:12]))
            raise DataError(
                f"{call}(): {whose} have no column {name!r}; have {shown}."
                f"{nearest(str(name), known)}"
            )
    return frame


def _described(table: Any) -> str:
    if isinstance(table, pd.DataFrame):
        return f"frames of {len(table.columns)} columns"
    return f"a {type(table).__name__}"
