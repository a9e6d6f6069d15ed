"""A Spark DataFrame's rows into files on its executors: one evaluation, in the order of its rows.

The driver sees a note on each file, and no row.
"""

from __future__ import annotations

import json
import pickle
import secrets
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql.pandas.types import to_arrow_type

from bigdl._base.errors import ContextError, DataError
from bigdl.orca.data.columns import Nulls
from bigdl.orca.data.contract import Column
from bigdl.orca.data.spool import Shard, Shards, held
from bigdl.orca.data.spool_lease import Lease
from bigdl.orca.data.spool_write import Order, differing, written
from bigdl.orca.engines.pickling import dumps
from bigdl.orca.engines.spark_session import address_of, is_connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bigdl.orca.data.spool_write import Converter

__all__ = ["Spooled", "arrow_type", "by_place", "owner_address", "spool", "spooled"]


@dataclass(frozen=True, kw_only=True)
class Spooled:
    """What was spooled.

    Args:
        shards: The files.
        columns: What models get of each column; empty if there are no rows.
        nulls: In each column that was written; empty if there are no rows.
    """

    shards: Shards
    columns: list[Column]
    nulls: list[int]


def spool(frame: Any, convert: Converter, places: Sequence[int] | None = None) -> Spooled:
    """Evaluate a DataFrame once, and keep its rows on its executors.

    Args:
        frame: Not a stream.
        convert: What is done to the rows.
        places: Of the columns that are needed; None = all.

    Raises:
        DataError: Nulls, values that no model takes, a full disk; nothing is left then.
        Exception: What the frame's own plan raises.
    """
    lease = Lease(owner_address(frame.sparkSession))
    try:
        order = Order(ticket=lease.ticket, convert=convert)
        wanted = by_place(frame)
        if places is not None:
            wanted = wanted.select(*[f"c{place}" for place in places])
        notes = _collected(wanted.mapInArrow(_task(dumps(order)), "note string"))
        found = spooled(notes, lease)
    except BaseException:
        lease.close()
        raise
    lease.seal()
    return found


def by_place(frame: Any) -> Any:
    """The same rows with columns ``c0``, ``c1``, …"""
    return frame.toDF(*[f"c{i}" for i in range(len(frame.columns))])


def arrow_type(kind: Any, zone: str = "UTC") -> pa.DataType:
    """Arrow's type for one of Spark's."""
    if "timezone" in signature(to_arrow_type).parameters:  # since Spark 4
        return to_arrow_type(kind, timezone=zone)
    return to_arrow_type(kind)


def owner_address(session: Any) -> str:
    """Where executors reach this process."""
    names = ("spark.master", "spark.driver.host")
    return address_of(session, {name: session.conf.get(name, "") for name in names})


def _task(order: bytes) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        context = TaskContext.get()
        assert context is not None  # this is a task
        notes = written(pickle.loads(order), context.partitionId(), batches)
        yield pa.RecordBatch.from_arrays([pa.array(notes, pa.string())], names=["note"])

    return task


def _collected(frame: Any) -> list[dict[str, Any]]:
    """The notes. If this is broken off, Spark's work ends too."""
    try:
        with _cancelled_if_broken_off(frame.sparkSession):
            return [json.loads(row[0]) for row in frame.collect()]
    except Exception as exc:
        if "No module named 'bigdl'" in str(exc):
            raise ContextError(
                "The Python workers of this Spark session cannot import bigdl. Start the session "
                "by init_orca_context(runtime='spark'), which sends it along; or set "
                f"PYSPARK_PYTHON={sys.executable} in the environment before it starts."
            ) from exc
        raise


@contextmanager
def _cancelled_if_broken_off(session: Any) -> Iterator[None]:
    """What is asked of Spark inside ends where the caller no longer waits for it."""
    tag = f"bigdl-spool-{secrets.token_hex(4)}"
    if is_connect(session):
        add, cancel, remove = session.addTag, session.interruptTag, session.removeTag
    else:  # such a session's own tags are lost with the JVM's thread, which Ctrl-C costs
        context = session.sparkContext
        add, cancel, remove = context.addJobTag, context.cancelJobsWithTag, context.removeJobTag
    add(tag)
    try:
        yield
    except BaseException:
        cancel(tag)
        raise
    finally:
        remove(tag)


def spooled(notes: list[dict[str, Any]], lease: Lease) -> Spooled:
    """What the notes say.

    Raises:
        DataError: What went wrong in the tasks.
    """
    errors = [note for note in notes if "error" in note]
    if errors:
        cause = next((note for note in errors if note.get("is_cause")), errors[0])
        raise DataError(f"{cause['error']} (partition {cause['partition']} of the DataFrame)")
    files = sorted(
        (note for note in notes if "path" in note),
        key=lambda note: (note["partition"], note["number"]),
    )
    counted = [note for note in notes if "nulls" in note]
    if counted:
        nulls = Nulls(sum(note["rows"] for note in (*counted, *files)))
        for name in dict.fromkeys(name for note in counted for name, _ in note["nulls"]):
            nulls.add(name, sum(dict(note["nulls"]).get(name, 0) for note in counted))
        nulls.check()
    columns = _agreed([note["columns"] for note in files])
    shards = Shards(
        shards=tuple(
            Shard(
                partition=note["partition"],
                path=note["path"],
                guard=(note["guard"][0], note["guard"][1]),
                rows=note["rows"],
                block_rows=note["block_rows"],
                bytes=note["bytes"],
            )
            for note in files
        ),
        token=lease.ticket.token,
        lease=lease,
    )
    counts = [sum(one) for one in zip(*(note["null_counts"] for note in files), strict=True)]
    return Spooled(shards=held(shards), columns=columns, nulls=counts)


def _agreed(described: list[list[list[Any]]]) -> list[Column]:
    """What the columns are, on which all files have to agree."""
    each = [
        [Column(name=name, dtype=dtype, shape=shape) for name, dtype, shape in one]
        for one in described
    ]
    for other in each:
        for pair in zip(each[0], other, strict=True):
            if pair[0] != pair[1]:
                raise DataError(differing(*pair))
    return each[0] if each else []
