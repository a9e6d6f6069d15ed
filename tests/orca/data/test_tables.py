"""Frames, Arrow tables and Parquet files: columns, types, nulls, and predictions beside rows."""

from __future__ import annotations

import datetime
import decimal
import pickle
from itertools import pairwise

import numpy as np
import pytest

from bigdl.errors import ArgumentError, ConfigError, DataError
from bigdl.orca.data.adapters import adapt
from bigdl.orca.data.contract import Column, OutputSchema, Request
from bigdl.testing.sharded import ShardedContract

pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

KINDS = ["pandas", "arrow", "parquet"]
UTC = datetime.UTC


def numbered(rows):
    i = np.arange(rows)
    return {"user": i, "item": 2 * i, "label": i.astype(np.float64), "unused": ["x"] * rows}


class TableContract(ShardedContract):
    request = Request(feature_cols=["user", "item"], label_cols=["label"])

    def ids(self, data):
        (user, item), label = data
        assert (user.dtype, item.dtype, label.dtype) == (np.int64, np.int64, np.float32)
        np.testing.assert_array_equal(item, 2 * user)
        np.testing.assert_array_equal(label, user)
        return user


class TestFrame(TableContract):
    def make(self, rows):
        return adapt(pd.DataFrame(numbered(rows)), self.request)


class TestArrow(TableContract):
    def make(self, rows):
        whole = pa.table(numbered(rows))
        cut = rows // 3
        return adapt(pa.concat_tables([whole[:cut], whole[cut:]]), self.request)


