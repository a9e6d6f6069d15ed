"""Nests of arrays: structure kept, rows kept, differences named by path."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import types
import weakref
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigdl._base import trees
from bigdl.errors import DataError


class Pair(NamedTuple):
    left: object
    right: object


@dataclasses.dataclass(frozen=True)
class Frozen:
    boxes: object
    scores: object = None

    def __post_init__(self):
        if isinstance(self.boxes, str):
            raise ValueError("checked by the class")


class Record(dict):
    """A dict with attributes, as output classes of model hubs are."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__.update(items)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.__dict__[key] = value


def nests(leaf):
    """Nests of every kind we know, with ``leaf`` (a strategy) in them."""
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3),
            st.builds(Pair, inner, inner),
            st.builds(Frozen, inner, st.one_of(st.none(), inner)),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(lambda d: Record(**d)),
        ),
        max_leaves=6,
    )


def arrays(rows: int):
    shapes = st.lists(st.integers(1, 3), max_size=2)
    return shapes.map(lambda rest: np.random.default_rng(0).random((rows, *rest)))


def same(one, other):
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if one is None:
        return other is None
    if type(one) is not type(other):
        return False
    mine, theirs = trees._parts(one), trees._parts(other)
    return mine.keys() == theirs.keys() and all(same(mine[k], theirs[k]) for k in mine)


@given(nests(arrays(5)))
def test_map_keeps_every_kind(tree):
    assert same(trees.map_leaves(lambda leaf: leaf, tree), tree)
    doubled = trees.map_leaves(lambda one, two: one + two, tree, tree)
    for before, after in zip(trees.leaves(tree), trees.leaves(doubled), strict=True):
        assert np.array_equal(after, 2 * before)


@given(nests(arrays(7)), st.lists(st.integers(0, 7), max_size=4))
def test_slices_put_together_are_the_whole(tree, cuts):
    assert trees.rows(tree) == 7
    edges = [0, *sorted(cuts), 7]
    parts = [trees.slice_rows(tree, a, b) for a, b in itertools.pairwise(edges)]
    assert [trees.rows(part) for part in parts] == [b - a for a, b in itertools.pairwise(edges)]
    assert same(trees.concat(parts), tree)


@given(nests(arrays(5)))
def test_filled_from_its_leaves_it_is_itself(tree):
    fill = trees.filler(tree)
    assert same(fill(trees.leaves(tree)), tree)
    doubled = trees.map_leaves(lambda leaf: 2 * leaf, tree)
    assert same(fill(iter(trees.leaves(doubled))), doubled)  # and again, from any iterable


def test_a_filler_holds_no_array():
    data = {"x": np.zeros(3)}
    last = weakref.ref(data["x"])
    fill = trees.filler(data)
    del data
    assert last() is None
    assert fill([1]) == {"x": 1}


@given(nests(arrays(3)))
def test_paths_lead_to_the_leaves(tree):
    for path, leaf in trees.named_leaves(tree, "data"):
        assert eval(path, {"data": tree}) is leaf


def test_slices_are_views():
    data = {"x": np.zeros((4, 2))}
    trees.slice_rows(data, 1, 3)["x"][:] = 1
    assert data["x"].sum() == 4


def test_a_slice_without_an_end():
    assert trees.slice_rows(np.arange(5), 3).tolist() == [3, 4]


def test_the_callers_nest_is_not_changed():
    inner = [np.ones(2)]
    data = Record(a=inner)
    mapped = trees.map_leaves(lambda leaf: leaf * 0, data)
    assert data["a"] is inner
    assert inner[0].sum() == 2
    assert mapped.a is mapped["a"]  # a class that keeps attributes beside its items


def test_kinds_with_a_mind_of_their_own():
    default = collections.defaultdict(list, a=np.ones(1))
    assert trees.map_leaves(lambda x: x, default).default_factory is list
    ordered = collections.OrderedDict(b=np.ones(1), a=np.ones(1))
    assert list(trees.map_leaves(lambda x: x, ordered)) == ["b", "a"]
    view = types.MappingProxyType({"a": np.ones(1)})
    assert isinstance(trees.map_leaves(lambda x: x, view), types.MappingProxyType)
    user = collections.UserDict(a=np.ones(1))
    assert isinstance(trees.map_leaves(lambda x: x + 1, user), collections.UserDict)
    assert user["a"][0] == 1


