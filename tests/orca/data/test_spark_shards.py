"""Shards of frames from a Spark DataFrame, and back: order, types, nulls, and what they keep."""

from __future__ import annotations

import datetime
import decimal

import pytest

from bigdl.errors import ConfigError, DataError
from bigdl.orca import init_orca_context
from bigdl.orca.data import XShards

pytest.importorskip("pyspark")
pd = pytest.importorskip("pandas")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # py4j's sockets


@pytest.fixture(scope="module", autouse=True)
def _context():
    with init_orca_context(cores=2):
        yield


def rich(spark):
    return spark.range(0, 60, 1, 4).filter("id < 15 or id >= 30").selectExpr(
        "id", "IF(id % 5 = 0, NULL, CAST(id AS INT)) n", "IF(id = 7, NULL, id > 9) b",
        "IF(id = 8, NULL, concat('t', id)) s", "id / 7 f",
        "timestamp_micros(1577962800000000 + id) ts",
        "CAST(timestamp_micros(id) AS TIMESTAMP_NTZ) ntz",
        "CAST(id AS DECIMAL(30, 4)) d", "date_add(date'2020-01-01', int(id)) day",
        "IF(id = 9, NULL, array(id, NULL, 3)) l", "binary('b') `bi.n`",
    )  # fmt: skip


def test_there_and_back(spark):
    frame = rich(spark)
    shards = XShards.from_spark_df(frame)
    assert shards.num_partitions() == 3  # one has no rows
    back = shards.to_spark_df()
    # Python's decimals know their digits, and not those of their column
    expected = [(name, "decimal(6,4)" if name == "d" else kind) for name, kind in frame.dtypes]
    assert back.dtypes == expected
    assert back.collect() == frame.collect()
    assert back.filter("id = 31").select("id").collect()[0].id == 31


def test_what_pandas_gets(spark):
    table = pd.concat(XShards.from_spark_df(rich(spark)).collect(), ignore_index=True)
    assert table["id"].tolist() == [*range(15), *range(30, 60)]
    kinds = {name: str(dtype) for name, dtype in table.dtypes.items()}
    assert kinds == {
        "id": "int64", "n": "Int32", "b": "boolean", "s": "object", "f": "float64",
        "ts": "datetime64[us, Europe/Berlin]", "ntz": "datetime64[us]", "d": "object",
        "day": "object", "l": "object", "bi.n": "object",
    }  # fmt: skip
    assert table["n"].isna().sum() == 9
    assert table["ts"][3].value // 1000 == 1577962800000003
    assert table["d"][3] == decimal.Decimal("3.0000")
    assert table["day"][3] == datetime.date(2020, 1, 4)
    assert table["l"][3] == [3, None, 3]
    assert table["bi.n"][3] == b"b"


def test_no_rows_still_have_columns(spark):
    shards = XShards.from_spark_df(rich(spark).filter("id < 0"))
    [empty] = shards.collect()
    assert (len(empty), list(empty.columns)) == (0, rich(spark).columns)
    assert shards.to_spark_df().count() == 0


def test_work_on_shards_between(spark):
    shards = XShards.from_spark_df(spark.range(0, 20, 1, 4))
    doubled = shards.transform_shard(lambda frame: frame.assign(twice=frame["id"] * 2))
    del shards  # what is made of them needs their files
    rows = doubled.repartition(3).to_spark_df().collect()
    assert [(row.id, row.twice) for row in rows] == [(i, 2 * i) for i in range(20)]


def test_files_go_with_the_shards(spark):
    before = spark.spooled_folders()
    shards = XShards.from_spark_df(spark.range(9))
    assert spark.spooled_folders() > before
    del shards
    assert spark.spooled_folders() <= before


def test_shards_that_know_less_than_others(spark):
    frames = [
        pd.DataFrame({"a": [None, None], "b": [1, 2]}),
        pd.DataFrame({"a": ["x", None], "b": [1.5, 2.0]}),
        pd.DataFrame({"a": pd.Series([], dtype=object), "b": pd.Series([], dtype="int64")}),
    ]
    shards = XShards.partition(list(range(3)), 3).transform_shard(lambda i: frames[i[0]])
    found = shards.to_spark_df()
    assert found.dtypes == [("a", "string"), ("b", "double")]
    assert [tuple(row) for row in found.collect()] == [
        (None, 1.0), (None, 2.0), ("x", 1.5), (None, 2.0)
    ]  # fmt: skip


def test_types_of_pandas_that_spark_has_not(spark):
    frame = pd.DataFrame(
        {
            "u": pd.Series([1, 250], dtype="uint8"),
            "c": pd.Series(["x", "y"], dtype="category"),
            "t": pd.Series(pd.to_datetime(["2020-01-01 00:00:00.000001", None])),
        }
    )
    found = XShards.partition(frame, 1).to_spark_df()
    assert found.dtypes == [("u", "smallint"), ("c", "string"), ("t", "timestamp_ntz")]
    first, second = found.collect()
    assert tuple(first) == (1, "x", datetime.datetime(2020, 1, 1, 0, 0, 0, 1))
    assert tuple(second) == (250, "y", None)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: XShards.partition([1, 2], 2), "not of a list"),
        (lambda: XShards.partition(pd.DataFrame({0: [1]}), 1), "names that are texts"),
        (lambda: XShards.partition(pd.DataFrame({"a": [1, "x"]}), 1), "no type of Arrow's"),
    ],
)
def test_shards_that_are_no_tables(spark, make, text):
    with pytest.raises(DataError, match=text):
        make().to_spark_df()


def test_a_stream_is_refused(spark):
    with pytest.raises(ConfigError, match="stream"):
        XShards.from_spark_df(spark.readStream.format("rate").load())