class TestParquet(TableContract):
    """Several files with several row groups each, in windows of a few groups."""

    recipe_bytes = 20_000
    window_bytes = 300

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path

    def make(self, rows):
        folder = self.folder / str(rows)
        write(folder, pa.table(numbered(rows)), files=3, group=max(3, rows // 10))
        sharded = adapt(str(folder), self.request)
        object.__setattr__(sharded, "window_bytes", self.window_bytes)
        return sharded


class TestParquetInOneWindow(TestParquet):
    window_bytes = 1 << 30


def write(folder, table, *, files=1, group=1000):
    folder.mkdir(exist_ok=True)
    bounds = [table.num_rows * i // files for i in range(files + 1)]
    for number, (first, last) in enumerate(pairwise(bounds)):
        pq.write_table(table[first:last], folder / f"part-{number}.parquet", row_group_size=group)


@pytest.fixture(params=KINDS)
def table_of(request, tmp_path):
    """Makes the same columns as each kind of table."""

    def make(columns):
        if request.param == "pandas":
            return pd.DataFrame(columns)
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        if request.param == "arrow":
            return table
        write(tmp_path / "table", table)
        return str(tmp_path / "table")

    make.kind = request.param
    return make


def whole(data, **asked):
    """All rows as one batch of features."""
    request = Request(call="predict", **{"feature_cols": ["a"], **asked})
    (batch,) = adapt(data, request).open(0, 1).batches(1000)
    return batch.data


# --- values -----------------------------------------------------------------------------------

NOON = datetime.datetime(2020, 1, 2, 12, 0, 0, 5)
NOON_US = 1_577_966_400_000_005
VALUES = [
    ([1.5, float("nan")], np.array([1.5, np.nan], np.float32)),
    (np.array([1, 2], np.int8), np.array([1, 2], np.int64)),
    (np.array([1, 2], np.uint64), np.array([1, 2], np.int64)),
    (np.array([1, 2], np.float16), np.array([1, 2], np.float32)),
    ([True, False], np.array([True, False])),
    ([decimal.Decimal("1.25"), decimal.Decimal("-3")], np.array([1.25, -3], np.float32)),
    ([NOON, NOON], np.array([NOON_US] * 2)),
    ([NOON.replace(tzinfo=UTC)] * 2, np.array([NOON_US] * 2)),
    ([datetime.date(1970, 1, 2)], np.array([86_400_000_000])),
    (np.array(["1969-12-31T23:59:59"], "M8[ns]"), np.array([-1_000_000])),
    (np.array([5], "m8[ms]"), np.array([5000])),
    ([datetime.time(0, 0, 1)], np.array([1_000_000])),
    ([[1.0, 2.0], [3.0, 4.0]], np.array([[1, 2], [3, 4]], np.float64)),
    (
        [np.array([1, 2], np.int16), np.array([3, 4], np.int16)],
        np.array([[1, 2], [3, 4]], np.int16),
    ),
    ([[[1], [2]], [[3], [4]]], np.array([[[1], [2]], [[3], [4]]])),
]


@pytest.mark.parametrize(("values", "expected"), VALUES)
def test_values_have_the_types_that_models_take(table_of, values, expected):
    found = whole(table_of({"a": values}))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


def test_several_columns_are_a_tuple_in_the_order_asked(table_of):
    data = table_of({"a": [1], "b": [2], "c": [3]})
    assert [x.tolist() for x in whole(data, feature_cols=["c", "a"])] == [[3], [1]]
    request = Request(feature_cols="b", label_cols=["a", "c"])
    (batch,) = adapt(data, request).open(0, 1).batches(9)
    features, labels = batch.data
    assert features.tolist() == [2]
    assert [y.tolist() for y in labels] == [[1], [3]]


def test_strings_go_to_the_transform(table_of):
    data = table_of({"a": ["x", "yy"], "b": [1, 2]})
    found = whole(
        data,
        feature_cols=["a", "b"],
        transform=lambda columns: np.array([len(s) for s in columns[0]]) + columns[1],
    )
    assert found.tolist() == [2, 4]
    request = Request(feature_cols=["b"], label_cols=["a"], target_transform=lambda y: y == "yy")
    (batch,) = adapt(data, request).open(0, 1).batches(9)
    assert batch.data[1].tolist() == [False, True]


@pytest.mark.parametrize(
    ("values", "fill", "expected"),
    [
        (pd.array([1, None, 3], "Int64"), 7, [1, 7, 3]),
        (pd.array([1, None, 3], "Int64"), {"a": 7}, [1, 7, 3]),
        (pd.array([True, None, True], "boolean"), False, [True, False, True]),
        ([decimal.Decimal(2), None], 0.5, [2, 0.5]),
        ([NOON, None], NOON.replace(microsecond=6), [NOON_US, NOON_US + 1]),
        ([[1.0, 2.0], None], 0, [[1, 2], [0, 0]]),
        ([[1.0, 2.0], None], [3.0, 4.0], [[1, 2], [3, 4]]),
    ],
)
def test_what_stands_for_nulls(table_of, values, fill, expected):
    found = whole(table_of({"a": values}), fill=fill)
    np.testing.assert_array_equal(found, expected)


def test_null_strings_are_filled_too(table_of):
    data = table_of({"a": ["x", None]})
    assert whole(data, fill="?", transform=lambda a: a == "?").tolist() == [False, True]


@pytest.mark.parametrize("dtype", ["Int64", "int64[pyarrow]", "category"])
def test_column_types_of_pandas(dtype):
    found = whole(pd.DataFrame({"a": pd.Series([3, 1, 3]).astype(dtype)}))
    assert found.tolist() == [3, 1, 3]
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pd.Series([1.5, None], dtype="double[pyarrow]"), [1.5, 9.0]),
        (pd.Series([1.5, None], dtype="Float64"), [1.5, 9.0]),
        (pd.Series([1, None], dtype="category"), [1, 9]),
        (pd.Series([1, None], dtype=object), [1, 9]),
        (pd.Series([1.0, float("nan"), None], dtype=object), [1.0, float("nan"), 9.0]),
        (pd.Series(pd.arrays.SparseArray([0.0, 1.0])), [0.0, 1.0]),
        (pd.Series([np.array(1.0), np.array(2.0)]), [1.0, 2.0]),
        (pd.Series([True, False], dtype="bool[pyarrow]"), [True, False]),
    ],
)
def test_nulls_of_pandas_and_what_are_none(values, expected):
    np.testing.assert_array_equal(whole(pd.DataFrame({"a": values}), fill=9), expected)


@pytest.mark.parametrize("dtype", ["Int64", "string", "string[pyarrow]", "category", object])
def test_nulls_of_pandas_are_counted(dtype):
    values = ["x", None, None] if "string" in str(dtype) else [1, None, None]
    frame = pd.DataFrame({"a": pd.Series(values, dtype=dtype)})
    with pytest.raises(DataError, match="Nulls in 3 rows: column 'a' has 2"):
        whole(frame, transform=lambda a: a)


def test_names_are_literal():
    frame = pd.DataFrame({1: [1], "a.b": [2], "*": [3]})
    assert [x.tolist() for x in whole(frame, feature_cols=["*", 1, "a.b"])] == [[3], [1], [2]]


