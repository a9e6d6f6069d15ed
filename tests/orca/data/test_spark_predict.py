"""Predictions beside the rows of Spark DataFrames: whatever the plan, each beside its own row."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest

from bigdl.errors import ConfigError, DataError
from bigdl.orca import init_orca_context
from bigdl.orca.learn import Predictor
from bigdl.testing.processes import within

pytest.importorskip("pyspark")
torch = pytest.importorskip("torch")

from bigdl.orca.data.adapters.spark_keeping import let_go  # noqa: E402
from bigdl.orca.learn.pytorch import Estimator  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # py4j's sockets


class Same(torch.nn.Module):
    """Its output is its input."""

    def forward(self, x):
        return x


class Two(torch.nn.Module):
    def forward(self, a, b):
        return {"sum": (a + b).double(), "both": torch.stack([a, b], 1)}


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, a, b):
        return self.layer(torch.stack([a, b.float()], 1))[:, 0]


@pytest.fixture(scope="module", autouse=True)
def _context():
    with init_orca_context(cores=2):
        yield


@pytest.fixture
def same():
    return Estimator.from_torch(Same())


def collected(session):
    """Wait until what no plan reads is gone."""

    def is_gone():
        gc.collect()
        session.sparkContext._jvm.System.gc()
        let_go()
        return not session.spooled_folders()

    return within(20, is_gone)


# --- known answers ------------------------------------------------------------------------------


def unstable(session, rows=400):
    """Another value for each row each time it is evaluated, then a shuffle."""

    def drawn(batches):
        import pyarrow as pa

        for batch in batches:
            values = [random.SystemRandom().randrange(1 << 40) for _ in range(batch.num_rows)]
            yield pa.RecordBatch.from_arrays([batch.column(0), pa.array(values)], ["id", "drawn"])

    frame = session.range(0, rows, 1, 4).mapInArrow(drawn, "id long, drawn long")
    return frame.orderBy("drawn")


def test_the_plan_is_as_unstable_as_the_test_needs(spark):
    frame = unstable(spark)
    assert frame.filter("id >= 0").collect() != frame.filter("id > -1").collect()


def test_each_prediction_is_beside_its_own_row(spark, same):
    found = same.predict(unstable(spark), feature_cols=["drawn"])
    assert found.columns == ["id", "drawn", "prediction"]
    first = found.collect()
    assert sorted(row.id for row in first) == list(range(400))
    assert all(row.drawn == row.prediction for row in first)
    # fixed at the call: whatever is derived from it says the same
    drawn = {row.id: row.drawn for row in first}
    other = spark.range(100, 200).withColumnRenamed("id", "key")
    derived = {
        "again": found,
        "filter": found.filter("id % 2 = 0"),
        "limit": found.limit(50),
        "order": found.orderBy("id"),
        "join": other.join(found, other.key == found.id).drop("key"),
        "shuffle": found.repartition(3),
    }
    for name, frame in derived.items():
        rows = frame.collect()
        assert rows, name
        assert all(row.prediction == row.drawn == drawn[row.id] for row in rows), name
    assert found.collect() == first


def test_files_live_as_long_as_a_plan_reads_them(spark, same):
    assert collected(spark)
    derived = same.predict(spark.range(50), feature_cols=["id"]).filter("id < 10")
    other = spark.range(20).withColumnRenamed("id", "key")
    joined = other.join(derived, other.key == derived.id)
    del derived
    for _ in range(5):
        gc.collect()
        spark.sparkContext._jvm.System.gc()
        let_go()
    assert sorted(row.prediction for row in joined.collect()) == list(range(10))
    assert spark.spooled_folders()
    del joined
    assert collected(spark)


def test_as_from_pandas_whatever_the_columns(spark):
    import pandas as pd

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a.b": rng.normal(size=200), "c d": rng.integers(0, 9, 200)})
    frame["text"] = [None if i % 7 == 0 else f"t{i}" for i in range(200)]
    estimator = Estimator.from_torch(Linear())
    asked = {"feature_cols": ["a.b", "c d"], "output_cols": "score"}
    expected = estimator.predict(frame, **asked)
    found = estimator.predict(spark.createDataFrame(frame).repartition(3), **asked)
    assert found.schema["score"].dataType.typeName() == "float"
    found = found.toPandas().sort_values("a.b").reset_index(drop=True)
    expected = expected.sort_values("a.b").reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected)


def test_columns_of_any_type_come_back_as_they_were(spark):
    from pyspark.ml.linalg import Vectors

    rows = spark.range(0, 9, 1, 2).selectExpr(
        "id", "IF(id = 3, NULL, 'x') s", "array(id, NULL) l", "map('k', id) m",
        "named_struct('n', id, 't', array('u')) t", "CAST(id AS DECIMAL(30, 3)) d",
        "timestamp_micros(id) ts", "date_add(date'2020-01-01', int(id)) da", "binary('b') b",
        "interval '1' day i", "double('NaN') nan", "id AS id2",
    )  # fmt: skip
    vectors = spark.createDataFrame([(i, Vectors.dense([i, 1.0])) for i in range(9)], ["vid", "v"])
    frame = rows.join(vectors, rows.id == vectors.vid).toDF(*rows.columns[:-1], "id", "vid", "v.v")
    frame = frame.drop("vid")
    found = Estimator.from_torch(Same()).predict(frame, feature_cols=["v.v"])
    assert found.columns == [*frame.columns, "prediction"]
    assert [f.dataType for f in found.schema.fields[:-1]] == [
        f.dataType for f in frame.schema.fields
    ]
    for row, before in zip(sorted(found.collect()), sorted(frame.collect()), strict=True):
        assert str(tuple(row)[:-1]) == str(tuple(before))  # NaN equals nothing
        assert row[-1] == [float(row[0]), 1.0]


def test_several_outputs(spark):
    frame = spark.range(5).selectExpr("float(id) a", "float(2 * id) b")
    found = Estimator.from_torch(Two()).predict(frame, feature_cols=["a", "b"])
    assert found.columns == ["a", "b", "prediction_sum", "prediction_both"]
    assert found.dtypes[2:] == [("prediction_sum", "double"), ("prediction_both", "array<float>")]
    for row in found.collect():
        assert (row[2], row[3]) == (row.a + row.b, [row.a, row.b])


def test_no_rows_and_empty_partitions(spark, same):
    found = same.predict(spark.range(0), feature_cols=["id"])
    assert (found.dtypes, found.count()) == ([("id", "bigint"), ("prediction", "float")], 0)
    skewed = spark.range(0).union(spark.range(0, 9, 1, 1)).union(spark.range(0))
    assert [row.prediction for row in same.predict(skewed, feature_cols=["id"]).collect()] == [
        *range(9)
    ]


def test_transform_and_fill(spark, same):
    frame = spark.range(6).selectExpr("IF(id = 2, NULL, repeat('x', int(id))) s")

    def lengths(texts):
        return np.array([float(len(text)) for text in texts])

    found = same.predict(frame, feature_cols=["s"], fill="xxxxxxx", transform=lengths).collect()
    assert [(row.s is None, row.prediction) for row in found] == [
        (False, 0), (False, 1), (True, 7), (False, 3), (False, 4), (False, 5)
    ]  # fmt: skip


def test_predictor(spark, same):
    found = Predictor(same, workers=1).predict(spark.range(9), 4, feature_cols=["id"])
    assert all(row.id == row.prediction for row in found.collect())


REFUSED = [
    ("id", {"feature_cols": None}, ConfigError, "needs feature_cols"),
    ("id prediction", {"feature_cols": "prediction"}, ConfigError, "column 'prediction' already"),
    ("id", {"output_cols": "id"}, ConfigError, "column 'id' already"),
    ("id", {"output_cols": ["p", "q"]}, ConfigError, "2 names, but the model has 1"),
    ("IF(id = 1, NULL, id) id", {}, DataError, "Nulls in 4 rows: column 'id' has 1"),
    ("'x' id", {}, DataError, "Column 'id' holds strings"),
    ("array_repeat(0, int(id)) id", {}, DataError, "one fixed length"),
]


@pytest.mark.parametrize(("sql", "asked", "kind", "text"), REFUSED, ids=[r[3] for r in REFUSED])
def test_misuse(spark, same, sql, asked, kind, text):
    before = spark.spooled_folders()
    frame = spark.range(0, 4, 1, 2).selectExpr(sql)
    with pytest.raises(kind, match=text):
        same.predict(frame, **{"feature_cols": ["id"], **asked})
    assert spark.spooled_folders() <= before


# --- streams ------------------------------------------------------------------------------------


def test_a_stream_gives_a_stream(spark, same, tmp_path):
    for i in range(3):
        spark.range(10 * i, 10 * i + 10, 1, 1).write.parquet(f"{tmp_path}/in", mode="append")
    stream = spark.readStream.schema("id long").option("maxFilesPerTrigger", 1)
    found = Predictor(same).predict(stream.parquet(f"{tmp_path}/in"), feature_cols=["id"])
    assert found.isStreaming
    assert found.dtypes == [("id", "bigint"), ("prediction", "bigint")]
    query = (
        found.writeStream.format("parquet")
        .option("checkpointLocation", f"{tmp_path}/checkpoint")
        .trigger(availableNow=True)
        .start(f"{tmp_path}/out")
    )
    assert query.awaitTermination(120)
    rows = spark.read.parquet(f"{tmp_path}/out").collect()
    assert sorted(row.id for row in rows) == list(range(30))
    assert all(row.id == row.prediction for row in rows)


def test_a_stream_whose_arrays_have_no_length(spark, same):
    stream = spark.readStream.format("rate").load().selectExpr("array(value, value) v")
    with pytest.raises(ConfigError, match="How long the arrays in 'v' are is not known"):
        same.predict(stream, feature_cols=["v"])
    said = stream.withMetadata("v", {"ml_attr": {"num_attrs": 2}})
    found = same.predict(said, feature_cols=["v"])
    assert found.dtypes == [("v", "array<bigint>"), ("prediction", "array<bigint>")]


# --- training -----------------------------------------------------------------------------------


def test_fit_and_evaluate_as_from_pandas(spark):
    import pandas as pd

    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"a": rng.normal(size=500), "b": rng.integers(0, 9, 500)})
    frame["y"] = frame["a"] + frame["b"]
    weights, losses, scores = [], [], []
    asked = {"feature_cols": ["a", "b"], "label_cols": ["y"]}
    before = spark.spooled_folders()
    for data, workers in [(frame, 1), (spark.createDataFrame(frame).coalesce(1), 1),
                          (spark.createDataFrame(frame), 2)]:  # fmt: skip
        model = Linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        estimator = Estimator.from_torch(model, optimizer, torch.nn.MSELoss(), workers=workers)
        rows = estimator.fit(data, 3, batch_size=32, validation_data=data, **asked)
        weights.append(np.concatenate([p.detach().numpy().ravel() for p in model.parameters()]))
        losses.append([row["loss"] for row in rows] + [row["val_loss"] for row in rows])
        scores.append(estimator.evaluate(data, **asked)["loss"])
    np.testing.assert_array_equal(weights[1], weights[0])
    np.testing.assert_array_equal(losses[1], losses[0])
    np.testing.assert_allclose(weights[2], weights[0], rtol=1e-5, atol=1e-6)
    assert scores[1] == scores[0] == pytest.approx(scores[2], rel=1e-5)
    assert spark.spooled_folders() <= before


def test_what_a_failing_fit_spooled_is_gone_though_its_error_is_held(spark):
    before = spark.spooled_folders()
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    estimator = Estimator.from_torch(model, optimizer, torch.nn.MSELoss())
    frame = spark.range(8).selectExpr("double(id) a", "id b")
    with pytest.raises(TypeError, match="takes 3 positional") as held:
        estimator.fit(frame, feature_cols=["a", "b", "b"], label_cols=["a"])
    assert held.value is not None
    assert spark.spooled_folders() <= before
