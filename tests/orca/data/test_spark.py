"""Spark DataFrames as data: every row once, the types that models take, nothing left behind."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bigdl.errors import ArgumentError, ConfigError, DataError
from bigdl.orca.data.adapters import adapt
from bigdl.orca.data.contract import Column, Request
from bigdl.testing.processes import within
from bigdl.testing.sharded import ShardedContract

pytest.importorskip("pyspark")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # py4j's sockets


def numbered(spark, rows):
    """Rows 0 … in partitions of very different sizes, some of them empty."""
    cut = [0, rows // 3, rows // 3, rows - 1, rows, rows]
    parts = [spark.range(a, b, 1, 1) for a, b in pairwise(cut)]
    whole = parts[0]
    for one in parts[1:]:
        whole = whole.union(one)
    return whole.selectExpr("'x' unused", "id user", "id * 2 item", "double(id) label")


class SparkContract(ShardedContract):
    request = Request(feature_cols=["user", "item"], label_cols=["label"])
    recipe_bytes = 20_000
    window_bytes = 300

    @pytest.fixture(autouse=True)
    def _session(self, spark):
        self.spark = spark

    def make(self, rows):
        sharded = adapt(numbered(self.spark, rows), self.request)
        object.__setattr__(sharded, "window_bytes", self.window_bytes)
        self.opened.append(sharded)
        return sharded

    @pytest.fixture(autouse=True)
    def _close(self):
        self.opened = []
        yield
        for one in self.opened:
            one.let_go()

    def ids(self, data):
        (user, item), label = data
        assert (user.dtype, item.dtype, label.dtype) == (np.int64, np.int64, np.float32)
        np.testing.assert_array_equal(item, 2 * user)
        np.testing.assert_array_equal(label, user)
        return user


class TestSpark(SparkContract):
    """Blocks of a partition each, in windows of a few."""


@pytest.mark.slow
class TestSparkInOneWindow(SparkContract):
    window_bytes = 1 << 30


# --- values -------------------------------------------------------------------------------------


def whole(frame, **asked):
    """All rows as one batch of features."""
    request = Request(call="evaluate", **{"feature_cols": ["a"], "label_cols": ["one"], **asked})
    sharded = adapt(frame.selectExpr("*", "1 one"), request)
    try:
        (batch,) = sharded.open(0, 1).batches(10_000)
        return batch.data[0]
    finally:
        sharded.let_go()


NOON_US = 1_577_962_800_000_005  # 12:00:00.000005 in Berlin, on 2020-01-02
VALUES = [
    ("CAST(id AS TINYINT)", np.array([0, 1])),
    ("id", np.array([0, 1])),
    ("id / 4", np.array([0, 0.25], np.float32)),
    ("float(id)", np.array([0, 1], np.float32)),
    ("double('NaN')", np.array([np.nan, np.nan], np.float32)),
    ("id = 1", np.array([False, True])),
    ("CAST(id / 4 AS DECIMAL(20, 4))", np.array([0, 0.25], np.float32)),
    ("timestamp'2020-01-02 12:00:00.000005'", np.array([NOON_US] * 2)),
    ("timestamp_ntz'2020-01-02 12:00:00.000005'", np.array([NOON_US + 3_600_000_000] * 2)),
    ("date'1970-01-02'", np.array([86_400_000_000] * 2)),
    ("interval '1' second * id", np.array([0, 1_000_000])),
    ("array(id, id + 1)", np.array([[0, 1], [1, 2]])),
    ("array(float(id))", np.array([[0], [1]], np.float32)),
    ("array(array(id), array(7))", np.array([[[0], [7]], [[1], [7]]])),
    ("array(id = 1)", np.array([[False], [True]])),
]


@pytest.mark.parametrize(("sql", "expected"), VALUES, ids=[sql for sql, _ in VALUES])
def test_values_have_the_types_that_models_take(spark, sql, expected):
    found = whole(spark.range(0, 2, 1, 2).selectExpr(f"{sql} a"))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


def test_dense_and_sparse_vectors(spark):
    from pyspark.ml.linalg import Vectors

    rows = [(Vectors.dense([1, 2, 3]),), (Vectors.sparse(3, {2: 5.0}),), (Vectors.dense([0] * 3),)]
    found = whole(spark.createDataFrame(rows, ["a"]).coalesce(1))
    np.testing.assert_array_equal(found, [[1, 2, 3], [0, 0, 5], [0, 0, 0]])
    assert found.dtype == np.float64


def test_strings_and_bytes_go_to_the_transform(spark):
    frame = spark.range(0, 3, 1, 2).selectExpr("repeat('x', int(id)) a", "binary('yy') b", "id c")

    def transform(columns):
        texts, data, numbers = columns
        return np.array([len(t) + len(d) for t, d in zip(texts, data, strict=True)]) + numbers

    assert whole(frame, feature_cols=["a", "b", "c"], transform=transform).tolist() == [2, 4, 6]


def test_what_stands_for_nulls(spark):
    frame = spark.range(0, 4, 1, 3).selectExpr("IF(id = 2, NULL, id) a", "IF(id < 3, 'x', NULL) b")
    assert whole(frame, fill={"a": 7}).tolist() == [0, 1, 7, 3]
    found = whole(frame, feature_cols=["b"], fill="?", transform=lambda b: b == "?")
    assert found.tolist() == [False, False, False, True]


def test_names_are_literal_and_columns_many(spark):
    names = ["a.b", "c d", "`", "ä", *(f"n{i}" for i in range(296))]
    frame = spark.range(0, 5, 1, 2).selectExpr(*[f"id + {i}" for i in range(300)]).toDF(*names)
    found = whole(frame, feature_cols=["`", "a.b", "n295"])
    assert [column[0] for column in found] == [2, 0, 299]
    assert len(whole(frame, feature_cols=names)) == 300


def test_names_that_differ_in_case_only(spark):
    frame = spark.range(2).selectExpr("id", "id + 5").toDF("a", "A")
    assert whole(frame, feature_cols=["A"]).tolist() == [5, 6]


def test_the_plan_runs_once(spark, tmp_path):
    log = str(tmp_path / "log")
    open(log, "w").close()

    def noted(batches):
        for batch in batches:
            with open(log, "a") as file:
                file.write("x" * batch.num_rows)
            yield batch

    frame = (
        spark.range(0, 20, 1, 3)
        .selectExpr("id", "double(id) y")
        .mapInArrow(noted, "id long, y double")
    )
    sharded = adapt(frame, Request(feature_cols=["id"], label_cols=["y"]))
    for epoch in range(3):
        for rank in range(2):
            list(sharded.open(rank, 2).batches(4, epoch=epoch, seed=1))
    sharded.let_go()
    assert len(Path(log).read_text()) == 20


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_tiny_partitions(spark, count):
    """Some of them empty. (Spark itself takes tens of milliseconds for each.)"""
    frame = spark.range(0, 2 * count, 1, count).filter("id % 6 != 0").selectExpr("id a")
    assert whole(frame).tolist() == [i for i in range(2 * count) if i % 6]


def test_the_schema_and_the_recipe(spark):
    frame = spark.range(0, 4, 1, 2).selectExpr("array(1.5D, 2D) a", "id b", "id / 2 c", "'s' s")
    request = Request(feature_cols=["a", "b", "s"], label_cols=["c"], transform=lambda x: x[:2])
    sharded = adapt(frame, request)
    assert sharded.schema.features == (
        Column(name="a", dtype="float64", shape=(2,)),
        Column(name="b", dtype="int64"),
        Column(name="s", dtype="object"),
    )
    assert sharded.schema.labels == Column(name="c", dtype="float32")
    assert sharded.shards.token not in repr(sharded)
    sharded.let_go()


# --- what is left behind ------------------------------------------------------------------------


def test_nothing_is_left(spark):
    sharded = adapt(numbered(spark, 50), SparkContract.request)
    folders = spark.spooled_folders()
    assert folders
    assert {oct(folder.stat().st_mode)[-3:] for folder in folders} == {"700"}
    copy = pickle.loads(pickle.dumps(sharded))
    sharded.let_go()
    assert not spark.spooled_folders()
    with pytest.raises(DataError, match="Spooled rows are gone"):
        list(copy.open(0, 1).batches(4))


def test_what_nobody_holds_goes(spark):
    sharded = adapt(numbered(spark, 50), SparkContract.request)
    assert spark.spooled_folders()
    del sharded
    assert within(5, lambda: not spark.spooled_folders())


def test_a_failing_plan_leaves_nothing_and_is_the_callers_own_error(spark):
    frame = spark.range(4).selectExpr("raise_error('mine') a", "id b")
    with pytest.raises(Exception, match="mine"):
        adapt(frame, Request(feature_cols=["a"], label_cols=["b"]))
    assert not spark.spooled_folders()


def test_a_broken_off_spool_ends_sparks_work(spark, monkeypatch):
    """Also where Spark's own handler of Ctrl-C, which cancels all jobs, is not in place."""
    tracker = spark.sparkContext.statusTracker()

    def hang(batches):
        time.sleep(600)
        yield from batches

    def interrupt():
        assert within(60, tracker.getActiveJobsIds)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            adapt(
                spark.range(4).mapInArrow(hang, "id long").selectExpr("id a", "id b"),
                Request(feature_cols=["a"], label_cols=["b"]),
            )
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
    assert within(30, lambda: not tracker.getActiveJobsIds())
    assert not spark.spooled_folders()


