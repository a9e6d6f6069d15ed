"""Rows side by side in records: the same rows as without."""

from collections import OrderedDict

import numpy as np
import pytest

from bigdl._base.trees import leaves, map_leaves
from bigdl.orca.data.packed import Packed, batch_of

ROWS = 1000
WHICH = [
    slice(0, 7),
    slice(ROWS - 3, ROWS),
    np.arange(ROWS)[::-1],
    np.random.default_rng(1).integers(ROWS, size=64),
    np.empty(0, np.int64),
]


def table():
    draw = np.random.default_rng(0)
    floats = {f"x{i}": draw.random(ROWS, dtype=np.float32) for i in range(3)}
    return (
        OrderedDict(
            **floats,
            whole=np.arange(ROWS),
            flag=draw.random(ROWS) < 0.5,
            double=draw.random(ROWS),
            few=draw.random((ROWS, 2, 3)).astype(np.float16),
            wide=draw.random((ROWS, 64)),
            when=np.arange(ROWS).astype("M8[us]"),
            text=np.array([f"row {i}" for i in range(ROWS)], dtype=object),
            nothing=np.empty((ROWS, 0), np.float32),
        ),
        [draw.random((ROWS, 1)), (np.arange(ROWS, dtype=np.int8),)],
    )


def cut(tree, *places):
    return [
        map_leaves(lambda leaf, i=i, j=j: leaf[i:j], tree)
        for i, j in zip((0, *places), (*places, ROWS), strict=True)
    ]


@pytest.mark.parametrize("places", [(), (400,), (1, 2, 500), (0, 500, 500)])
def test_rows_are_those_that_lay_apart(places):
    packed = Packed(cut(table(), *places), ROWS)
    for which in WHICH:
        found, wanted = packed[which], batch_of(table(), which)
        assert type(found[0]) is OrderedDict
        assert type(found[1]) is list
        for one, other in zip(leaves(found), leaves(wanted), strict=True):
            assert one.dtype == other.dtype
            assert one.flags.c_contiguous
            assert one.flags.aligned
            np.testing.assert_array_equal(one, other)


def test_a_batch_is_memory_of_its_own():
    packed = Packed(cut(table(), 400), ROWS)
    for which in WHICH:
        for leaf in leaves(packed[which]):
            if leaf.dtype != object:
                leaf[...] = 0
    first = packed[slice(0, ROWS)]
    for one, other in zip(leaves(first), leaves(table()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_types_that_differ_between_pieces_are_put_together_as_numpy_does():
    pieces = [(np.arange(3), np.ones(3)), (np.arange(2), np.ones(2)), (np.ones(2), np.ones(2))]
    found = Packed(iter(pieces), 7)[slice(0, 7)]
    assert found[0].dtype == np.float64
    np.testing.assert_array_equal(found[0], [0, 1, 2, 0, 1, 1, 1])


def test_pieces_are_let_go_one_by_one():
    import weakref

    held = []

    def pieces():
        for _ in range(5):
            arrays = tuple(np.ones(10) for _ in range(4))
            alive = sum(ref() is not None for ref in held)
            assert alive <= 3 * 4, alive
            held.extend(weakref.ref(array) for array in arrays)
            yield arrays
            del arrays

    packed = Packed(pieces(), 50)
    assert all(ref() is None for ref in held)
    assert packed[slice(0, 50)][0].sum() == 50


def test_one_large_piece_stays_where_it_is(monkeypatch):
    """It may be of memory that workers share."""
    data = tuple(np.ones(100) for _ in range(4))
    monkeypatch.setattr("bigdl.orca.data.packed._WORTH_BYTES", 100)
    packed = Packed([data], 100)
    data[0][3] = 7
    assert packed[slice(3, 4)][0] == 7


def test_no_leaf_is_no_record():
    assert Packed([(), ()], 0)[slice(0, 0)] == ()


def test_memory_of_rows_that_nobody_asks_for_is_used_again():
    first = Packed(cut(table(), 400), ROWS)
    layout = first._layout
    again = Packed(cut(table(), 100, 300), ROWS, spare=first)
    assert again._layout is layout
    for which in WHICH:
        for one, other in zip(leaves(again[which]), leaves(batch_of(table(), which)), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("other", "rows"),
    [
        ((np.ones(3), np.ones(3, np.float32), np.ones(3)), 6),  # another type
        ((np.ones(3), np.ones((3, 1)), np.ones(3)), 6),  # another shape
        ((np.ones(300), np.ones(300), np.ones(300)), 600),  # more rows than there is room for
    ],
)
def test_memory_that_does_not_fit_is_left_alone(other, rows):
    first = Packed([(np.zeros(3), np.zeros(3), np.zeros(3))] * 2, 6)
    again = Packed([other] * 2, rows, spare=first)
    assert again._layout is not first._layout
    assert sum(leaf.sum() for leaf in leaves(first[slice(0, 6)])) == 0
    assert sum(leaf.sum() for leaf in leaves(again[slice(0, rows)])) == 3 * rows
