"""Shards from the elements of an RDD, and back: pickles, through files.

RDDs belong to Spark's classic sessions; over Spark Connect there are none.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark import RDD
from pyspark.sql import SparkSession
from pyspark.sql.types import BinaryType, StructField, StructType

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, DataError
from bigdl.orca.data.adapters.spark_shards import (
    AsTheyAre,
    Spooled,
    active_session,
    frame_over,
    spooled_by_shards,
)
from bigdl.orca.data.adapters.spark_spool import spool
from bigdl.orca.data.plan import Mapped
from bigdl.orca.data.spool_write import written
from bigdl.orca.engines.pickling import dumps

if TYPE_CHECKING:
    from bigdl.orca.data.plan import Plan
    from bigdl.orca.data.spool import Shards
    from bigdl.orca.data.spool_write import Order
    from bigdl.orca.engines.base import Engine

__all__ = ["plan_of", "rdd_of"]

_PICKLES = StructType([StructField("c0", BinaryType())])
#: More elements than this are rows, and no shards.
_MOST_SHARDS = 100_000


def plan_of(rdd: Any) -> Plan:
    """A shard for each element, in order; the RDD is evaluated now.

    Raises:
        ArgumentError: It is no RDD.
        DataError: It has no element, or so many that they must be rows.
    """
    if not isinstance(rdd, RDD):
        raise ArgumentError(f"from_rdd() needs an RDD of Spark's, not {shown(rdd)}.")
    session = SparkSession.getActiveSession() or SparkSession(rdd.context)
    pickled = session.createDataFrame(rdd.map(_pickled), _PICKLES, verifySchema=False)
    shards = spool(pickled, AsTheyAre()).shards
    if not 0 < shards.rows <= _MOST_SHARDS:
        shards.close()
        if not shards.rows:
            raise DataError("from_rdd() makes a shard of each element, and this RDD has none.")
        raise DataError(
            f"from_rdd() makes a shard of each element, and this RDD has {shards.rows:,}. If they "
            "are rows, make a list of each partition first: from_rdd(rdd.glom())."
        )
    places = [
        (replace(shards, shards=(file,), lease=None), *divmod(row, file.block_rows))
        for file in shards.shards
        for row in range(file.rows)
    ]
    given = Spooled(places, "from_rdd")
    given.shards_held = shards  # as long as anything is made of them
    return Mapped(given, _loaded, "elements")


def rdd_of(engine: Engine, plan: Plan) -> Any:
    """An RDD with an element, and a partition, for each shard, in order.

    Raises:
        ContextError: There is no Spark session, or it is one over Spark Connect.
        DataError: A shard is too large.
    """
    session = active_session("to_rdd()", needs_rdds=True)
    shards = spooled_by_shards(session, engine, plan, _Writing)
    return frame_over(session, shards, _PICKLES.fields).rdd.map(_unpickled)


def _pickled(element: Any) -> tuple[bytes]:
    return (dumps(element),)


def _unpickled(row: Any) -> Any:
    return pickle.loads(row[0])


def _loaded(place: tuple[Shards, int, int]) -> Any:
    """The element at a place: a file, its block, and the row in it."""
    shards, block, row = place
    with shards.opened(shards.shards[0]) as reader:
        return pickle.loads(reader.get_batch(block).column(0)[row].as_buffer())


@dataclass(frozen=True)
class _Writing:
    """Notes on the file that a shard has become."""

    order: Order

    def __call__(self, shard: Any) -> list[Any]:
        data = dumps(shard)
        try:
            pickles = pa.array([data], pa.binary())
        except pa.ArrowInvalid as exc:  # ArrowCapacityError is one
            raise DataError(
                f"to_rdd(): a shard is {len(data):,} bytes as a pickle, and Spark takes 2 GB. "
                "repartition() makes smaller ones."
            ) from exc
        batch = pa.record_batch([pickles], names=["c0"])
        return [None, [json.loads(note) for note in written(self.order, 0, [batch])]]