# --- what cannot be -----------------------------------------------------------------------------

REFUSED = [
    ("id a", {"feature_cols": None}, ConfigError, r"needs feature_cols=\[…\]"),
    ("id a", {"label_cols": None}, ConfigError, r"needs label_cols=\[…\]"),
    ("id a", {"feature_cols": []}, ConfigError, "feature_cols is empty"),
    ("id a", {"feature_cols": 3}, ArgumentError, "feature_cols is a int"),
    ("id usr", {"feature_cols": ["user"]}, DataError, "no column 'user'.*[Dd]id you mean"),
    ("'x' a", {}, DataError, "Column 'a' holds strings"),
    ("binary('x') a", {}, DataError, r"Column 'a' holds objects \(bytes\)"),
    ("map(1, 2) a", {}, DataError, "Column 'a' holds"),
    ("IF(id > 0, NULL, id) a", {}, DataError, r"Nulls in 6 rows: column 'a' has 5"),
    ("IF(id > 3, NULL, 'x') a", {"fill": 3, "transform": len}, DataError, "fill=3 does not fit"),
    ("id a", {"fill": {"b": 1}}, DataError, "fill: no column 'b'"),
    ("array_repeat(1, int(id)) a", {}, DataError, "one fixed length"),
    ("IF(id < 3, array(1), array(1, 2)) a", {}, DataError, "one fixed length"),
    ("array(1, NULL) a", {}, DataError, "nulls inside"),
    ("array('x') a", {}, DataError, "holds arrays of string"),
]


