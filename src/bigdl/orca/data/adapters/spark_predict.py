"""Predictions beside the rows of a Spark DataFrame, batch or stream, made in Spark's own workers.

A batch DataFrame is spooled once, with all its columns; what comes back is a DataFrame over the
files, whose rows get their predictions when they are asked for. A stream is mapped as it flows.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyspark.sql import types

from bigdl._base.errors import ConfigError, DataError
from bigdl._base.trees import map_leaves
from bigdl.orca.data.adapters.arrow_values import arrays_of, prepared
from bigdl.orca.data.adapters.spark_keeping import keep
from bigdl.orca.data.adapters.spark_spool import arrow_type, by_place, spool
from bigdl.orca.data.columns import Columns, Nulls
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, OutputSchema, Schema
from bigdl.orca.data.memory import Shaping, as_numpy, each_batch
from bigdl.orca.data.outputs import check_names, named_outputs
from bigdl.orca.data.packed import batch_of
from bigdl.orca.data.spool_write import Converted
from bigdl.orca.engines.pickling import dumps_abroad, loads_abroad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Reader, Run
    from bigdl.orca.data.spool import Shards

__all__ = ["SparkToPredict"]

#: Rows that are predicted to see what predictions are like.
_SAMPLE_ROWS = 2
#: Bytes of files that one task reads, about.
_TASK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class SparkToPredict:
    """A DataFrame that predictions are added to.

    Args:
        frame: The caller's.
        columns: Which columns the model gets.
        shaping: What is done to each batch.
    """

    frame: Any
    columns: Columns
    shaping: Shaping

    @property
    def rows(self) -> int | None:
        return None

    @property
    def schema(self) -> Schema | None:
        return None

    def open(self, rank: int, world: int) -> Reader:
        """Predictions need no ranks.

        Raises:
            DataError: Always.
        """
        raise DataError("This DataFrame was opened for predict(); open it for training.")

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> Any:
        """A DataFrame of the caller's columns, then the outputs; the rows are fixed now.

        Raises:
            ConfigError: A name is taken, or there are more or fewer names than outputs.
            DataError: Nulls, values that no model takes, a full disk.
        """
        schema = OutputSchema() if schema is None else schema
        frame = self.frame
        check_names(schema, frame.columns)
        places = [frame.columns.index(name) for name in self.columns.names]
        rows = _Rows(self.columns, tuple(places), self.shaping)
        if frame.isStreaming:
            return self._on_stream(rows, fn, schema, size, run)
        spooled = spool(frame, _AllColumns(rows))
        shards = spooled.shards
        try:
            first = next(iter(shards.read(shards.blocks()[:1])), None)
            sample = None if first is None else _sample(rows, first[:_SAMPLE_ROWS], fn, run)
            schema = replace(schema, sample=sample)
            work = _Predicting(rows, _travelling(fn), schema, size, tuple(frame.columns))
            return _over(frame, shards, work)
        except BaseException:
            shards.close()
            raise

    def _on_stream(
        self,
        rows: _Rows,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema,
        size: int,
        run: Run,
    ) -> Any:
        frame = self.frame
        made_up = _made_up(frame, rows)
        try:
            sample = _sample(rows, made_up, fn, run)
        except Exception as exc:
            raise DataError(
                "What a stream's predictions are has to be known before its first row, and the "
                f"model, or the transform, failed on made-up rows (zeros, empty texts): {exc}"
            ) from exc
        schema = replace(schema, sample=sample)
        work = _Predicting(rows, _travelling(fn), schema, size, tuple(frame.columns))
        mapped = by_place(frame).mapInArrow(_map_task(dumps_abroad(work)), _schema_of(frame, work))
        return mapped.toDF(*frame.columns, *work.names)


# --- what runs in Spark's workers ---------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """From rows with all columns to batches of features."""

    columns: Columns
    places: tuple[int, ...]
    shaping: Shaping

    def table(self, rows: pa.Table | pa.RecordBatch) -> pa.Table:
        """The columns that the model gets."""
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        return pa.table([table.column(i) for i in self.places], names=self.columns.names)

    def batches(self, rows: pa.RecordBatch, size: int) -> Iterator[tuple[Tree, int]]:
        """Features of at most ``size`` rows each."""
        table = self.table(rows)
        data = self.columns.nest(arrays_of(table, self.columns, Nulls(table.num_rows)))
        for first in range(0, table.num_rows, size):
            last = min(first + size, table.num_rows)
            yield self.shaping(batch_of(data, slice(first, last)), last - first), last - first


@dataclass(frozen=True)
class _AllColumns:
    """Writes rows as they come, once it is known that the model can have them."""

    rows: _Rows

    def __call__(self, rows: pa.Table) -> Converted:
        columns = self.rows.columns
        found = prepared(self.rows.table(rows), columns, Nulls(rows.num_rows))
        [batch] = rows.combine_chunks().to_batches()
        return Converted(batch=batch, described=[found[name][1] for name in columns.names])


@dataclass(frozen=True)
class _Predicting:
    """From rows to rows with their predictions."""

    rows: _Rows
    fn: Callable[[Tree], Tree]
    schema: OutputSchema
    size: int
    taken: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, pa.DataType]:
        """Of each new column; a sample of no rows tells."""
        empty = named_outputs(self.schema.sample, self.schema, self.taken)
        return {name: _column(values, name).type for name, values in empty.items()}

    @property
    def names(self) -> list[str]:
        return list(self.kinds)

    def __call__(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        batches = self.rows.batches(rows, self.size)
        outputs = [
            named_outputs(out, self.schema, self.taken) for out, _ in each_batch(self.fn, batches)
        ]
        columns = list(rows.columns)
        for name, kind in self.kinds.items():
            whole = np.concatenate([one[name] for one in outputs])
            columns.append(_column(whole, name).cast(kind))
        return pa.RecordBatch.from_arrays(columns, names=_numbered(len(columns)))


def _map_task(work: bytes) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Of a stream: rows come, and go on with their predictions."""

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        predict = loads_abroad(work)
        for batch in batches:
            if batch.num_rows:
                yield predict(batch)

    return task


