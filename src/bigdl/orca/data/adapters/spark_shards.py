"""Shards of pandas frames from a Spark DataFrame, and back: through files, never through rows.

Values keep their types: whole numbers with nulls are ``Int64``, times keep their microseconds and
their zone (without one they are Spark's ``timestamp_ntz``), decimals and lists are Python's.
"""

from __future__ import annotations

import functools
import json
import pickle
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from bigdl._base.errors import ArgumentError, ConfigError, ContextError, DataError
from bigdl.orca.data.adapters import kind_of
from bigdl.orca.data.adapters.spark_keeping import keep
from bigdl.orca.data.adapters.spark_spool import arrow_type, owner_address, spool, spooled
from bigdl.orca.data.plan import Given, Kept, Mapped, noted
from bigdl.orca.data.spool_lease import Lease
from bigdl.orca.data.spool_write import Converted, Order, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl.orca.data.plan import Plan
    from bigdl.orca.data.spool import Shards
    from bigdl.orca.engines.base import Engine

__all__ = [
    "AsTheyAre",
    "Spooled",
    "active_session",
    "frame_of",
    "frame_over",
    "plan_of",
    "spooled_by_shards",
]

#: Whole numbers and truth values that pandas keeps beside nulls.
_NULLABLE = {
    pa.int8(): "Int8",
    pa.int16(): "Int16",
    pa.int32(): "Int32",
    pa.int64(): "Int64",
    pa.bool_(): "boolean",
}
#: What Spark has no type for, and what holds the same values.
_WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
    pa.float16(): pa.float32(),
    pa.large_string(): pa.string(),
    pa.large_binary(): pa.binary(),
}


def plan_of(frame: Any) -> Plan:
    """Shards of pandas frames, one for each partition that has rows; it is evaluated now.

    Raises:
        ArgumentError: It is no DataFrame of Spark's.
        ConfigError: It is a stream.
    """
    if kind_of(frame) != "spark":
        raise ArgumentError(
            f"from_spark_df() needs a Spark DataFrame, not a {type(frame).__name__}."
        )
    if frame.isStreaming:
        raise ConfigError("from_spark_df() cannot take a stream, which has no end.")
    found = spool(frame, AsTheyAre())
    names = tuple(frame.columns)
    shards = found.shards
    groups = [
        replace(shards, shards=tuple(files), lease=None)
        for _, files in groupby(shards.shards, key=lambda shard: shard.partition)
    ] or [replace(shards, lease=None)]
    zone = frame.sparkSession.conf.get("spark.sql.session.timeZone", "UTC")
    kinds = [arrow_type(field.dataType, zone) for field in frame.schema.fields]
    step = _ToPandas(names, kinds, found.nulls or [0] * len(names))
    given = Spooled(groups, "from_spark_df")
    given.shards_held = shards  # as long as anything is made of them
    return Mapped(given, step, "frames")


class Spooled(Given):
    """Groups of files, which go with this plan."""

    shards_held: Shards


@dataclass(frozen=True)
class AsTheyAre:
    """Writes rows as they come."""

    def __call__(self, rows: pa.Table) -> Converted:
        [batch] = rows.combine_chunks().to_batches()
        return Converted(batch=batch, described=[])


@dataclass(frozen=True)
class _ToPandas:
    """A group of files as one frame."""

    names: tuple[str, ...]
    kinds: list[pa.DataType]
    nulls: list[int]

    def __call__(self, shards: Shards) -> pd.DataFrame:
        batches = list(shards.read(shards.blocks()))
        if batches:
            found = pa.Table.from_batches(batches).columns
        else:
            found = [pa.chunked_array([], kind) for kind in self.kinds]
        columns = [
            _series(column, has_nulls=bool(count))
            for column, count in zip(found, self.nulls, strict=True)
        ]
        frame = pd.concat(columns, axis=1) if columns else pd.DataFrame()
        frame.columns = list(self.names)
        return frame


def _series(column: pa.ChunkedArray, *, has_nulls: bool) -> pd.Series:
    kind = column.type
    if pa.types.is_nested(kind):
        return pd.Series(column.to_pylist(), dtype=object)
    nullable = _NULLABLE.get(kind) if has_nulls else None
    series: pd.Series
    if nullable is not None:
        dtype = pd.api.types.pandas_dtype(nullable)
        series = dtype.__from_arrow__(column)
        return pd.Series(series)
    series = column.to_pandas(date_as_object=True)
    return series.rename(None)


# --- back -----------------------------------------------------------------------------------


def frame_of(engine: Engine, plan: Plan) -> Any:
    """A Spark DataFrame of the rows of all shards, in order; their indexes are left behind.

    Raises:
        ContextError: There is no Spark session.
        DataError: Shards that are no frames, or do not fit each other, or Spark.
    """
    session = active_session("to_spark_df()")
    refs, schemas = noted(engine, plan, _Looking())
    schema = _agreed(schemas)
    try:
        fields = from_arrow_schema(schema, prefer_timestamp_ntz=True).fields
    except PySparkException as exc:
        raise DataError(f"to_spark_df(): Spark has no type for a column: {exc}") from exc
    writing = functools.partial(_Writing, schema=schema)
    return frame_over(
        session, spooled_by_shards(session, engine, Kept(refs, "shards"), writing), fields
    )


