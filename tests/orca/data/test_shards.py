"""Shards as data of an estimator: the contract, types that differ among shards, predictions."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest

from bigdl._base import trees
from bigdl.errors import BigDLError, ConfigError, ContextError, DataError
from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.data import XShards
from bigdl.orca.data.adapters import adapt
from bigdl.orca.data.contract import Column, OutputSchema, Request
from bigdl.testing.sharded import ShardedContract

pd = pytest.importorskip("pandas")


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=2)
    stop_orca_context()


def of_shards(*shards):
    """Shards of these very values."""
    return XShards.partition(np.arange(len(shards)), len(shards)).transform_shard(
        lambda number: shards[number[0]]
    )


class TestArrays(ShardedContract):
    """Shards of unequal lengths, some of no rows."""

    window_bytes: int | None = None
    recipe_bytes = 4_000

    def make(self, rows):
        edges = [0, 0, rows // 5, rows // 2, rows // 2, rows]
        i = np.arange(rows)
        shards = [
            {"x": {"a": i[j:k], "b": i[j:k, None] * 0.5}, "y": i[j:k] * 3, "note": "kept"}
            for j, k in pairwise(edges)
        ]
        sharded = adapt(of_shards(*shards), Request())
        if self.window_bytes is not None:
            object.__setattr__(sharded, "window_bytes", self.window_bytes)
        return sharded

    def ids(self, data):
        features, labels = data
        np.testing.assert_array_equal(features["b"][:, 0], features["a"] * 0.5)
        np.testing.assert_array_equal(labels, features["a"] * 3)
        return features["a"]


class TestArraysInSmallWindows(TestArrays):
    window_bytes = 24 * 12


class TestFrames(ShardedContract):
    recipe_bytes = 4_000

    def make(self, rows):
        i = np.arange(rows)
        table = pd.DataFrame({"user": i, "item": 2 * i, "label": i / 1, "unused": "x"})
        shards = XShards.partition(table, min(3, rows))
        return adapt(shards, Request(feature_cols=["user", "item"], label_cols="label"))

    def ids(self, data):
        (user, item), label = data
        np.testing.assert_array_equal(item, 2 * user)
        np.testing.assert_array_equal(label, user)
        return user


# --- what differs among shards ----------------------------------------------------------------


def whole(shards, **asked):
    """All rows as one batch, and what the recipe says they are."""
    sharded = adapt(shards, Request(**asked))
    (batch,) = sharded.open(0, 1).batches(1000)
    for column, leaf in zip(
        trees.leaves((sharded.schema.features, sharded.schema.labels)),
        trees.leaves(batch.data),
        strict=True,
    ):
        assert column == Column(name=column.name, dtype=str(leaf.dtype), shape=leaf.shape[1:])
    return batch.data


def test_frames_are_read_as_the_joined_table_is():
    """A column of whole numbers in one shard, of others in another; all of one type in a third."""
    frames = [
        pd.DataFrame({"a": [1, 16_777_217], "b": [True, False], "c": pd.array([1, 2], "Int64")}),
        pd.DataFrame({"a": [0.1, np.nan], "b": [True, True], "c": pd.array([3, None], "Int64")}),
        pd.DataFrame({"a": [], "b": [], "c": []}),
    ]
    asked = {"feature_cols": ["a", "b"], "label_cols": ["c"], "fill": {"c": 9}}
    found = whole(of_shards(*frames), **asked)
    wanted = whole_of_table(pd.concat(frames[:2]), **asked)
    for ours, theirs in zip(trees.leaves(found), trees.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def whole_of_table(table, **asked):
    (batch,) = adapt(table, Request(**asked)).open(0, 1).batches(1000)
    return batch.data


def test_arrays_become_the_type_that_holds_all():
    x = [np.array([1, 2], np.int32), np.array([0.5], np.float32), np.array([], np.float32)]
    features, labels = whole(of_shards(*({"x": one, "y": one > 1} for one in x)))
    assert features.dtype == np.float64
    assert features.tolist() == [1.0, 2.0, 0.5]
    assert labels.tolist() == [False, True, False]


def test_tensors(context):
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    data = {"x": torch.arange(6.0).reshape(6, 1), "y": torch.arange(6)}
    reader = adapt(XShards.partition(data, 3), Request()).open(0, 1)
    found = [batch.data for batch in reader.batches(4)]
    assert [labels.tolist() for _, labels in found] == [[0, 1, 2, 3], [4, 5]]
    as_arrays = adapt((data["x"], data["y"])).open(0, 1).batches(4)
    assert [type(leaf) for leaf in found[0]] == [type(leaf) for leaf in next(as_arrays).data]


def test_large_shards_are_cut_into_blocks(monkeypatch):
    from bigdl.orca.data.adapters import shards as adapter

    monkeypatch.setattr(adapter, "WINDOW_BYTES", 1000)
    x = np.arange(1000.0).reshape(500, 2)
    sharded = adapt(of_shards({"x": x[:1], "y": x[:1, 0]}, {"x": x[1:], "y": x[1:, 0]}))
    assert max(sharded.counts) * sharded.schema.row_bytes <= 1000
    assert len(sharded.counts) > 10
    object.__setattr__(sharded, "window_bytes", 1000)
    found = [b.data[0] for b in sharded.open(0, 1).batches(64)]
    np.testing.assert_array_equal(np.concatenate(found), x)
    shuffled = [b.data[0] for b in sharded.open(0, 1).batches(64, seed=1)]
    assert sorted(np.concatenate(shuffled)[:, 0]) == x[:, 0].tolist()


def test_the_rows_do_not_travel_with_the_recipe(context):
    x = np.zeros((10_000, 100), np.float32)
    sharded = adapt(XShards.partition({"x": x, "y": x[:, 0]}, 2))
    assert len(pickle.dumps(sharded)) < 4_000
    assert sharded.rows == 10_000


FRAME = pd.DataFrame({"a": [1.0, 2.0], "y": [0, 1]})
COLUMNS = {"feature_cols": ["a"], "label_cols": ["y"]}

MISUSE = [
    ([FRAME], {}, ConfigError, "feature_cols"),
    ([FRAME], {"feature_cols": ["a"]}, ConfigError, "label_cols"),
    ([FRAME], {"feature_cols": ["b"], "label_cols": ["y"]}, DataError, "no column 'b'"),
    ([{"x": np.zeros(2), "y": np.zeros(2)}], COLUMNS, ConfigError, "feature_cols"),
    ([{"x": np.zeros(2)}], {}, DataError, "dict with 'x'"),
    ([{"x": np.zeros(2), "y": np.zeros(3)}], {}, DataError, "2.*3"),
    ([np.zeros(3)], {}, DataError, "ndarray"),
    ([FRAME["a"]], COLUMNS, DataError, "Series"),
    ([FRAME, {"x": np.zeros(2), "y": np.zeros(2)}], COLUMNS, BigDLError, "feature_cols|differing"),
    ([FRAME[:0], FRAME[:0]], COLUMNS, DataError, "no rows"),
    ([FRAME, FRAME.assign(a=pd.Series([None, 1.0], dtype=object))], COLUMNS, DataError,
     "in 4 rows.*'a' has 1"),
    ([FRAME.assign(a=pd.array([1, None], "Int64"))] * 3, COLUMNS, DataError, "'a' has 3"),
    ([FRAME, FRAME.assign(a=[True, False])], COLUMNS, DataError, "float32.*bool.*one type"),
    ([FRAME.assign(a=["u", "v"])], COLUMNS, DataError, "strings"),
    ([FRAME.assign(a=[[1.0], [2.0]]), FRAME.assign(a=[[1.0, 2.0]] * 2)], COLUMNS, DataError,
     r"\(1,\).*\(2,\)"),
    ([{"x": np.zeros((2, 3)), "y": np.zeros(2)}, {"x": np.zeros((2, 4)), "y": np.zeros(2)}], {},
     DataError, r"\(3,\).*\(4,\)"),
    ([{"x": np.zeros(2), "y": np.zeros(2)}, {"x": (np.zeros(2),), "y": np.zeros(2)}], {},
     BigDLError, "nest|shard"),
]  # fmt: skip


@pytest.mark.parametrize(("shards", "asked", "kind", "text"), MISUSE, ids=range(len(MISUSE)))
def test_misuse(shards, asked, kind, text):
    with pytest.raises(kind, match=text):
        adapt(of_shards(*shards), Request(**asked))


# --- predictions ------------------------------------------------------------------------------


def double(features):
    (a,) = features if isinstance(features, tuple) else (features,)
    return a * 2


def predicted(shards, fn=double, names="prediction", **asked):
    sharded = adapt(shards, Request(call="predict", **asked))
    return sharded.map_batches(fn, OutputSchema(names=names), size=3)


def test_frames_with_their_predictions():
    table = pd.DataFrame({"a": np.arange(7.0), "s": list("abcdefg")}, index=range(10, 17))
    found = predicted(XShards.partition(table, 3), feature_cols=["a"])
    assert isinstance(found, XShards)
    assert found.num_partitions() == 3
    wanted = table.assign(prediction=(table["a"] * 2).astype("float32"))
    pd.testing.assert_frame_equal(pd.concat(found.collect()), wanted)


def test_arrays_with_their_predictions():
    x = np.arange(5.0)
    found = predicted(XShards.partition({"x": x, "extra": x + 1}, 2)).collect()
    assert [list(shard) for shard in found] == [["x", "extra", "prediction"]] * 2
    assert np.concatenate([shard["prediction"] for shard in found]).tolist() == (x * 2).tolist()
    assert np.concatenate([shard["extra"] for shard in found]).tolist() == (x + 1).tolist()


def test_several_outputs():
    def both(features):
        (a,) = features if isinstance(features, tuple) else (features,)
        return {"one": a, "two": np.stack([a, -a], 1)}

    frames = XShards.partition(pd.DataFrame({"a": np.arange(4.0)}), 2)
    (first, _) = predicted(frames, both, feature_cols=["a"]).collect()
    assert first.columns.tolist() == ["a", "prediction_one", "prediction_two"]
    assert first["prediction_two"][1].tolist() == [1.0, -1.0]
    (first, _) = predicted(XShards.partition({"x": np.arange(4.0)}, 2), both, "p").collect()
    assert first["p"]["two"].tolist() == [[0.0, 0.0], [1.0, -1.0]]  # in the output's structure


def test_shards_without_rows_look_like_the_others():
    frames = [pd.DataFrame({"a": pd.Series([], dtype=float)}), pd.DataFrame({"a": [1.0, 2.0]})]
    for order in (1, -1):
        found = predicted(of_shards(*frames[::order]), feature_cols=["a"]).collect()[::order]
        assert [len(frame) for frame in found] == [0, 2]
        assert found[0].dtypes.equals(found[1].dtypes)
    dicts = [{"x": np.zeros(0)}, {"x": np.ones(2)}]
    found = predicted(of_shards(*dicts), lambda x: np.stack([x, x], 1)).collect()
    assert [shard["prediction"].shape for shard in found] == [(0, 2), (2, 2)]


def test_only_shards_without_rows_have_no_predictions():
    (found,) = predicted(of_shards({"x": np.zeros((0, 3))})).collect()
    assert len(found["x"]) == 0
    (found,) = predicted(of_shards(FRAME[:0]), feature_cols=["a"]).collect()
    assert len(found) == 0


def test_a_model_meets_one_type_in_all_shards():
    frames = of_shards(pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [0.5]}))
    seen = predicted(frames, lambda a: np.array([str(a.dtype)] * len(a)), feature_cols=["a"])
    assert pd.concat(seen.collect())["prediction"].tolist() == ["float32"] * 3


def test_a_name_that_is_taken():
    with pytest.raises(BigDLError, match="'a'"):
        predicted(XShards.partition(FRAME, 1), names="a", feature_cols=["a"])
    with pytest.raises(ConfigError, match="'x' already"):
        predicted(of_shards({"x": np.zeros(2)}), names="x")


def test_nulls_and_their_filling():
    frames = of_shards(pd.DataFrame({"a": pd.array([1, None], "Int64")}), FRAME[["a"]])
    with pytest.raises(DataError, match="'a' has 1"):
        predicted(frames, feature_cols=["a"])
    found = pd.concat(predicted(frames, feature_cols=["a"], fill=7).collect())
    assert found["prediction"].tolist() == [2.0, 14.0, 2.0, 4.0]


def test_shards_of_a_context_that_is_gone():
    shards = XShards.partition({"x": np.zeros(2), "y": np.zeros(2)}, 1)
    stop_orca_context()
    with pytest.raises(ContextError, match="init_orca_context"):
        adapt(shards)
    init_orca_context(cores=2)
    with pytest.raises(ContextError, match=r"not the running one.*init_orca_context"):
        adapt(shards)
