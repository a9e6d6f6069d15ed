"""Arrays and nests of them, for training and for predict."""

from __future__ import annotations

import pickle
from typing import NamedTuple

import numpy as np
import pytest

from bigdl.errors import ArgumentError, ConfigError, DataError
from bigdl.orca.data.adapters import adapt
from bigdl.orca.data.contract import Column, Request
from bigdl.testing.sharded import ShardedContract

FIT, PREDICT = Request(), Request(call="predict")


class TestPair(ShardedContract):
    def make(self, rows):
        x = np.arange(rows, dtype=np.float64)[:, None] * [1, 10]
        return adapt((x, np.arange(rows)), FIT)

    def ids(self, data):
        x, y = data
        np.testing.assert_array_equal(x[:, 1], 10 * y)
        return y


class TestNest(ShardedContract):
    def make(self, rows):
        i = np.arange(rows)
        return adapt(({"a": i, "b": (i * 2, [i * 3])}, (i, i.astype(np.float32))), FIT)

    def ids(self, data):
        x, (y, z) = data
        assert [*x] == ["a", "b"]
        np.testing.assert_array_equal(x["b"][1][0], 3 * z)
        np.testing.assert_array_equal(x["b"][0], 2 * y)
        return x["a"]


class TestTensors(ShardedContract):
    def make(self, rows):
        torch = pytest.importorskip("torch", reason="needs the [torch] extra")
        x = torch.arange(rows, dtype=torch.bfloat16).repeat(2, 1).T
        return adapt((x, torch.arange(rows).requires_grad_(False)), FIT)

    def ids(self, data):
        x, y = data
        assert str(x.dtype) == "torch.bfloat16"  # NumPy has no such type
        np.testing.assert_array_equal(x[:, 1].float().numpy(), y)
        return y


class TestMapped(ShardedContract):
    """Arrays in files travel by name."""

    recipe_bytes = 2_000

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path

    def make(self, rows):
        path = self.folder / f"{rows}.dat"
        whole = np.memmap(path, np.int64, "w+", shape=(rows + 7, 3), offset=24)
        whole[...] = np.arange(rows + 7)[:, None] - 5
        x = whole[5:-2]
        return adapt((x, x[:, 0]) if rows < 100 else (x, x), FIT)

    def ids(self, data):
        assert type(data[0]) is np.ndarray
        return data[1]


# --- what a batch is --------------------------------------------------------------------------


def batches(data, request=FIT, size=4, **options):
    return [b.data for b in adapt(data, request).open(0, 1).batches(size, **options)]


def test_values_and_types_are_kept():
    x = np.arange(6, dtype=np.float16).reshape(3, 2)
    y = np.array([1, 0, 1], dtype=np.uint8)
    ((features, labels),) = batches((x, y))
    np.testing.assert_array_equal(features, x)
    assert (features.dtype, labels.dtype) == (np.float16, np.uint8)


def test_the_schema_says_what_rows_are():
    data = ({"a": np.zeros((3, 2), np.float32)}, np.zeros(3, np.int64))
    schema = adapt(data).schema
    assert schema.features == {"a": Column(name="features['a']", dtype="float32", shape=(2,))}
    assert schema.labels == Column(name="labels", dtype="int64")
    assert schema.row_bytes == 2 * 4 + 8


def test_transforms_get_each_batch():
    words = np.array(["a", "bb", "ccc", "dddd", "eeeee"])
    request = Request(
        transform=lambda x: np.char.str_len(x), target_transform=lambda y: {"twice": 2 * y}
    )
    first, second = batches((words, np.arange(5)), request, 3)
    assert first[0].tolist() == [1, 2, 3]
    assert second[1]["twice"].tolist() == [6, 8]


def test_predict_takes_a_tuple_as_inputs():
    x, z = np.arange(5), np.arange(5) * 2
    ((a, b),) = batches((x, z), PREDICT, 10)
    assert a.tolist() == x.tolist()
    assert b.tolist() == z.tolist()


def test_the_callers_tensor_stays_as_it_was():
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    x = torch.ones(4, 1, requires_grad=True)
    ((features, _),) = batches((x * 2, torch.zeros(4)))
    assert isinstance(features, np.ndarray)
    features[...] = 7
    assert x.tolist() == [[1.0]] * 4


def test_a_view_of_a_large_tensor_travels_alone():
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    large = torch.zeros(100_000, 4, dtype=torch.bfloat16)
    assert len(pickle.dumps(adapt((large[:10], large[:10])))) < 3_000


# --- predict ----------------------------------------------------------------------------------


class Pair(NamedTuple):
    double: np.ndarray
    other: np.ndarray