def test_the_schema_of_a_frame():
    frame = pd.DataFrame({"a": [[1.0, 2.0]], "b": [1], "c": [1.5]})
    schema = adapt(frame, Request(feature_cols=["a", "b"], label_cols=["c"])).schema
    assert schema.features[0] == Column(name="a", dtype="float64", shape=(2,))
    assert schema.labels == Column(name="c", dtype="float32")
    assert schema.row_bytes == 16 + 8 + 4


def test_the_schema_of_files(tmp_path):
    fixed = pa.array([[1.0, 2.0]], pa.list_(pa.float64(), 2))
    table = pa.table({"a": fixed, "b": [NOON], "c": [decimal.Decimal(1)], "d": [[1]], "s": ["x"]})
    write(tmp_path / "t", table)
    request = Request(feature_cols=["a", "b", "s"], label_cols=["c"], transform=lambda x: x[:2])
    schema = adapt(tmp_path / "t", request).schema
    assert schema.features == (
        Column(name="a", dtype="float64", shape=(2,)),
        Column(name="b", dtype="int64"),
        Column(name="s", dtype="object"),
    )
    assert schema.labels == Column(name="c", dtype="float32")
    assert adapt(tmp_path / "t", Request(feature_cols=["d"], call="predict")).schema is None
    for name in "abcds":  # what is said is what is read
        found = adapt(
            tmp_path / "t",
            Request(feature_cols=[name], call="predict", transform=lambda x: x),
        )
        (batch,) = found.open(0, 1).batches(1)
        if found.schema is not None:
            assert str(batch.data.dtype) == found.schema.features.dtype
            assert batch.data.shape[1:] == found.schema.features.shape


# --- predict ----------------------------------------------------------------------------------


def predict(data, fn, names="prediction", columns=("a",), **options):
    request = Request(call="predict", feature_cols=list(columns))
    return adapt(data, request).map_batches(fn, OutputSchema(names=names), size=4, **options)


@pytest.mark.parametrize("shares", [1, 3])
def test_a_frame_gets_its_prediction(shares):
    frame = pd.DataFrame(
        {"a": np.arange(11), "s": list("abcdefghijk"), "o": [{"k": 1}] * 11},
        index=pd.Index(np.arange(11)[::-1] * 2, name="key"),
    )
    before = frame.copy()
    found = predict(frame, lambda a: a * 2.0, shares=shares)
    assert found["prediction"].tolist() == [2.0 * i for i in range(11)]
    pd.testing.assert_frame_equal(found.drop(columns="prediction"), before)
    pd.testing.assert_frame_equal(frame, before)
    assert list(found.columns) == ["a", "s", "o", "prediction"]


def test_shapes_and_structures_of_predictions(table_of):
    data = table_of({"a": list(range(6))})

    def fn(a):
        return {"n": a[:, None], "v": np.stack([a, a], 1), "m": (a, a[:, None, None] + [[1, 2]])}

    found = predict(data, fn)
    if table_of.kind == "parquet":
        found = found.read_all()
    names = ["prediction_n", "prediction_v", "prediction_m_0", "prediction_m_1"]
    if table_of.kind == "pandas":
        assert list(found.columns) == ["a", *names]
        row = found.iloc[5]
        assert row["prediction_v"].tolist() == [5, 5]
        assert row["prediction_m_1"].tolist() == [[6, 7]]
    else:
        assert found.column_names == ["a", *names]
        row = found.to_pylist()[5]
        assert row["prediction_v"] == [5, 5]
        assert row["prediction_m_1"] == [[6, 7]]
    assert row["prediction_n"] == row["prediction_m_0"] == 5


def test_no_rows_give_an_empty_column(table_of):
    found = predict(table_of({"a": np.empty(0, np.int64), "b": np.empty(0)}), lambda a: a)
    if table_of.kind == "parquet":
        found = found.read_all()
    assert list(found.columns if table_of.kind == "pandas" else found.column_names) == [
        "a", "b", "prediction",
    ]  # fmt: skip
    assert len(found) == 0


def test_files_are_predicted_block_by_block(tmp_path):
    write(tmp_path / "t", pa.table(numbered(100)), files=2, group=10)
    called = []

    def fn(user):
        called.append(len(user))
        return user + 0.5

    sharded = adapt(str(tmp_path / "t"), Request(call="predict", feature_cols=["user"]))
    object.__setattr__(sharded, "window_bytes", 0)
    stream = sharded.map_batches(fn, size=4)
    next(stream)
    assert sum(called) <= 20  # two blocks at most: the rest is not read yet
    rest = stream.read_all()
    assert rest.num_rows == 90
    assert rest["prediction"].to_pylist() == [i + 0.5 for i in range(10, 100)]
    assert rest["unused"].to_pylist() == ["x"] * 90