def _read_task(
    work: bytes, shards: bytes
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Of spooled rows: the numbers of groups of files come, and their rows go on."""

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        predict, groups = loads_abroad(work), pickle.loads(shards)
        for batch in batches:
            for number in batch.column(0).to_pylist():
                files = groups[number]
                for block in files.read(files.blocks()):
                    yield predict(block)

    return task


# --- what the caller's process does -------------------------------------------------------------


def _over(frame: Any, shards: Shards, work: _Predicting) -> Any:
    """A DataFrame of spooled rows and their predictions, which keeps the files."""
    session, schema = frame.sparkSession, _schema_of(frame, work)
    groups = _groups(shards)
    if not groups:
        shards.close()
        numbers = session.range(0)
    else:
        numbers = session.range(0, len(groups), 1, len(groups))
    task = _read_task(dumps_abroad(work), pickle.dumps(groups))
    found = numbers.mapInArrow(task, schema).toDF(*frame.columns, *work.names)
    keep(found, shards)
    return found


def _groups(shards: Shards) -> list[Shards]:
    """Neighbouring files together: neither thousands of small tasks nor a few large ones."""
    groups: list[list[Any]] = []
    room = 0
    for shard in shards.shards:
        if shard.bytes > room:
            groups.append([])
            room = _TASK_BYTES
        groups[-1].append(shard)
        room -= shard.bytes
    return [replace(shards, shards=tuple(group), lease=None) for group in groups]


def _sample(rows: _Rows, some: pa.RecordBatch, fn: Callable[[Tree], Tree], run: Run) -> Tree:
    """Outputs of no rows, as they are."""
    table = rows.table(some)
    features = rows.columns.nest(arrays_of(table, rows.columns, Nulls(table.num_rows)))
    [outputs] = run(_Once(rows.shaping, fn, table.num_rows), [features])
    return map_leaves(lambda leaf: leaf[:0].copy(), outputs)


@dataclass(frozen=True)
class _Once:
    """One batch."""

    shaping: Shaping
    fn: Callable[[Tree], Tree]
    rows: int

    def __call__(self, features: Tree) -> Tree:
        [(outputs, _)] = each_batch(self.fn, [(self.shaping(features, self.rows), self.rows)])
        return map_leaves(as_numpy, outputs)


def _travelling(fn: Callable[[Tree], Tree]) -> Callable[[Tree], Tree]:
    """A function that a worker of Spark's can use: it knows nothing of our engines' refs."""
    by_value = getattr(fn, "by_value", None)
    return fn if by_value is None else by_value()


def _made_up(frame: Any, rows: _Rows) -> pa.RecordBatch:
    """Rows of a stream before it flows: zeros, and empty texts.

    Raises:
        ConfigError: How long its arrays are is said nowhere.
    """
    columns = []
    for field in frame.schema.fields:
        columns.append(_made_up_column(field, is_used=field.name in rows.columns.names))
    return pa.RecordBatch.from_arrays(columns, names=_numbered(len(columns)))


def _made_up_column(field: Any, *, is_used: bool) -> pa.Array:
    kind = field.dataType
    name = getattr(kind, "typeName", lambda: "")()
    is_vector = type(kind).__name__ == "VectorUDT"
    if not is_used:
        return pa.nulls(_SAMPLE_ROWS)
    if isinstance(kind, types.ArrayType) or is_vector:
        length = (field.metadata or {}).get("ml_attr", {}).get("num_attrs")
        if length is None:
            raise ConfigError(
                f"How long the arrays in {field.name!r} are is not known before a stream flows. "
                f'Say it: df.withMetadata({field.name!r}, {{"ml_attr": {{"num_attrs": 8}}}}).'
            )
        inner = pa.float64() if is_vector else arrow_type(kind.elementType)
        return pa.array([[0] * length] * _SAMPLE_ROWS, pa.list_(inner))
    if name in ("string", "varchar", "char"):
        return pa.array([""] * _SAMPLE_ROWS)
    if name == "binary":
        return pa.array([b""] * _SAMPLE_ROWS)
    return pa.array([0] * _SAMPLE_ROWS, pa.int64()).cast(arrow_type(kind))


def _schema_of(frame: Any, work: _Predicting) -> Any:
    """Of the rows with their predictions; columns are called by their place."""
    fields = [
        types.StructField(f"c{i}", field.dataType, field.nullable, field.metadata)
        for i, field in enumerate(frame.schema.fields)
    ]
    for kind in work.kinds.values():
        fields.append(types.StructField(f"c{len(fields)}", _spark_type(kind), False))
    return types.StructType(fields)


def _spark_type(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return types.ArrayType(_spark_type(kind.value_type), containsNull=False)
    return _SPARK_TYPES[kind]


_SPARK_TYPES = {
    pa.bool_(): types.BooleanType(),
    pa.int8(): types.ByteType(),
    pa.int16(): types.ShortType(),
    pa.int32(): types.IntegerType(),
    pa.int64(): types.LongType(),
    pa.float32(): types.FloatType(),
    pa.float64(): types.DoubleType(),
}
#: What Spark has no type for, and what holds the same numbers.
_WIDER = {"float16": "float32", "uint8": "int16", "uint16": "int32", "uint32": "int64"}


def _column(values: np.ndarray, name: str) -> pa.Array:
    """Outputs as a column of Spark's: numbers, or lists.

    Raises:
        DataError: Spark has no type for them.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    values = values.astype(_WIDER.get(str(values.dtype), values.dtype), copy=False)
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    if column.type not in _SPARK_TYPES:
        raise DataError(
            f"Spark has no column type for the output {name!r}, which is {values.dtype}."
        )
    for axis in range(values.ndim - 1, 0, -1):
        length = values.shape[axis]
        rows = int(np.prod(values.shape[:axis]))
        offsets = np.arange(rows + 1, dtype=np.int32) * length
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column)
    return column


def _numbered(count: int) -> list[str]:
    return [f"c{i}" for i in range(count)]
