"""Spark DataFrames: evaluated once, spooled to Arrow files by their executors, read from there.

Uses the DataFrame API alone, so it works over Spark Connect too. Columns are handed to tasks by
their place, never by name: names are the caller's to choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bigdl._base.errors import ConfigError, DataError
from bigdl.orca.data.adapters.arrow_values import prepared
from bigdl.orca.data.adapters.spark_predict import SparkToPredict
from bigdl.orca.data.adapters.spark_spool import spool
from bigdl.orca.data.columns import Columns, Nulls
from bigdl.orca.data.memory import Shaping
from bigdl.orca.data.spool import SpooledRows
from bigdl.orca.data.spool_write import Converted

if TYPE_CHECKING:
    from bigdl.orca.data.contract import Request

__all__ = ["adapt_frame"]


def adapt_frame(frame: Any, request: Request) -> SpooledRows | SparkToPredict:
    """A recipe of the columns asked for; for fit and evaluate they are spooled now.

    Raises:
        ConfigError: feature_cols or label_cols are missing; a stream.
        DataError: No such column, no rows, nulls without ``fill``, values that aren't numbers.
    """
    columns = Columns.asked(request, frame.columns, "a Spark DataFrame")
    shaping = Shaping(
        has_labels=request.has_labels,
        transform=request.transform,
        target_transform=request.target_transform,
    )
    if not request.has_labels:
        return SparkToPredict(frame=frame, columns=columns, shaping=shaping)
    if frame.isStreaming:
        raise ConfigError(
            f"{request.call}() cannot use a stream, which has no end. Give it a DataFrame of "
            "spark.read, or of foreachBatch; predict() takes streams."
        )
    places = [frame.columns.index(name) for name in columns.names]
    spooled = spool(frame, _ModelColumns(columns), places)
    if not spooled.shards.rows:
        spooled.shards.close()
        raise DataError(f"{request.call}() got a Spark DataFrame of no rows.")
    described = dict(zip(columns.names, spooled.columns, strict=True))
    return SpooledRows(
        shards=spooled.shards,
        columns=columns,
        schema=columns.schema(described),
        shaping=shaping,
    )


@dataclass(frozen=True)
class _ModelColumns:
    """Writes the columns as models get them: half the bytes of what many frames hold."""

    columns: Columns

    def __call__(self, rows: pa.Table) -> Converted:
        found = prepared(
            rows.rename_columns(self.columns.names), self.columns, Nulls(rows.num_rows)
        )
        arrays = [found[name][0] for name in self.columns.names]
        described = [found[name][1] for name in self.columns.names]
        names = [str(i) for i in range(len(arrays))]
        return Converted(
            batch=pa.RecordBatch.from_arrays(arrays, names=names), described=described
        )
