"""Shards from the elements of an RDD, and back: order, what lies in files, and how long."""

from __future__ import annotations

import gc

import pytest

from bigdl.errors import ArgumentError, DataError
from bigdl.orca import init_orca_context
from bigdl.orca.data import XShards

np = pytest.importorskip("numpy")
pytest.importorskip("pyspark")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # py4j's sockets


@pytest.fixture(scope="module", autouse=True)
def _context():
    with init_orca_context(cores=2):
        yield


class Point:
    """Of a module that Spark's workers do not have."""

    def __init__(self, x):
        self.x = x


def test_each_element_is_a_shard_in_order(spark):
    rdd = spark.sparkContext.parallelize(range(7), 3).map(lambda i: {"x": np.full(i, i)})
    shards = XShards.from_rdd(rdd)
    assert shards.num_partitions() == 7
    assert [one["x"].tolist() for one in shards.collect()] == [[i] * i for i in range(7)]
    assert repr(shards) == "<XShards of 7 shards: from_rdd → elements>"


def test_an_rdd_is_evaluated_once(spark):
    calls = spark.sparkContext.accumulator(0)

    def counted(i):
        calls.add(1)
        return i

    shards = XShards.from_rdd(spark.sparkContext.parallelize(range(5), 2).map(counted))
    assert shards.collect() == shards.collect() == list(range(5))
    assert calls.value == 5


def test_partitions_as_shards(spark):
    rows = spark.sparkContext.parallelize(range(10), 4)
    assert XShards.from_rdd(rows.glom()).collect() == rows.glom().collect()


def test_an_element_larger_than_a_block(spark):
    """Blocks of a file are about 1 MB; elements of any size share one."""
    sizes = [10, 3_000_000, 20, 1_500_000, 0]
    rdd = spark.sparkContext.parallelize(sizes, 1).map(lambda n: np.arange(n, dtype=np.int32))
    found = XShards.from_rdd(rdd).collect()
    assert [len(one) for one in found] == sizes
    assert all((one == np.arange(len(one))).all() for one in found)


def test_there_and_back(spark):
    made = XShards.partition(np.arange(11), 4).transform_shard(lambda x: {"x": x, "n": len(x)})
    rdd = made.to_rdd()
    assert rdd.getNumPartitions() == 4
    assert rdd.map(lambda shard: int(shard["x"].sum())).collect() == [3, 12, 21, 19]
    back = XShards.from_rdd(rdd)
    assert [one["n"] for one in back.collect()] == [3, 3, 3, 2]


def test_objects_of_the_callers_classes(spark):
    points = XShards.partition([1, 2, 3], 3).transform_shard(lambda one: Point(one[0]))
    assert points.to_rdd().map(lambda point: point.x).collect() == [1, 2, 3]


def test_rows_outlive_the_shards_and_go_with_the_rdd(spark):
    before = spark.spooled_folders()
    rdd = XShards.partition([1, 2, 3], 3).to_rdd()
    gc.collect()
    from bigdl.orca.data.adapters import spark_keeping

    spark.sparkContext._jvm.System.gc()
    spark_keeping.let_go()
    assert spark.spooled_folders() - before
    assert rdd.collect() == [[1], [2], [3]]
    assert rdd.map(len).collect() == [1, 1, 1]


def test_files_go_with_the_shards(spark):
    before = spark.spooled_folders()
    shards = XShards.from_rdd(spark.sparkContext.parallelize(range(3)))
    doubled = shards.transform_shard(lambda one: 2 * one)
    assert spark.spooled_folders() - before
    del shards
    assert doubled.collect() == [0, 2, 4]
    del doubled
    gc.collect()
    assert spark.spooled_folders() <= before


def test_what_fails_in_the_rdd_is_told(spark):
    def bad(i):
        raise ValueError(f"no {i} here")

    before = spark.spooled_folders()
    with pytest.raises(Exception, match="no 0 here"):
        XShards.from_rdd(spark.sparkContext.parallelize([0], 1).map(bad))
    assert spark.spooled_folders() <= before


def test_what_is_no_rdd_of_shards(spark, monkeypatch):
    with pytest.raises(ArgumentError, match="an RDD of Spark's, not"):
        XShards.from_rdd(spark.range(3))
    with pytest.raises(DataError, match="this RDD has none"):
        XShards.from_rdd(spark.sparkContext.parallelize([], 1))
    monkeypatch.setattr("bigdl.orca.data.adapters.spark_rdd._MOST_SHARDS", 10)
    before = spark.spooled_folders()
    with pytest.raises(DataError, match=r"has 11\. .*glom\(\)"):
        XShards.from_rdd(spark.sparkContext.parallelize(range(11)))
    assert spark.spooled_folders() <= before