@pytest.mark.parametrize(("sql", "asked", "kind", "text"), REFUSED, ids=[r[3] for r in REFUSED])
def test_misuse(spark, sql, asked, kind, text):
    frame = spark.range(0, 6, 1, 2).selectExpr(sql, "id one")
    request = Request(**{"feature_cols": ["a"], "label_cols": ["one"], **asked})
    with pytest.raises(kind, match=text):
        adapt(frame, request)
    assert not spark.spooled_folders()


def test_no_rows(spark):
    frame = spark.range(0).selectExpr("id a", "id one")
    with pytest.raises(DataError, match=r"evaluate\(\) got a Spark DataFrame of no rows"):
        adapt(frame, Request(call="evaluate", feature_cols=["a"], label_cols=["one"]))


def test_two_columns_of_one_name(spark):
    frame = spark.range(3).selectExpr("id a", "id + 1 a", "id b")
    with pytest.raises(DataError, match="2 columns are called 'a'"):
        adapt(frame, Request(feature_cols=["a"], label_cols=["b"]))


def test_a_stream_is_refused(spark):
    frame = spark.readStream.format("rate").load().selectExpr("value a", "value b")
    with pytest.raises(ConfigError, match=r"fit\(\) cannot use a stream"):
        adapt(frame, Request(feature_cols=["a"], label_cols=["b"]))


def test_workers_without_bigdl_are_said_so(spark, monkeypatch):
    from bigdl.errors import ContextError
    from bigdl.orca.data.adapters import spark_spool

    def task(order):
        def fail(batches):
            yield from batches
            raise ModuleNotFoundError("No module named 'bigdl'")

        return fail

    monkeypatch.setattr(spark_spool, "_task", task)
    frame = spark.range(3).selectExpr("'x' note", "id one")
    with pytest.raises(ContextError, match="PYSPARK_PYTHON="):
        adapt(frame, Request(feature_cols=["note"], label_cols=["one"]))