def active_session(call: str, *, needs_rdds: bool = False) -> Any:
    """The running Spark session.

    Args:
        call: Who asks.
        needs_rdds: It has to be a classic one.

    Raises:
        ContextError: There is none, or only one over Spark Connect.
    """
    try:
        session = SparkSession.active()
    except PySparkException as exc:
        raise ContextError(
            f"{call} needs a running Spark session. Start the context with Spark, "
            "init_orca_context(runtime='spark'), or a session of your own."
        ) from exc
    if needs_rdds and not hasattr(session, "_jsparkSession"):
        raise ContextError(
            f"{call} needs a classic Spark session: over Spark Connect there are no RDDs. "
            "to_spark_df() gives a DataFrame there."
        )
    return session


def spooled_by_shards(
    session: Any, engine: Engine, plan: Plan, writing: Callable[[Order], Any]
) -> Shards:
    """Files that shards have been written to by the workers that have them, in order.

    Args:
        session: Whose the files are.
        engine: Where the shards are.
        plan: The shards.
        writing: From what is to be done to a step on a shard: nothing, and notes on its files.
    """
    lease = Lease(owner_address(session))
    try:
        order = Order(ticket=lease.ticket, convert=AsTheyAre())
        _, notes = noted(engine, plan, writing(order))
        ordered = [
            {**note, "partition": number} for number, some in enumerate(notes) for note in some
        ]
        shards = spooled(ordered, lease).shards
    except BaseException:
        lease.close()
        raise
    lease.seal()
    return shards


def frame_over(session: Any, shards: Shards, fields: list[Any]) -> Any:
    """A DataFrame of what lies in files, a partition for each part; they live as long as it."""
    from pyspark.sql.types import StructField, StructType

    groups = [
        replace(shards, shards=tuple(files), lease=None)
        for _, files in groupby(shards.shards, key=lambda shard: shard.partition)
    ]
    numbers = session.range(0, len(groups), 1, max(1, len(groups)))
    named = StructType([StructField(f"c{i}", one.dataType) for i, one in enumerate(fields)])
    found = numbers.mapInArrow(_read_task(pickle.dumps(groups)), named)
    found = found.toDF(*[one.name for one in fields])
    keep(found, shards)
    return found


def _read_task(
    shards: bytes,
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        groups = pickle.loads(shards)
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from groups[number].read(groups[number].blocks())

    return task


@dataclass(frozen=True)
class _Looking:
    """The shard, and its columns in Spark's terms."""

    def __call__(self, shard: Any) -> list[Any]:
        return [shard, _table(shard).schema.remove_metadata()]


@dataclass(frozen=True)
class _Writing:
    """Notes on the files that a shard has become."""

    order: Order
    schema: pa.Schema

    def __call__(self, shard: Any) -> list[Any]:
        table = (
            _table(shard)
            .cast(self.schema)
            .rename_columns([f"c{i}" for i in range(len(self.schema))])
        )
        notes = written(self.order, 0, table.to_batches())
        return [None, [json.loads(note) for note in notes]]


def _table(shard: Any) -> pa.Table:
    """A frame as Arrow has it, in types that Spark knows."""
    if not isinstance(shard, pd.DataFrame):
        raise DataError(
            f"to_spark_df() needs shards of pandas frames, not of a {type(shard).__name__}. "
            "transform_shard() can make them."
        )
    odd = [name for name in shard.columns if not isinstance(name, str)]
    if odd or not len(shard.columns):
        raise DataError(
            f"to_spark_df() needs columns with names that are texts, and got {odd[:3]}."
        )
    try:
        table = pa.Table.from_pandas(shard, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError) as exc:
        raise DataError(f"to_spark_df(): a column has no type of Arrow's: {exc}") from exc
    wanted = pa.schema([pa.field(one.name, _known(one.type)) for one in table.schema])
    return table.cast(wanted, safe=False)


def _known(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _known(kind.value_type)
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind):
        return pa.duration("us")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_known(kind.value_type))
    return _WIDER.get(kind, kind)


def _agreed(schemas: list[pa.Schema]) -> pa.Schema:
    """Types that hold the values of all shards; a column of nulls alone fits any."""
    first = schemas[0]
    for other in schemas:
        if other.names != first.names:
            raise DataError(
                f"to_spark_df() needs shards with the same columns, and got {first.names} and "
                f"{other.names}."
            )
    try:
        found = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as exc:
        raise DataError(f"to_spark_df(): columns of the shards do not fit: {exc}") from exc
    # nulls alone in all shards: Spark cannot store a column without a type
    return pa.schema(
        [one.with_type(pa.string()) if pa.types.is_null(one.type) else one for one in found]
    )