# --- files ------------------------------------------------------------------------------------


def test_folder_glob_list_and_url(tmp_path):
    folder = tmp_path / "t"
    write(folder, pa.table({"a": list(range(9))}), files=3)
    (folder / "_SUCCESS").write_text("")
    (folder / ".part-0.parquet.crc").write_text("no table")
    names = [folder / f"part-{i}.parquet" for i in range(3)]
    for data in (folder, str(folder), f"file://{folder}", f"{folder}/part-*.parquet", names):
        assert whole(data).tolist() == list(range(9))
    assert whole(names[::-1]).tolist() == [6, 7, 8, 3, 4, 5, 0, 1, 2]  # a list as given
    assert whole(names[1]).tolist() == [3, 4, 5]


def test_folders_named_by_a_column(tmp_path):
    for day in (1, 2):
        (tmp_path / "t" / f"day={day}").mkdir(parents=True)
        pq.write_table(pa.table({"a": [day * 10]}), tmp_path / "t" / f"day={day}" / "x.parquet")
    a, day = whole(tmp_path / "t", feature_cols=["a", "day"])
    assert (a.tolist(), day.tolist()) == ([10, 20], [1, 2])


def test_another_file_system():
    import fsspec

    memory = fsspec.filesystem("memory")
    with memory.open("/bigdl-test/t.parquet", "wb") as file:
        pq.write_table(pa.table({"a": [1, 2, 3]}), file)
    try:
        assert whole("memory://bigdl-test").tolist() == [1, 2, 3]
    finally:
        memory.rm("/bigdl-test", recursive=True)