def test_a_list_class_that_cannot_be_made_anew():
    class Strange(list):
        def __init__(self):
            super().__init__([np.ones(1)])

    with pytest.raises(DataError, match=r"x\[0\] is a Strange, which cannot be made anew"):
        trees.map_leaves(lambda leaf: leaf, [Strange()], name="x")


def test_none_is_an_empty_nest():
    assert trees.leaves({"a": None, "b": np.ones(1)})[0].shape == (1,)
    assert trees.map_leaves(lambda leaf: leaf, (None, 1)) == (None, 1)


def test_a_dataclass_type_is_a_leaf():
    assert trees.leaves([Frozen]) == [Frozen]


def test_tensors_with_their_own_join():
    torch = pytest.importorskip("torch", reason="other arrays than NumPy's")
    parts = [{"x": torch.arange(3)}, {"x": torch.arange(2)}]
    assert trees.concat(parts, join=torch.cat)["x"].tolist() == [0, 1, 2, 0, 1]
    named = torch.max(torch.rand(4, 3), dim=1)  # torch.return_types, a tuple of a special kind
    assert trees.rows(trees.slice_rows(named, 0, 2)) == 2


def test_outputs_of_model_hubs():
    hub = pytest.importorskip("transformers.utils", reason="the hub's own output class")
    generic = __import__("transformers.modeling_outputs", fromlist=["x"])
    output = generic.SequenceClassifierOutput(logits=np.ones((4, 2)))
    assert isinstance(output, hub.ModelOutput)
    half = trees.slice_rows(output, 0, 2)
    assert type(half) is type(output)
    assert half.logits.shape == (2, 2)
    assert half.loss is None
    assert output.logits.shape == (4, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: trees.rows({}), "data holds no array"),
        (lambda: trees.rows(None), "data holds no array"),
        (lambda: trees.rows({"a": "text"}), "data['a'] is a str, which has no rows"),
        (lambda: trees.rows([np.float32(1)]), "data[0] is a single number"),
        (
            lambda: trees.rows({"x": np.ones(3), "y": (np.ones(3), np.ones(4))}, "batch"),
            "batch['x'] has 3 rows, but batch['y'][1] has 4",
        ),
        (lambda: trees.rows(Frozen(np.ones(2), 5)), "data.scores is an int"),
        (lambda: trees.rows(Pair(np.ones(2), 5)), "data.right is an int"),
        (lambda: trees.slice_rows([np.ones(2), np.ones(3)], 0, 1), "data[0] has 2 rows"),
        (lambda: trees.concat([]), "No data to put together"),
        (
            lambda: trees.concat([{"a": np.ones(1)}, {"b": np.ones(1)}]),
            "data has 'a', 'b' in one place and not in another",
        ),
        (
            lambda: trees.concat([[np.ones(1)], [np.ones(1)] * 2]),
            "data has 1 parts in one place, 2 in another",
        ),
        (
            lambda: trees.concat([(np.ones(1),), [np.ones(1)]]),
            "data is a tuple in one place and a list in another",
        ),
        (
            lambda: trees.concat([[np.ones(1)], [[np.ones(1)]]]),
            "data[0] is a ndarray in one place and a list in another",
        ),
        (
            lambda: trees.concat([{"a": np.ones((1, 2))}, {"a": np.ones((1, 3))}]),
            "data['a'] cannot be put together: rows of shape (2,) and of shape (3,)",
        ),
        (lambda: trees.concat([np.float32(1)]), "data is a single number"),
        (lambda: trees.concat([{"a": 1}, {"a": 2}]), "data['a'] is an int, which has no rows"),
    ],
)
def test_differences_are_named(call, words):
    with pytest.raises(DataError) as caught:
        call()
    assert words in str(caught.value)