@pytest.mark.parametrize("shares", [1, 2, 3, 50])
@pytest.mark.parametrize("rows", [1, 11, 12])
def test_outputs_are_aligned_and_keep_their_structure(rows, shares):
    sizes = []

    def fn(x):
        sizes.append(len(x))
        return Pair(x * 2, {"half": (x / 2).astype(np.float32)})

    x = np.arange(rows)
    found = adapt(x, PREDICT).map_batches(fn, size=4, shares=shares)
    assert type(found) is Pair
    np.testing.assert_array_equal(found.double, 2 * x)
    np.testing.assert_array_equal(found.other["half"], (x / 2).astype(np.float32))
    assert found.other["half"].dtype == np.float32
    assert sizes == [4] * (rows // 4) + [rows % 4] * (rows % 4 > 0)


def test_outputs_are_not_squeezed():
    found = adapt(np.arange(5), PREDICT).map_batches(lambda x: x[:, None, None], size=2)
    assert found.shape == (5, 1, 1)


def test_tensors_come_back_as_arrays():
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    found = adapt(np.arange(5.0), PREDICT).map_batches(
        lambda x: torch.from_numpy(x).requires_grad_() * 2, size=2
    )
    assert found.tolist() == [0, 2, 4, 6, 8]


def test_the_work_travels_piece_by_piece():
    sizes = []

    def elsewhere(fn, pieces):
        for piece in pieces:
            work = pickle.dumps((fn, piece))
            sizes.append(len(work))
            fn, piece = pickle.loads(work)
            yield fn(piece)

    x = np.arange(100_000, dtype=np.float64)
    found = adapt(x, PREDICT).map_batches(np.sqrt, size=10_000, shares=5, run=elsewhere)
    np.testing.assert_array_equal(found, np.sqrt(x))
    assert len(sizes) == 5
    assert max(sizes) < x.nbytes / 5 + 2_000


def test_no_rows_give_no_outputs():
    assert adapt(np.empty((0, 2)), PREDICT).map_batches(lambda x: x) is None


def test_another_number_of_predictions():
    with pytest.raises(DataError, match="prediction has 1 rows, made from a batch of 4 rows"):
        adapt(np.arange(9), PREDICT).map_batches(lambda x: x[:1], size=4)


# --- misuse -----------------------------------------------------------------------------------

X, Y = np.arange(6.0).reshape(3, 2), np.arange(3)

MISUSE = [
    ((X, Y[:2]), {}, DataError, r"data\[0\] has 3 rows, but data\[1\] has 2"),
    (({"a": X, "b": X[:1]}, Y), {}, DataError, r"data\[0\]\['a'\] has 3 rows.*'b'\] has 1"),
    (X, {}, DataError, r"needs a pair \(features, labels\), and got a ndarray"),
    ((X,), {}, DataError, "got a tuple of 1"),
    ((X, Y, Y), {}, DataError, r"tuple of 3.*\(\(x1, x2\), y\)"),
    ({"x": X, "y": Y}, {}, DataError, "got a dict with 'x', 'y'"),
    (None, {}, DataError, "got a NoneType"),
    (([1, 2, 3], Y), {}, DataError, r"data\[0\]\[0\] is an int, which has no rows"),
    ((np.float64(1), Y), {}, DataError, "a single number"),
    ((np.array([None, {}, 2]), Y), {}, DataError, r"data\[0\] holds Python objects.*transform="),
    ((X, np.array(["a", "b", "c"])), {}, DataError, r"data\[1\] holds strings.*target_transform="),
    ((np.array(["2020"] * 3, "M8[D]"), Y), {}, DataError, "holds times"),
    ((X[:0], Y[:0]), {}, DataError, r"fit\(\) got no rows"),
    ((X[:0], Y[:0]), {"call": "evaluate"}, DataError, r"evaluate\(\) got no rows"),
    ((X, Y), {"feature_cols": ["a"]}, ConfigError, "feature_cols beside arrays. Only tables"),
    ((X, Y), {"label_cols": ["a"], "fill": 0}, ConfigError, "got label_cols, fill beside arrays"),
    ((X, Y), {"batch_size": 0}, ConfigError, "batch_size=0 .need a whole number >= 1"),
    ((X, Y), {"batch_size": True}, ConfigError, "batch_size=True"),
    ((X, Y), {"transform": 3}, ConfigError, "transform=3 .need a function"),
    (
        X,
        {"call": "predict", "label_cols": ["y"]},
        ConfigError,
        "label_cols .predict has no labels",
    ),
    (3, {}, ArgumentError, "cannot read a int. Give arrays as"),
    (iter([]), {}, ArgumentError, "cannot read a list_iterator"),
]


@pytest.mark.parametrize(("data", "asked", "kind", "text"), MISUSE)
def test_misuse(data, asked, kind, text):
    with pytest.raises(kind, match=text):
        adapt(data, Request(**asked))


def test_a_transform_that_loses_rows():
    with pytest.raises(DataError, match=r"transform\(features\) has 2 rows.*batch of 3 rows"):
        batches((X, Y), Request(transform=lambda x: x[:2]))