def test_only_a_window_is_held(tmp_path):
    rows, width = 40_000, 32
    wide = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * width)), width)
    write(tmp_path / "t", pa.table({"a": wide, "b": np.arange(rows)}), group=1000)
    sharded = adapt(str(tmp_path / "t"), Request(feature_cols=["a"], label_cols=["b"]))
    object.__setattr__(sharded, "window_bytes", int(sharded.blocks[:, 3].sum()) // 10)
    reader = sharded.open(0, 1)
    held, seen = [], []
    for batch in reader.batches(500, seed=1):
        held.append(len(reader._held[1]))
        seen.append(batch.data[1])
    assert 0 < max(held) <= rows // 8
    order = np.concatenate(seen)
    assert sorted(order.tolist()) == list(range(rows))
    assert abs(np.corrcoef(order, np.arange(rows))[0, 1]) < 0.5  # blocks of 40 are put in order


def test_two_iterators_of_one_reader_keep_apart(tmp_path):
    write(tmp_path / "t", pa.table(numbered(400)), group=10)
    sharded = adapt(str(tmp_path / "t"), Request(call="predict", feature_cols=["user"]))
    object.__setattr__(sharded, "window_bytes", 300)  # many windows, whose memory serves again
    reader, other = sharded.open(0, 1), sharded.open(0, 1)
    alone = [[b.data[0] for b in other.batches(7, seed=1, epoch=epoch)] for epoch in (0, 1)]
    both = zip(*(reader.batches(7, seed=1, epoch=epoch) for epoch in (0, 1)), *alone, strict=True)
    for first, second, one, two in both:
        np.testing.assert_array_equal(first.data[0], one)
        np.testing.assert_array_equal(second.data[0], two)


# --- misuse -----------------------------------------------------------------------------------

COLUMNS = {"user": [1, 2, 3], "item": [1, 2, 3], "name": ["a", "b", "c"]}
MISUSE = [
    (COLUMNS, {"label_cols": ["item"]}, ConfigError, r"needs feature_cols=\[…\].*'user', 'item'"),
    (COLUMNS, {"feature_cols": ["user"]}, ConfigError, r"fit\(\) on .* needs label_cols=\[…\]"),
    (COLUMNS, {"feature_cols": []}, ConfigError, "feature_cols is empty; name at least one of"),
    (COLUMNS, {"feature_cols": ["usr"]}, DataError, "no column 'usr'.*Did you mean 'user'"),
    (COLUMNS, {"feature_cols": "usr"}, DataError, "no column 'usr'.*Did you mean 'user'"),
    (
        COLUMNS, {"feature_cols": ["user"], "label_cols": ["itm"]},
        DataError, "label_cols: no column 'itm'.*Did you mean 'item'",
    ),
    (COLUMNS, {"feature_cols": 3}, ArgumentError, "feature_cols is a int; need a list"),
    (
        COLUMNS, {"feature_cols": ["name"], "label_cols": ["item"]},
        DataError, "Column 'name' holds strings.*transform=",
    ),
    (
        COLUMNS, {"feature_cols": ["item"], "label_cols": ["name"], "transform": abs},
        DataError, "Column 'name' holds strings.*target_transform=",
    ),
    (
        {"user": pd.array([1, None, None], "Int64"), "item": [1, 2, 3]},
        {"feature_cols": ["user"], "label_cols": ["item"]},
        DataError, "Nulls in 3 rows.*'user' has 2. Say what stands for them, fill=value",
    ),
    (
        {"user": ["a", None, None], "item": [[1], None, [2]]},
        {"feature_cols": ["user", "item"], "call": "predict", "transform": abs},
        DataError, "'user' has 2, 'item' has 1",
    ),
    (
        {"user": pd.array([1, None, 2], "Int64")},
        {"feature_cols": ["user"], "call": "predict", "fill": "x"},
        DataError, "fill='x' does not fit column 'user'",
    ),
    (
        {"user": ["a", None]},
        {"feature_cols": ["user"], "call": "predict", "fill": 0, "transform": abs},
        DataError, "fill=0 does not fit column 'user'",
    ),
    (
        COLUMNS, {"feature_cols": ["user"], "call": "predict", "fill": {"usr": 0}},
        DataError, "fill: no column 'usr'.*Did you mean 'user'",
    ),
    (
        COLUMNS, {"feature_cols": ["user"], "call": "predict", "fill": {"item": 0}},
        ConfigError, "fill names column 'item', which is not read",
    ),
    (
        {"user": [[1, 2], [3]]}, {"feature_cols": ["user"], "call": "predict"},
        DataError, r"'user' holds arrays of (shape \(2,\)|length 2) \(row 0\).*\(row 1\)",
    ),
    (
        {"user": np.array([2**63], np.uint64)}, {"feature_cols": ["user"], "call": "predict"},
        DataError, "holds 9223372036854775808, which is more than int64",
    ),
    (
        {"user": [["a"], ["b"]]}, {"feature_cols": ["user"], "call": "predict"},
        DataError, "'user' holds arrays of .*need numbers",
    ),
    (
        {"user": np.empty(0), "item": np.empty(0)},
        {"feature_cols": ["user"], "label_cols": ["item"]}, DataError, r"fit\(\) got .* no rows",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "asked", "kind", "text"), MISUSE)
def test_misuse(table_of, columns, asked, kind, text):
    with pytest.raises(kind, match=text):
        list(adapt(table_of(columns), Request(**asked)).open(0, 1).batches(9))


def test_names_that_are_taken(table_of):
    data = table_of({"a": [1, 2], "prediction": [1, 2], "p_0": [0, 0]})
    untouched = []
    with pytest.raises(ConfigError, match=r"has a column 'prediction' already.*output_cols="):
        predict(data, untouched.append)
    with pytest.raises(ConfigError, match="has a column 'p_0' already"):
        predict(data, lambda a: (a, a), names="p")
    with pytest.raises(ConfigError, match="output_cols has 1 names, but the model has 2 outputs"):
        predict(data, lambda a: (a, a), names=["q"])
    assert untouched == []


def test_a_name_that_two_columns_have():
    frame = pd.DataFrame([[1, 2]], columns=["a", "a"])
    with pytest.raises(DataError, match="2 columns are called 'a'; rename them"):
        whole(frame)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="No Parquet file at"):
        whole(str(tmp_path / "absent"))
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(DataError, match="Not a Parquet file"):
        whole(str(tmp_path / "x.parquet"))


def test_a_recipe_leaves_the_table_at_home():
    frame = pd.DataFrame({"a": np.arange(5), "text": ["long" * 1000] * 5})
    sharded = adapt(frame, Request(call="predict", feature_cols=["a"]))
    travelled = pickle.dumps(sharded)
    assert len(travelled) < 2_000
    with pytest.raises(DataError, match="map it where the frame is"):
        pickle.loads(travelled).map_batches(lambda a: a)
